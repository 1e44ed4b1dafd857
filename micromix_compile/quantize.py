"""Packed linear layers: what `quantize_` puts in a model instead of its linears."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from micromix_compile import ops, packing
from micromix_compile.assignment import padded_channels
from micromix_compile.matching import match_linears, model_id, parameter_names
from micromix_compile.recipe import Recipe, Split, weight_split

if TYPE_CHECKING:
    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe import GroupRecipe

logger = logging.getLogger("micromix_compile")


class PackedWeight(NamedTuple):
    """A quantized (N, C) weight: w4 (N, k4 // 2), w6 (3, N, k6 // 4), w8 (N, k8), w_scale (N, K // 32), uint8."""

    w4: Tensor
    w6: Tensor
    w8: Tensor
    w_scale: Tensor


def pack_weight(weight: Tensor, group: GroupRecipe, config: MicroMixConfig) -> PackedWeight:
    """Reorder, quantize and pack one weight.

    weight: (N, C) float32, bfloat16 or float16. Raises ValueError if the group is for another C.
    """
    if padded_channels(weight.shape[1]) != group.channel_perm.numel():
        raise ValueError(
            f"group {group.name} orders {group.channel_perm.numel()} channels, but the weight has {weight.shape[1]}"
        )
    split = weight_split(group.split, config.weights)
    perm = group.channel_perm.to(weight.device)
    q4, q6, q8, scale = ops.reorder_quantize(weight.detach(), perm, *split, config.fp6, str(config.scale_rounding))
    return PackedWeight(q4, packing.pack_fp6(q6, config.fp6), q8, scale)


class MicroMixLinear(nn.Module):
    """A linear layer that holds packed weights only.

    Buffers: channel_perm (K,) int32, one tensor shared by all linears of a group; weight_q4, weight_q6, weight_q8 and
    weight_scale as in `PackedWeight`. bias: (N,) or None. forward: (..., C) float -> (..., N) of the same dtype.
    """

    channel_perm: Tensor
    weight_q4: Tensor
    weight_q6: Tensor
    weight_q8: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        split: Split,
        config: MicroMixConfig,
        bias: nn.Parameter | None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.split = split
        self.fp6 = config.fp6
        self.scale_rounding = str(config.scale_rounding)
        k4, k6, k8 = weight_split(split, config.weights)
        n, channels = out_features, sum(split)
        self.register_buffer("channel_perm", torch.empty(channels, dtype=torch.int32, device=device))
        for name, shape in (
            ("q4", (n, k4 // 2)),
            ("q6", (3, n, k6 // 4)),
            ("q8", (n, k8)),
            ("scale", (n, channels // 32)),
        ):
            self.register_buffer(f"weight_{name}", torch.empty(shape, dtype=torch.uint8, device=device))
        self.bias = bias

    def load_packed(self, packed: PackedWeight, channel_perm: Tensor) -> None:
        """Take over packed tensors without a copy."""
        self.channel_perm = channel_perm
        self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale = packed

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N)."""
        rows = x.reshape(-1, self.in_features)
        quantized = torch.ops.micromix.reorder_quantize(
            rows, self.channel_perm, *self.split, self.fp6, self.scale_rounding
        )
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        out = torch.ops.micromix.mixed_mx_mm(*quantized, *weight, self.bias, self.fp6, x.dtype)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        k4, k6, k8 = self.split
        return f"{self.in_features}, {self.out_features}, mxfp4={k4}, mxfp6={k6} ({self.fp6}), mxfp8={k8}"


def quantize_(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the recipe's linears by `MicroMixLinear` in place; the original weights are freed. Returns `model`.

    Weights that something else still uses (tied embeddings) stay alive through that user. Raises ValueError if the
    recipe was made for another model, naming both.
    """
    names = parameter_names(model)
    matched = match_linears(recipe, names, model_id=model_id(model))
    modules = dict(model.named_modules(remove_duplicate=False))
    swapped: dict[int, MicroMixLinear] = {}
    perms: dict[str, Tensor] = {}
    for parameter, linear in matched:
        for name in names[parameter]:
            owner = modules.get(name)
            if owner is None or not is_linear_module(owner):
                continue
            if id(owner) not in swapped:
                weight = parameter.detach() if isinstance(owner, nn.Linear) else parameter.detach().T
                packed = pack_weight(weight, linear.group, recipe.config)
                module = MicroMixLinear(
                    in_features=linear.in_features,
                    out_features=linear.out_features,
                    split=linear.split,
                    config=recipe.config,
                    bias=_frozen(owner.bias),
                    device="meta",
                )
                perm = perms.setdefault(linear.group.name, linear.group.channel_perm.to(parameter.device))
                module.load_packed(packed, perm)
                swapped[id(owner)] = module
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, swapped[id(owner)])
    left = len(matched) - len(swapped)
    if left:
        logger.warning("%d linears of the recipe are no nn.Linear modules: they run quantized only when compiled", left)
    logger.info("quantized %d linears to %.2f stored bits", len(swapped), recipe.stored_bits)
    return model


def is_linear_module(module: nn.Module) -> bool:
    """nn.Linear, or the Conv1D of Hugging Face's GPT-2, whose weight is (C, N)."""
    return type(module) is nn.Linear or (
        type(module).__name__ == "Conv1D" and isinstance(getattr(module, "weight", None), nn.Parameter)
    )


def _frozen(bias: nn.Parameter | None) -> nn.Parameter | None:
    return None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)

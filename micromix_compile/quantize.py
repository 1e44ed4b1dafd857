"""Packed linear layers: what `quantize_` puts in a model instead of its linears."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from micromix_compile import gpu_rounding, ops, packing, reference, rounding
from micromix_compile.assignment import padded_channels
from micromix_compile.candidates import how_to_leave_training
from micromix_compile.formats import BLOCK_SIZE
from micromix_compile.matching import match_linears, model_id, named_modules, parameter_names
from micromix_compile.recipe import PackedWeight, Recipe, Split, weight_split
from micromix_compile.target import triton_family

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe import GroupRecipe, LinearRecipe

logger = logging.getLogger("micromix_compile")

QUANT_METHOD: Final = "micromix"
SCHEMA_VERSION: Final = 1


def pack_weight(weight: Tensor, group: GroupRecipe, config: MicroMixConfig) -> PackedWeight:
    """Reorder, quantize and pack one weight.

    weight: (N, C) float32, bfloat16 or float16. Raises ValueError if the group is for another C.
    """
    if padded_channels(weight.shape[1]) != group.channel_perm.numel():
        raise ValueError(
            f"group {group.name} orders {group.channel_perm.numel()} channels, but the weight has {weight.shape[1]}"
        )
    split = weight_split(group.split, config.weights)
    return _pack(weight.detach(), group.channel_perm.to(weight.device), split, config)


def round_weights(
    weights: Mapping[str, Tensor], group: GroupRecipe, moment: Tensor, config: MicroMixConfig
) -> dict[str, PackedWeight]:
    """Round and pack the weights of one group together, as `config` asks (see `rounding`).

    weights: (N, C) by name. moment: (C, C) float32, the sum of x x^T over the calibrated inputs. A weight with a NaN
    or an infinity is rounded to nearest, which poisons its blocks only.
    """
    finite = {name: weight for name, weight in weights.items() if bool(weight.isfinite().all())}
    packed = {name: pack_weight(weight, group, config) for name, weight in weights.items() if name not in finite}
    if not finite:
        return packed
    device = moment.device
    perm = group.channel_perm.to(device)
    stacked = torch.cat([reference.reorder(w.to(device, torch.float32), perm) for w in finite.values()])
    split = weight_split(group.split, config.weights)
    formats = [
        name for name, k in zip(("e2m1", config.fp6, "e4m3"), split, strict=True) for _ in range(k // BLOCK_SIZE)
    ]
    rounded = rounding.round_weight(
        stacked,
        formats,
        reference.reorder(reference.reorder(moment, perm).T, perm),
        scale_rounding=config.scale_rounding,
        search=config.scale_search,
        compensate=config.weight_rounding == "gptq",
        steps=gpu_rounding.STEPS if triton_family(stacked) is not None else None,
    )
    for (name, weight), part in zip(finite.items(), rounded.split([len(w) for w in finite.values()]), strict=True):
        packed[name] = _pack(part.to(weight.device), torch.arange(perm.numel(), device=weight.device), split, config)
    return packed


def _pack(weight: Tensor, channel_perm: Tensor, split: Split, config: MicroMixConfig) -> PackedWeight:
    q4, q6, q8, scale = ops.reorder_quantize(weight, channel_perm, *split, config.fp6, str(config.scale_rounding))
    parts = (q4, packing.pack_fp6(q6, config.fp6), q8, scale)
    return PackedWeight(*packing.in_one_storage(parts, weight.device))


def packed_weight(weight: Tensor, linear: LinearRecipe, recipe: Recipe) -> PackedWeight:
    """The packed form of one weight (N, C): the recipe's own if calibration rounded it, else rounded to nearest.

    So is a weight that has changed since it was calibrated, which the log says. Raises ValueError if the recipe's
    config wants weights rounded while calibrating, and this one was not.
    """
    ready = recipe.packed.get(linear.fqn)
    checksums = linear.weight_checksums
    if ready is not None and checksums is not None and checksums.fit(weight):
        is_there = all(part.device == weight.device for part in ready)
        return ready if is_there else PackedWeight(*packing.in_one_storage(ready, weight.device))
    if ready is not None:
        logger.warning("%s has changed since it was calibrated: it is rounded to nearest", linear.fqn)
    elif recipe.config.rounds_weights:
        raise ValueError(
            f"the recipe has no rounded weight for {linear.fqn}: weight_rounding={recipe.config.weight_rounding!r} and "
            f"scale_search={recipe.config.scale_search} take effect while calibrating, so calibrate with them"
        )
    return pack_weight(weight, linear.group, recipe.config)


class ChannelOrder(nn.Module):
    """The order of one activation's channels: channel_perm (K,) int32.

    A module and not a buffer of each linear, because a move to another device keeps shared modules shared.
    """

    channel_perm: Tensor

    def __init__(self, channel_perm: Tensor) -> None:
        super().__init__()
        self.register_buffer("channel_perm", channel_perm)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but a copy for each linear that shares it: checkpoint formats refuse tensors that share memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}channel_perm"] = destination[f"{prefix}channel_perm"].clone()


class MicroMixLinear(nn.Module):
    """A linear layer that holds packed weights only.

    order: one module shared by all linears of a group. Buffers: weight_q4, weight_q6, weight_q8 and weight_scale as in
    `PackedWeight`. bias: (N,) or None. forward: (..., C) float -> (..., N) of the same dtype.
    """

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
        self.order = ChannelOrder(torch.empty(channels, dtype=torch.int32, device=device))
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
        self.order.channel_perm = channel_perm
        self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale = packed

    def compact(self) -> None:
        """Move the packed tensors into one allocation, see `packing.in_one_storage`."""
        parts = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        self.load_packed(PackedWeight(*packing.in_one_storage(parts, parts[0].device)), self.order.channel_perm)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N), under autocast in its dtype. Raises ValueError for another C."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} channels, got shape {tuple(x.shape)}")
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        rows = x.reshape(-1, self.in_features)
        quantized = torch.ops.micromix.reorder_quantize(
            rows, self.order.channel_perm, *self.split, self.fp6, self.scale_rounding
        )
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        out = torch.ops.micromix.mixed_mx_mm(*quantized, *weight, self.bias, self.fp6, x.dtype)
        result: Tensor = out.reshape(*x.shape[:-1], self.out_features)
        return result

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        k4, k6, k8 = self.split
        return f"{self.in_features}, {self.out_features}, mxfp4={k4}, mxfp6={k6} ({self.fp6}), mxfp8={k8}"


def quantize_(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the recipe's linears by `MicroMixLinear` in place; the original weights are freed. Returns `model`.

    Weights that something else still uses (tied embeddings) stay alive through that user. A Hugging Face model can be
    saved with save_pretrained afterwards. Raises ValueError if the recipe was made for another model, naming both, or
    if one of its linears is packed already.
    """
    wrapped = model
    model = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: {how_to_leave_training(model)}")
    names = parameter_names(model)
    modules = named_modules(model)
    if already := [fqn for fqn in recipe.linears if isinstance(modules.get(fqn), MicroMixLinear)]:
        raise ValueError(f"{model_id(model)} is packed already: {already[0]} is a MicroMixLinear")
    matched = match_linears(recipe, names, model_id=model_id(model))
    described: dict[str, dict[str, Any]] = {}
    with torch.no_grad():
        for parameter, linear in matched:
            own = [name for name in names[parameter] if name in modules and is_linear_module(modules[name])]
            if not own:
                logger.warning("%s is no nn.Linear: it stays as it is", linear.fqn)
                continue
            packed = _pack_module(modules[own[0]], linear, recipe)
            for name in own:
                parent, _, child = name.rpartition(".")
                setattr(modules[parent], child, packed)
                shape = {"in_features": linear.in_features, "out_features": linear.out_features}
                described[name] = {**shape, "split": list(linear.split), "group": linear.group.name}
    share_orders(model, {name: str(d["group"]) for name, d in described.items()})
    _describe(model, recipe.config, described)
    logger.info("quantized %d linears: %s", len(described), recipe.bits_text)
    return wrapped


def _pack_module(module: nn.Module, linear: LinearRecipe, recipe: Recipe) -> MicroMixLinear:
    weight, bias = module.weight, module.bias
    assert isinstance(weight, nn.Parameter), "a linear module has a weight"
    packed = MicroMixLinear(
        in_features=linear.in_features,
        out_features=linear.out_features,
        split=linear.split,
        config=recipe.config,
        bias=nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, nn.Parameter) else None,
        device="meta",
    )
    matrix = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
    packed.load_packed(packed_weight(matrix, linear, recipe), linear.group.channel_perm.to(weight.device))
    return packed.train(module.training)


def share_orders(model: nn.Module, groups: Mapping[str, str]) -> None:
    """Let the packed linears of a group, name -> group, hold one order: sharing is how one quantize serves them all."""
    first: dict[str, ChannelOrder] = {}
    for name, group in groups.items():
        module = model.get_submodule(name)
        assert isinstance(module, MicroMixLinear), f"{name} is packed"
        module.order = first.setdefault(group, module.order)


def _describe(model: nn.Module, config: MicroMixConfig, linears: dict[str, dict[str, Any]]) -> None:
    """Leave what a loader needs in a Hugging Face model's config."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        fields = {"quant_method": QUANT_METHOD, "schema_version": SCHEMA_VERSION, "config": config.to_dict()}
        model.config.quantization_config = {**fields, "linears": linears}  # type: ignore[union-attr]


def is_linear_module(module: nn.Module) -> bool:
    """nn.Linear, or of Hugging Face's the Conv1D of GPT-2, whose weight is (C, N), or Falcon's linear."""
    named = type(module).__name__ in ("Conv1D", "FalconLinear")
    return type(module) is nn.Linear or (named and isinstance(getattr(module, "weight", None), nn.Parameter))

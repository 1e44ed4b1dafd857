"""How vLLM's linears hold packed weights and multiply with them.

vLLM merges linears that read one activation (q, k and v; gate and up). Parts of one group have one order and one split:
they become one packed linear. Parts of other groups become packed linears beside it, and each keeps what the checkpoint
says of it.
"""

from __future__ import annotations

import dataclasses
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.linear import LinearMethodBase, register_weight_loader_v2_supported_method

from micromix_compile import ops
from micromix_compile.integrations.vllm.parameters import FIELDS, OrderParameter, PackedParameter, Run
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.numerics.layout import padded_channels, split_of_weight, weights_are_fp4
from micromix_compile.numerics.shards import Cut, check_ranks
from micromix_compile.ops import prepared
from micromix_compile.recipe.orders import shards_of
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import Split


@register_weight_loader_v2_supported_method
class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """The linear method of one of vLLM's layers.

    parts: what the checkpoint says of each linear that the layer is made of, by name, in the layer's order.
    """

    def __init__(self, parts: Mapping[str, dict[str, Any]], config: MicroMixConfig) -> None:
        self._parts = parts
        self._config = config

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Give the layer empty packed linears, and parameters by whose names vLLM loads them.

        Raises ValueError, which names the linear, if it is not of the layer's sizes, or can't be cut for its ranks.
        """
        ranks = input_size // input_size_per_partition
        rank = layer.tp_rank if ranks > 1 else 0
        runs: list[Run] = []
        parts = zip(self._parts.items(), self._sizes(output_partition_sizes), strict=True)
        for _, members in groupby(parts, key=lambda part: _kind(part[0][1])):
            rows = {}
            for (name, described), size in members:
                cut = cut_of(name, described, self._config, input_size, rank, ranks)
                rows[name] = size
            linear = self._linear(described, cut, sum(rows.values()), params_dtype)
            runs.append(Run(runs[-1].stop if runs else 0, rows, cut, linear))
        layer.packed_runs = runs
        layer.packed = nn.ModuleList(run.linear for run in runs)
        loader = extra["weight_loader"] if hasattr(layer, "weight_loader_v2") else PackedParameter.load_whole
        for name in FIELDS:
            layer.register_parameter(name, PackedParameter(name, runs, loader))
        layer.order = nn.Module()
        layer.order.register_parameter("channel_perm", OrderParameter(runs))

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError if something of the layer was not in the checkpoint."""
        for run in layer.packed_runs:
            run.finish()
        first = layer.packed[0]
        target = target_of(first.weight_scale.device, exact=self._config.exact)
        folds = target.takes == "folded" and first.weight_dtype == torch.bfloat16
        keep = self._config.keep_expanded
        layer.folded = [_fold(linear, keep_expanded=keep) if folds else None for linear in layer.packed]

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., C) -> (..., N) of this rank, plus the bias (N,)."""
        rows = x.reshape(-1, x.shape[-1])
        sizes = [linear.out_features for linear in layer.packed]
        biases: Sequence[Tensor | None] = [None] * len(sizes) if bias is None else bias.split(sizes)
        parts = zip(layer.packed, layer.folded, biases, strict=True)
        outputs = [_multiply(linear, folded, rows, one) for linear, folded, one in parts]
        out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return out.reshape(*x.shape[:-1], sum(sizes))

    def _sizes(self, output_partition_sizes: list[int]) -> list[int]:
        """Rows of each part on this rank; a part that is merged in the checkpoint, too, takes all."""
        if len(self._parts) == 1:
            return [sum(output_partition_sizes)]
        if len(self._parts) != len(output_partition_sizes):
            raise ValueError(
                f"vLLM cuts a layer into {len(output_partition_sizes)} parts that the checkpoint has as "
                f"{', '.join(self._parts)}"
            )
        return output_partition_sizes

    def _linear(self, described: dict[str, Any], cut: Cut, rows: int, dtype: torch.dtype) -> MicroMixLinear:
        """An empty packed linear of this rank."""
        config = self._config
        if "scale_rounding" in described:
            config = dataclasses.replace(config, scale_rounding=described["scale_rounding"])
        return MicroMixLinear(
            in_features=described["in_features"] // cut.ranks,
            out_features=rows,
            split=cut.split,
            rotated=cut.rotated(described.get("rotated", 0)),
            config=config,
            bias=None,
            dtype=dtype,
        )


def cut_of(
    name: str, described: Mapping[str, Any], config: MicroMixConfig, channels: int, rank: int, ranks: int
) -> Cut:
    """What a rank takes of the channels of a packed weight.

    Raises ValueError, which names it, if it has not so many `channels`, or is not ordered for so many ranks.
    """
    if described["in_features"] != channels:
        raise ValueError(f"{name} has {described['in_features']} input channels, vLLM's layer {channels}")
    split: Split = tuple(described["split"])
    if sum(split) != padded_channels(channels):
        raise ValueError(f"{name}: split must sum to {padded_channels(channels)} channels, got {list(split)}")
    shards = shards_of(described, split, name) or (split,)
    check_ranks(len(shards), ranks, name)
    return Cut(shards, rank, ranks, w_fp4=config.weights == "mxfp4")


def _kind(described: Mapping[str, Any]) -> tuple[Any, ...]:
    """What parts have in common that are one packed linear."""
    return tuple(described.get(name) for name in ("group", "split", "shards", "rotated", "scale_rounding"))


def _weight(linear: MicroMixLinear) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return linear.weight_q4, linear.weight_q6, linear.weight_q8, linear.weight_scale


def _multiply(linear: MicroMixLinear, folded: _Folded | None, x: Tensor, bias: Tensor | None) -> Tensor:
    """(M, C) -> (M, N), by the exact operations or the folded ones."""
    if folded is not None:
        return _folded_product(linear, folded, x, bias)
    quantized = ops.reorder_quantize(x, linear.order.channel_perm, *linear.layout)
    return ops.mixed_mx_mm(*quantized, *_weight(linear), bias, linear.layout.fp6, x.dtype)


class _Folded(NamedTuple):
    """What the folded operations want of a packed linear beside its weight."""

    channel_perm: Tensor
    w_factor: Tensor
    w_row_scale: Tensor
    w_fp4: bool
    expanded: list[Tensor]


def _fold(linear: MicroMixLinear, *, keep_expanded: bool) -> _Folded:
    weight, split = _weight(linear), linear.split
    w_split = split_of_weight(*weight[:3])
    factor, row_scale = prepared.folded_factors(*weight, fp6=linear.layout.fp6)
    (order,) = prepared.short_order(linear.order.channel_perm)
    expanded = list(prepared.expanded_weight(*weight, fp6=linear.layout.fp6)) if keep_expanded else []
    return _Folded(order, factor, row_scale, weights_are_fp4(split, w_split), expanded)


def _folded_product(linear: MicroMixLinear, folded: _Folded, x: Tensor, bias: Tensor | None) -> Tensor:
    w4, w6, w8, _ = _weight(linear)
    quantized = ops.reorder_fold(x, folded.channel_perm, *linear.layout, folded.w_fp4)
    weight = ([w4], [w6], [w8], [folded.w_factor], [folded.w_row_scale])
    biases = [] if bias is None else [bias]
    (out,) = ops.folded_mm(*quantized, *weight, biases, folded.expanded, linear.layout.fp6, x.dtype)
    return out

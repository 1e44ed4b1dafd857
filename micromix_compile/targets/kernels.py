"""Who computes the operations: what each target's kernels are asked, and plain PyTorch, which serves every device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from micromix_compile.numerics import folding, grouped, kv_cache, producers, reference
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.layout import split_of_weight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.numerics.layout import PackedWeight, Split
    from micromix_compile.numerics.reference import QuantizedActivation
    from micromix_compile.targets.folded_tiles import FoldedTiles
    from micromix_compile.targets.tiles import MixedTiles


class FoldedWeight(NamedTuple):
    """A packed weight with its factors and row scales (see `folding`), and the bias or None.

    Those of experts have one more dimension in front.
    """

    w4: Tensor
    w6: Tensor
    w8: Tensor
    factor: Tensor
    row_scale: Tensor
    bias: Tensor | None = None

    @property
    def split(self) -> Split:
        """(k4, k6, k8) of the weight."""
        return split_of_weight(self.w4, self.w6, self.w8)

    def contiguous(self) -> FoldedWeight:
        """The same with every part row after row in memory."""
        bias = None if self.bias is None else self.bias.contiguous()
        w4, w6, w8, factor, row_scale = (part.contiguous() for part in self[:5])
        return FoldedWeight(w4, w6, w8, factor, row_scale, bias)


def columns_of(weights: Sequence[FoldedWeight]) -> list[int]:
    """N of each."""
    return [weight.row_scale.shape[0] for weight in weights]


class Residual(NamedTuple):
    """What is added to x in front of an RMSNorm, and where the sum goes: both (M, C) of x's dtype. total: contiguous.

    Kernels want the columns of the addend side by side, too.
    """

    addend: Tensor
    total: Tensor


class ExactKernels(Protocol):
    """The operations of `ops.exact`. Both raise TypeError or ValueError for arguments that they don't take."""

    @property
    def tiles(self) -> MixedTiles | None:
        """Of the Triton kernels that lowerings make a part of graphs; None where operations stay calls."""

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, activations: str = "same", rotated: int = 0,
    ) -> QuantizedActivation:  # fmt: skip
        """`reference.reorder_quantize` of `producers.produce(producer, x, other, eps)`."""

    def multiply(
        self, x: QuantizedActivation, w: PackedWeight, bias: Tensor | None, fp6: str, out_dtype: torch.dtype
    ) -> Tensor:
        """`reference.mixed_mx_mm`."""


class FoldedKernels(Protocol):
    """The operations of `ops.folded`. `quantize` raises TypeError or ValueError for what it does not take."""

    @property
    def tiles(self) -> FoldedTiles | None:
        """As of `ExactKernels`."""

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, w_fp4: bool, residual: Residual | None, activations: str = "same", rotated: int = 0,
    ) -> FoldedActivation:  # fmt: skip
        """What `ExactKernels.quantize` returns, folded by `folding`. Adds the residual to x before all else."""

    def multiply(
        self, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, out_dtype: torch.dtype, *,
        expanded: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """`folding.folded_mm` with weights that are packed: (M, N) of each. expanded: `expand` of each, or none."""

    def expand(self, weight: FoldedWeight, fp6: str) -> Tensor:
        """`folding.fold_weight`: (N, `folding.fold_width`) uint8."""

    def multiply_again(
        self, x: FoldedActivation, parts: Sequence[Tensor], fp6: str, out_dtype: torch.dtype, *, has_expanded: bool
    ) -> list[Tensor] | None:
        """The same of operands whose shapes and places in memory `multiply` met before, unchecked; None of others.

        parts: all w4 of the weights, then all w6, and so on, as the fields of `FoldedWeight`. has_expanded: whether
        `multiply` would get the weights expanded, too.
        """


class GroupedKernels(Protocol):
    """The operations of `ops.grouped`. All raise TypeError or ValueError for arguments that they don't take."""

    def multiply(
        self, x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, fp6: str,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """`grouped.grouped_mx_mm`."""

    def multiply_folded(
        self, q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w: FoldedWeight, fp6: str,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """`grouped.grouped_folded_mm`."""

    def weighted_sum(self, rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
        """`grouped.weighted_sum`."""


class CacheKernels(Protocol):
    """The operation of `ops.kv_cache`. Raises TypeError or ValueError for arguments that it does not take."""

    def write(
        self, key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
        scale_rounding: str,
    ) -> None:  # fmt: skip
        """`kv_cache.write_kv`."""


class PlainExact:
    """The reference itself."""

    tiles: MixedTiles | None = None

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, activations: str = "same", rotated: int = 0,
    ) -> QuantizedActivation:  # fmt: skip
        """See `ExactKernels`."""
        producers.check_produce(producer, x, other)
        rows, rounding = producers.produce(producer, x, other, eps), ScaleRounding(scale_rounding)
        return reference.reorder_quantize(
            rows, channel_perm, split, fp6=fp6, scale_rounding=rounding, activations=activations, rotated=rotated
        )

    def multiply(
        self, x: QuantizedActivation, w: PackedWeight, bias: Tensor | None, fp6: str, out_dtype: torch.dtype
    ) -> Tensor:
        """See `ExactKernels`."""
        return reference.mixed_mx_mm(x, *w, bias, fp6=fp6, out_dtype=out_dtype)


class PlainFolded:
    """What `folding` says, for weights that are packed."""

    tiles: FoldedTiles | None = None

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, w_fp4: bool, residual: Residual | None, activations: str = "same", rotated: int = 0,
    ) -> FoldedActivation:  # fmt: skip
        """See `FoldedKernels`."""
        if residual is not None:
            x = residual.total.copy_(x + residual.addend)
        producers.check_produce(producer, x, other)
        rows, rounding = producers.produce(producer, x, other, eps), ScaleRounding(scale_rounding)
        quantized = reference.reorder_quantize(
            rows, channel_perm, split, fp6=fp6, scale_rounding=rounding, activations=activations, rotated=rotated
        )
        if activations == "fp8":
            return folding.fold_rows(quantized.q8, reference.row_scale_byte(rows, rounding), split, w_fp4=w_fp4)
        amax = rows.abs().amax(1).float() if rows.shape[1] else rows.new_zeros(rows.shape[0], dtype=torch.float32)
        return folding.fold_activation(quantized, amax, w_fp4=w_fp4, w_split=split)

    def multiply(
        self, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, out_dtype: torch.dtype, *,
        expanded: Sequence[Tensor] = (),
    ) -> list[Tensor]:  # fmt: skip
        """See `FoldedKernels`."""
        folded = expanded or [self.expand(weight, fp6) for weight in weights]
        operands = [(w, weight.row_scale) for w, weight in zip(folded, weights, strict=True)]
        return folding.folded_mm(x.q, x.row_scale, operands, [w.bias for w in weights], out_dtype)

    def expand(self, weight: FoldedWeight, fp6: str) -> Tensor:
        """See `FoldedKernels`."""
        return folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, fp6)

    def multiply_again(
        self, x: FoldedActivation, parts: Sequence[Tensor], fp6: str, out_dtype: torch.dtype, *, has_expanded: bool
    ) -> list[Tensor] | None:
        """See `FoldedKernels`: nothing is kept."""
        return None


class PlainGrouped:
    """What `grouped` says. Waits for the device, to read how many rows each expert has."""

    def multiply(
        self, x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, fp6: str,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """See `GroupedKernels`."""
        return grouped.grouped_mx_mm(x, rows, offs, w, bias, fp6=fp6, out_dtype=out_dtype)

    def multiply_folded(
        self, q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w: FoldedWeight, fp6: str,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """See `GroupedKernels`."""
        return grouped.grouped_folded_mm(q, row_scale, rows, offs, *w, fp6=fp6, out_dtype=out_dtype)

    def weighted_sum(self, rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
        """See `GroupedKernels`."""
        return grouped.weighted_sum(rows, weights, place, out_dtype)


class PlainCache:
    """What `kv_cache` says. Waits for the device, to read the positions."""

    def write(
        self, key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
        scale_rounding: str,
    ) -> None:  # fmt: skip
        """See `CacheKernels`."""
        kv_cache.write_kv(key, value, position, k_q, k_scale, v_q, v_scale, scale_rounding)


PLAIN_CACHE: Final = PlainCache()
PLAIN_EXACT: Final = PlainExact()
PLAIN_FOLDED: Final = PlainFolded()
PLAIN_GROUPED: Final = PlainGrouped()

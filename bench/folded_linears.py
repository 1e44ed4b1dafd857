"""Our folded kernels as the benchmarks call them: quantizers, products of packed weights, weights to multiply by."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from linear_cases import BF16, CUDA, FP6

from micromix_compile.numerics import folding, packing, reference
from micromix_compile.targets.expansion import ExpandedWeights, expand_weights, library_mm
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight, Residual, columns_of
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linear_cases import Mode
    from torch import Tensor

    from micromix_compile.numerics.layout import Split


@cache
def kernels() -> TritonFolded:
    """The folded ones of this GPU."""
    found = target_of(CUDA).folded
    if not isinstance(found, TritonFolded):
        raise SystemExit("this benchmark needs a GPU of sm_90")
    return found


def folded_product(x: folding.FoldedActivation, weights: Sequence[FoldedWeight]) -> list[Tensor]:
    """Ours as compiled for this number of rows: the library multiplies what is expanded together, then side by side."""
    if not kernels().tiles.uses_library(x.q.shape[0], weights, BF16):
        return kernels().multiply(x, weights, fp6=FP6, out_dtype=BF16)
    products = []
    for run in kernels().tiles.expansion_runs(columns_of(weights), x.q.shape[1]):
        expanded = ExpandedWeights.empty(weights[run], x.q)
        expand_weights(weights[run], expanded, fp6=FP6)
        products.append(library_mm(x, expanded, BF16))
    return products


def expand(weights: Sequence[FoldedWeight], runs: Sequence[slice], rooms: Sequence[ExpandedWeights]) -> None:
    """As many launches as a call makes."""
    for run, room in zip(runs, rooms, strict=True):
        expand_weights(weights[run], room, fp6=FP6)


def fold_rows(
    x: Tensor, perm: Tensor, split: Split, scale_rounding: str, mode: Mode, *, producer: str = "none",
    other: Tensor | None = None, residual: Residual | None = None, products: Sequence[Sequence[int]] = (),
) -> folding.FoldedActivation:  # fmt: skip
    """Our quantizer."""
    return kernels().quantize(
        producer, x, other, 1e-5, perm, split, FP6, scale_rounding, w_fp4=False, residual=residual, products=products,
        activations=mode.activations, rotated=mode.rotated(split),
    )  # fmt: skip


def folded_weight(columns: int, split: Split) -> FoldedWeight:
    """A random weight, packed, with its factors."""
    w = torch.randn(columns, sum(split), device=CUDA, dtype=BF16)
    quantized = reference.reorder_quantize(w, torch.arange(sum(split), device=CUDA), split, fp6=FP6)
    packed = (quantized.q4, packing.pack_fp6(quantized.q6, FP6), quantized.q8)
    row_scale = folding.weight_row_scale(*packed, quantized.scale, FP6)
    factor = folding.weight_factor(*packed, quantized.scale, row_scale)
    return FoldedWeight(*packed, factor, row_scale, torch.randn(columns, device=CUDA, dtype=BF16))

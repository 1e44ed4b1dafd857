"""Weights expanded to folded E4M3 in memory, once a call, for products of many rows, which are the library's."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.operators import scaled_mm
from micromix_compile.numerics.folding import FoldedActivation, fold_width
from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets.groups import group_args
from micromix_compile.targets.kernels import columns_of
from micromix_compile.targets.launch import KernelCall

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.targets.kernels import FoldedWeight


class ExpandedWeights(NamedTuple):
    """Weights below each other. w: (N, `folding.fold_width`) uint8. row_scale: (N,) float32. bias: (N,) or None."""

    w: Tensor
    row_scale: Tensor
    bias: Tensor | None

    @classmethod
    def empty(cls, weights: Sequence[FoldedWeight], like: Tensor) -> ExpandedWeights:
        """Room for `weights`. like: a tensor of the device."""
        n, bias = sum(columns_of(weights)), weights[0].bias
        return cls(
            like.new_empty((n, fold_width(weights[0].split, w_fp4=False)), dtype=torch.uint8),
            like.new_empty(n, dtype=torch.float32),
            None if bias is None else like.new_empty(n, dtype=bias.dtype),
        )

    def split(self, columns: Sequence[int]) -> list[ExpandedWeights]:
        """Each for itself, in the same memory."""
        biases = [None] * len(columns) if self.bias is None else self.bias.split(list(columns))
        parts = zip(self.w.split(list(columns)), self.row_scale.split(list(columns)), biases, strict=True)
        return [ExpandedWeights(*part) for part in parts]


def expand_weights(weights: Sequence[FoldedWeight], out: ExpandedWeights, *, fp6: str) -> None:
    """Fill `out` with `folding.fold_weight` of each weight, with its scales and biases, in one launch."""
    if len(out.w):
        expand_call(weights, out, fp6=fp6).launch_on(out.w)


def expand_call(
    weights: Sequence[FoldedWeight], out: ExpandedWeights, *, fp6: str, block_n: int = 4, step: int = 32,
    num_warps: int = 2,
) -> KernelCall:  # fmt: skip
    """The launch of `expand_weights`: `step` blocks of `block_n` rows a program."""
    from micromix_compile.templates.triton.expand_weights import expand_weights_kernel

    tiles = sum(-(-n // block_n) for n in columns_of(weights))
    steps = sum(-(-blocks // step) for blocks in block_counts(weights[0].split))
    return KernelCall(
        kernel=expand_weights_kernel,
        grid=(tiles, max(steps, 1)),
        args={**group_args(weights, block_n), "out": out.w, "row_scale": out.row_scale, "bias": out.bias},
        constexprs={
            "FP6": fp6,
            "GROUPS": len(weights),
            "HAS_BIAS": weights[0].bias is not None,
            "BLOCK_N": block_n,
            "STEP": step,
            "LAUNCH_PDL": True,
        },
        num_warps=num_warps,
    )


def library_mm(x: FoldedActivation, w: ExpandedWeights, out_dtype: torch.dtype) -> Tensor:
    """The library's FP8 product with expanded weights: (M, N)."""
    e4m3 = torch.float8_e4m3fn
    out = scaled_mm(
        x.q.view(e4m3), w.w.view(e4m3).T, scale_a=x.row_scale[:, None], scale_b=w.row_scale[None], bias=w.bias,
        out_dtype=out_dtype, use_fast_accum=True,
    )  # fmt: skip
    assert isinstance(out, Tensor), "one product has one result"
    return out

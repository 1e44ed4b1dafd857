"""Folding: MX operands as plain E4M3 with one power of two a row, for FP8 MMA that takes no block scales (sm_90).

A block's values are element * 2**e. Relative to a power of two of the whole row they are element * 2**(e - r), and that
is an E4M3 value again, exactly, as long as it lies in E4M3's range: E2M1 for e - r from -8 to 6, E2M3 from -6 to 5, E3M2
from -5 to 4. r is such that the row's largest value comes out between 192 and 448. What is exact and what is not:

  activations  rounded to E4M3: an error of at most 2**-10 where E4M3 is subnormal, that is at most 2**-17 of the row's
               largest value, and none elsewhere but in MXFP8 blocks below the row's top, whose elements may fall there
  weights      the same, but MXFP4 blocks with e - r < -5 count as -5, and MXFP8 blocks with e - r < -14 as zero: errors
               below 2**-9 of the row's largest value

This module says what folded operands are, in plain PyTorch. `templates.reorder_fold` and `templates.fold` compute the
same bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from micromix_compile import reference
from micromix_compile.formats import BLOCK_SIZE, E8M0_NAN

if TYPE_CHECKING:
    from micromix_compile.recipe import Split
    from micromix_compile.reference import QuantizedActivation

LOCKS: Final = 1024
"""Counters that a product may use to add up parts of K: zeros before and after it."""

LARGEST: Final = 448.0

MIN_FP4_EXPONENT: Final = -5
"""Of an MXFP4 weight's block relative to its row: the least for which every code is an E4M3 normal number."""

MIN_FP8_EXPONENT: Final = -14
"""Of an MXFP8 weight's block relative to its row: the least power of two that is a float16 normal number."""

# The largest exponent of a block's scale byte (MXFP6 as E4M3 bytes) relative to the row: 6 * 2**6, 7.5 * 2**(11 - 6),
# 28 * 2**(8 + 4) / 2**8 and 448 are the largest values up to 448.
_TOP: Final = {"e2m1": 6, "e2m3": 11, "e3m2": 8, "e4m3": 0}


class FoldedActivation(NamedTuple):
    """q: (M, K) float8_e4m3fn, channels in the order of `fold_order`. row_scale: (M,) float32. locks: (LOCKS,) int32."""

    q: Tensor
    row_scale: Tensor
    locks: Tensor


def fold_order(split: Split, *, w_fp4: bool) -> Tensor:
    """Positions in the sorted order of what a folded operand holds, from left to right: (K,) int64.

    It is the order in which packed weights unpack by words: of each 8 channels of MXFP4 first all first halves, then
    all second halves; of each 32 of MXFP6 the 8 of plane 0 in all blocks, then plane 1, and so on. w_fp4: all weights
    are MXFP4, whatever the activations' formats.
    """
    k4, k6, k8 = (sum(split), 0, 0) if w_fp4 else split
    halves = torch.arange(k4).reshape(-1, 4, 2, 4).permute(2, 0, 1, 3).flatten()
    planes = torch.arange(k4, k4 + k6).reshape(-1, 4, BLOCK_SIZE // 4).permute(1, 0, 2).flatten()
    return torch.cat((halves, planes, torch.arange(k4 + k6, k4 + k6 + k8)))


def fold_activation(x: QuantizedActivation, amax: Tensor, *, w_fp4: bool) -> FoldedActivation:
    """Fold what `reference.reorder_quantize` returned. amax: (M,) float32, largest magnitude of each unquantized row.

    The scale of a row with a NaN or an infinity is NaN.
    """
    bits = amax.to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x400000).int()).clamp(min=1)
    row_scale = torch.where(bits >= 0x7F800000, torch.nan, (exponent << 23).view(torch.float32))
    split = (2 * x.q4.shape[1], x.q6.shape[1], x.q8.shape[1])
    values = reference.dequantize_activation(*x)[:, fold_order(split, w_fp4=w_fp4).to(x.q4.device)]
    return FoldedActivation(_to_e4m3(values, row_scale), row_scale, _no_locks(amax.device))


def weight_row_scale(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, fp6: str) -> Tensor:
    """2**r of each row of a packed weight: (N,) float32, NaN where a block is."""
    blocks = [2 * w4.shape[1] // BLOCK_SIZE, 4 * w6.shape[2] // BLOCK_SIZE, w8.shape[1] // BLOCK_SIZE]
    exponent = torch.ones(w_scale.shape[0], dtype=torch.int32, device=w_scale.device)
    for part, fmt in zip(w_scale.to(torch.int32).split(blocks, 1), ("e2m1", fp6, "e4m3"), strict=True):
        if part.shape[1]:
            exponent = torch.maximum(exponent, part.amax(1) - _TOP[fmt])
    poisoned = (w_scale == E8M0_NAN).any(1)
    return torch.where(poisoned, torch.nan, (exponent << 23).view(torch.float32))


def fold_weight(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, row_scale: Tensor, fp6: str) -> Tensor:
    """A packed weight folded by `row_scale` (from `weight_row_scale`): (N, K) float8_e4m3fn, order of `fold_order`."""
    split = (2 * w4.shape[1], 4 * w6.shape[2], w8.shape[1])
    scale4, scale6, scale8 = w_scale.split([k // BLOCK_SIZE for k in split], 1)
    row_exponent = (row_scale.view(torch.int32) >> 23)[:, None]
    scale4 = torch.maximum(scale4.to(torch.int32), row_exponent + MIN_FP4_EXPONENT).clamp(0, 254).to(torch.uint8)
    kept = (scale8.to(torch.int32) >= row_exponent + MIN_FP8_EXPONENT).repeat_interleave(BLOCK_SIZE, 1)
    w8 = torch.where(kept, w8, 0)
    values = reference.dequantize_weight(w4, w6, w8, torch.cat((scale4, scale6, scale8), 1), fp6)
    return _to_e4m3(values[:, fold_order(split, w_fp4=False).to(w4.device)], row_scale)


def folded_mm(
    x: FoldedActivation, weights: list[tuple[Tensor, Tensor]], biases: list[Tensor | None], out_dtype: torch.dtype
) -> Tensor:
    """Products with folded weights (w, row_scale), side by side: (M, sum of N), float32 inside, rounded once."""
    columns = []
    for (w, row_scale), bias in zip(weights, biases, strict=True):
        out = (x.q.to(torch.float32) @ w.to(torch.float32).T) * row_scale * x.row_scale[:, None]
        columns.append(out if bias is None else out + bias.to(torch.float32))
    return torch.cat(columns, 1).to(out_dtype)


def _to_e4m3(values: Tensor, row_scale: Tensor) -> Tensor:
    """Values / row_scale rounded to E4M3; zeros in rows whose scale is NaN."""
    folded = (values / row_scale[:, None]).clamp(-LARGEST, LARGEST)
    return torch.where(row_scale.isnan()[:, None], 0.0, folded).to(torch.float8_e4m3fn)


def _no_locks(device: torch.device) -> Tensor:
    return torch.zeros(LOCKS, dtype=torch.int32, device=device)


"""Folding: MX operands with one power of two a row, for GPUs whose matrix instructions take no block scales (sm_90).

A block's values are element * 2**e. Relative to a power of two of the whole row they are element * 2**(e - r), and
that is an E4M3 value again, exactly, as long as it lies in E4M3's range: E2M1 for e - r from -8 to 6, E2M3 from -6 to
5, E3M2 from -5 to 4. r is such that the row's largest value comes out between 192 and 384 in activations, and in
weights, where the scales alone decide, between 120 and 448.

Activations are folded to E4M3. What falls where E4M3 is subnormal is rounded, by at most 2**-10, that is 2**-17 of
the row's largest value; all else is exact. Packed weights stay as they are in memory; a factor a block stands in for
its scale, and kernels fold while they unpack, with the same rounding, but MXFP4 blocks with e - r < -5 count as -5 and
MXFP8 blocks with e - r < -16 as zero: errors below 2**-9 of the row's largest value. A zero has no sign, but may have
one where a negative value was rounded to it.

This module says what folded operands are, in plain PyTorch. The kernels of `templates.triton.reorder_fold` and
`templates.triton.fold` compute the same.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.formats import (
    BLOCK_SIZE,
    E8M0_BIAS,
    E8M0_NAN,
    MEMORY_FORMATS,
    ElemFormat,
    elem_format,
    segment_formats,
)
from micromix_compile.numerics.layout import (
    block_counts,
    split_of_activation,
    split_of_weight,
    split_scale,
    weight_split,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.layout import Split
    from micromix_compile.numerics.reference import QuantizedActivation

LOCKS: Final = 1024
"""Counters that a product may use to add up parts of K: zeros before and after it."""

LARGEST: Final = 448.0

FACTOR_WORD: Final = 4
"""Blocks whose factors lie side by side. Words of one place in all rows do, too: kernels read many rows' at once."""

_PAIR: Final = 2 * BLOCK_SIZE

_LINE: Final = 128
"""Bytes that longer rows are a multiple of. The library's FP8 product of 2048 x 14336 x 4096 on an H100: 165 us, with
rows of 4128 bytes 192, of 4224 174."""

MIN_FP4_EXPONENT: Final = -5
"""Of an MXFP4 weight's block relative to its row: the least at which every code is an E4M3 normal number."""


class FoldedActivation(NamedTuple):
    """q: (M, `fold_width`) uint8, E4M3 bytes in `fold_order`. row_scale: (M,) float32. locks: (LOCKS,) int32 zeros."""

    q: Tensor
    row_scale: Tensor
    locks: Tensor


def factor_shape(rows: int, split: Split) -> tuple[int, int, int]:
    """Of the factors of a weight with this many rows and this split."""
    return sum(_words(split)), rows, FACTOR_WORD


def _words(split: Split) -> list[int]:
    """Words of factors that each segment of a row takes."""
    return [-(-blocks // FACTOR_WORD) for blocks in block_counts(split)]


def fold_width(split: Split, *, w_fp4: bool) -> int:
    """Bytes of a row in `fold_order`: K, but more where the order has an odd number of blocks of MXFP6."""
    if w_fp4 or split[1] % _PAIR == 0:
        return sum(split)
    return -(-(sum(split) + BLOCK_SIZE) // _LINE) * _LINE


def fold_order(split: Split, *, w_fp4: bool) -> Tensor:
    """Positions in the sorted order of what a folded operand holds, from left to right: (`fold_width`,) int64.

    It is the order in which FP8 MMA can take packed weights from the registers in which their words unpack, for it
    wants two words of each 32 bytes of a row in one thread, 16 bytes apart. A block of MXFP4 has first the first four
    of each 8 channels, then the others. Two blocks of MXFP6 have the 8 channels of plane 0 of both, then plane 1, and
    so on. Behind an odd number of blocks the second's are -1, which stands for zeros, and so is what then fills the row
    up to `fold_width`. w_fp4: all weights are MXFP4, whatever the activations' formats.
    """
    k4, k6, k8 = weight_split(split, "mxfp4") if w_fp4 else split
    halves = torch.arange(k4, device="cpu").reshape(-1, 4, 2, 4).transpose(1, 2).flatten()
    planes = torch.nn.functional.pad(torch.arange(k4, k4 + k6, device="cpu"), (0, k6 % _PAIR), value=-1)
    planes = planes.reshape(-1, 2, 4, BLOCK_SIZE // 4).transpose(1, 2).flatten()
    order = torch.cat((halves, planes, torch.arange(k4 + k6, k4 + k6 + k8, device="cpu")))
    return torch.nn.functional.pad(order, (0, fold_width(split, w_fp4=w_fp4) - len(order)), value=-1)


def _ordered(values: Tensor, split: Split, *, w_fp4: bool) -> Tensor:
    """Columns in the sorted order -> in `fold_order`; -1 is the zero behind the last."""
    return torch.nn.functional.pad(values, (0, 1))[:, fold_order(split, w_fp4=w_fp4).to(values.device)]


def fold_activation(
    x: QuantizedActivation, amax: Tensor, *, w_fp4: bool, w_split: Split | None = None
) -> FoldedActivation:
    """Fold what `reference.reorder_quantize` returned. amax: (M,) float32, largest magnitude of each unquantized row.

    w_fp4: as in `fold_order`. w_split: of the weights, where activations are not split like them. The scale of a row
    with a NaN or an infinity is NaN.
    """
    bits = amax.to(torch.float32).view(torch.int32) & 0x7FFFFFFF
    exponent = ((bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x400000).int()).clamp(min=1)
    row_scale = torch.where(bits >= 0x7F800000, torch.nan, (exponent << 23).view(torch.float32))
    split = w_split or split_of_activation(x.q4, x.q6, x.q8)
    # Relative to the row: a value near the top of float32's range may round to one above it.
    relative = reference.scale_value((x.scale.to(torch.int32) - exponent[:, None] + E8M0_BIAS).clamp(0, E8M0_NAN - 1))
    elements = reference.dequantize_activation(x.q4, x.q6, x.q8, torch.full_like(x.scale, E8M0_BIAS))
    values = elements * relative.repeat_interleave(BLOCK_SIZE, 1) + 0.0  # a zero has no sign
    folded = _ordered(values, split, w_fp4=w_fp4)
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=amax.device)
    return FoldedActivation(_to_e4m3(folded, row_scale), row_scale, locks)


def fold_rows(q8: Tensor, byte: Tensor, w_split: Split, *, w_fp4: bool) -> FoldedActivation:
    """What has one scale a row already, in the order in which it meets the weights; exact.

    q8: (M, K) E4M3 bytes of `reference.reorder_quantize` with activations "fp8". byte: (M,) int32 of
    `reference.row_scale_byte`; w_split, w_fp4: as in `fold_activation`.
    """
    locks = torch.zeros(LOCKS, dtype=torch.int32, device=q8.device)
    return FoldedActivation(_ordered(q8, w_split, w_fp4=w_fp4), reference.scale_value(byte), locks)


def weight_row_scale(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, fp6: str) -> Tensor:
    """2**r of each row of a packed weight: (N,) float32, NaN where a block is."""
    exponent = torch.ones(w_scale.shape[0], dtype=torch.int32, device=w_scale.device)
    for part, name in zip(_segments(w_scale, w4, w6, w8), segment_formats(fp6), strict=True):
        if part.shape[1]:
            exponent = torch.maximum(exponent, part.to(torch.int32).amax(1) - _top(elem_format(name)))
    poisoned = (w_scale == E8M0_NAN).any(1)
    return torch.where(poisoned, torch.nan, (exponent << 23).view(torch.float32))


def _top(fmt: ElemFormat) -> int:
    """The largest exponent of a block's scale byte relative to the row, at which no value is more than `LARGEST`."""
    baked = 0 if fmt.in_memory == fmt.name else fmt.e4m3_shift or 0
    return math.frexp(LARGEST / fmt.max_value)[1] - 1 + baked


def weight_factor(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, row_scale: Tensor) -> Tensor:
    """The factors of a packed weight's blocks: uint8 of `factor_shape`, each segment padded to whole words with zeros.

    MXFP4: eight times the exponent relative to the row, e - r, and to -5. MXFP6 (as E4M3 bytes) and MXFP8: the upper
    byte of 2**(e - r) in float16, zero for less than 2**-16. row_scale: of `weight_row_scale`.
    """
    row_exponent = (row_scale.view(torch.int32) >> 23)[:, None]
    exponents = [part.to(torch.int32) - row_exponent for part in _segments(w_scale, w4, w6, w8)]
    factors = [(exponents[0] - MIN_FP4_EXPONENT).clamp(0, 11) << 3]
    for exponent in exponents[1:]:
        subnormal = torch.where(exponent == -15, 2, torch.where(exponent == -16, 1, 0))
        factors.append(torch.where(exponent >= -14, (exponent.clamp(max=15) + 15) << 2, subnormal))
    padded = [torch.nn.functional.pad(factor, (0, -factor.shape[1] % FACTOR_WORD)) for factor in factors]
    by_row = torch.cat(padded, 1).to(torch.uint8)
    return by_row.view(len(by_row), by_row.shape[1] // FACTOR_WORD, FACTOR_WORD).transpose(0, 1).contiguous()


def fold_weight(w4: Tensor, w6: Tensor, w8: Tensor, factor: Tensor, fp6: str) -> Tensor:
    """A packed weight folded: (N, `fold_width`) uint8, E4M3 bytes in `fold_order`. factor: from `weight_factor`."""
    split = split_of_weight(w4, w6, w8)
    codes = (packing.unpack_fp4(w4), packing.unpack_fp6(w6, fp6), w8)
    segments = zip(factor.split(_words(split)), block_counts(split), codes, MEMORY_FORMATS, _FACTOR_VALUES, strict=True)
    values = []
    for part, blocks, code, fmt, factor_value in segments:
        scale = factor_value(part.transpose(0, 1).flatten(1)[:, :blocks].to(torch.int16))
        values.append(reference.decode(code, elem_format(fmt)) * scale.repeat_interleave(BLOCK_SIZE, 1))
    ordered = _ordered(torch.cat(values, 1), split, w_fp4=False)
    return ordered.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)


def _exponent_value(factor: Tensor) -> Tensor:
    """What a factor of an MXFP4 block, int16, multiplies by."""
    return reference.scale_value((factor >> 3) + (MIN_FP4_EXPONENT + E8M0_BIAS))


def _half_value(factor: Tensor) -> Tensor:
    """What a factor of any other block, int16, multiplies by."""
    return (factor << 8).view(torch.float16).to(torch.float32)


_FACTOR_VALUES: Final = (_exponent_value, _half_value, _half_value)
"""By segment."""


def _segments(w_scale: Tensor, w4: Tensor, w6: Tensor, w8: Tensor) -> tuple[Tensor, ...]:
    return split_scale(w_scale, split_of_weight(w4, w6, w8))


def folded_mm(
    q: Tensor, row_scale: Tensor, weights: Sequence[tuple[Tensor, Tensor]], biases: Sequence[Tensor | None],
    out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    """Products of a folded activation with folded weights (w, row_scale): (M, N) of each, rounded once."""
    x = q.view(torch.float8_e4m3fn).to(torch.float32)
    outs = []
    for (w, w_row_scale), bias in zip(weights, biases, strict=True):
        out = (x @ w.view(torch.float8_e4m3fn).to(torch.float32).T) * w_row_scale * row_scale[:, None]
        outs.append((out if bias is None else out + bias.to(torch.float32)).to(out_dtype))
    return outs


def _to_e4m3(folded: Tensor, row_scale: Tensor) -> Tensor:
    """Rounded to E4M3 bytes, saturating; zeros in rows whose scale is NaN."""
    finite = torch.where(row_scale.isnan()[:, None], 0.0, folded)
    return finite.clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn).view(torch.uint8)

"""A tile of the folded product for some dozens of rows and more: weights folded to E4M3 in registers, FP8 MMA.

An FP8 MMA of sm_90 adds with about 14 bits (as the library's fast accumulation does).
"""

import triton
import triton.language as tl

from micromix_compile.templates.fold import (
    e4m3_to_float32,
    fold_e4m3,
    fold_factor,
    fold_fp4,
    fold_fp6,
    fold_step,
    spread,
)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FACTOR_PADDING = tl.constexpr(16)  # blocks: the factors of each segment fill whole words


@triton.jit
def _load(rows, column, stop):
    """Bytes at `column` of each row, zeros from `stop` on. rows: (R, 1) pointers. column: (1, C)."""
    return tl.load(rows + column, mask=column < stop, other=0)


@triton.jit
def _dot(w, x, column, stop, acc):
    """acc + w @ x.T, of columns before `stop`. w: (BLOCK_N, C) E4M3 bytes. x: (BLOCK_M, 1) pointers to E4M3 bytes."""
    if _INTERPRETED:
        right = e4m3_to_float32(_load(x, column, stop))
        return tl.dot(e4m3_to_float32(w), tl.trans(right), acc, input_precision="ieee")
    else:
        rows = x.to(tl.pointer_type(tl.float8e4nv))
        right = tl.load(rows + column, mask=column < stop, other=0.0)
        return tl.dot(w.to(tl.float8e4nv, bitcast=True), tl.trans(right), acc)


@triton.jit
def _padded(blocks):
    return tl.cdiv(blocks, FACTOR_PADDING) * FACTOR_PADDING


@triton.jit
def wide_tile(
    x, m, w4, w6, w8, factors, plane, n, blocks4, blocks6, blocks8, part,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """As `narrow_tile`, less both row scales; a step takes BLOCK_K channels."""
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    blocks_of_step = tl.arange(0, STEP)[None, :]
    n = n[:, None]
    x += m[:, None] * ((blocks4 + blocks6 + blocks8) * 32)
    factors += n * (_padded(blocks4) + _padded(blocks6) + _padded(blocks8))
    steps4 = tl.cdiv(blocks4, STEP)
    steps6 = tl.cdiv(blocks6, STEP)
    steps = steps4 + steps6 + tl.cdiv(blocks8, STEP)
    first = part * steps // SPLIT_K
    last = (part + 1) * steps // SPLIT_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    half = blocks4 * 16
    w4 += n * half
    for step in range(first, min(last, steps4)):
        column = step * (STEP * 16) + tl.arange(0, STEP * 16)[None, :]
        factor = fold_step(_load(factors, step * STEP + blocks_of_step, _padded(blocks4)))
        low, high = fold_fp4(_load(w4, column, half), spread(factor, 16))
        acc = _dot(low, x, column, half, acc)
        acc = _dot(high, x + half, column, half, acc)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    width = blocks6 * 8
    w6 += n * width
    x += blocks4 * 32
    factors += _padded(blocks4)
    for step in range(first, min(last, steps6)):
        column = step * (STEP * 8) + tl.arange(0, STEP * 8)[None, :]
        plane0 = _load(w6, column, width)
        plane1 = _load(w6 + plane, column, width)
        plane2 = _load(w6 + 2 * plane, column, width)
        factor = fold_factor(_load(factors, step * STEP + blocks_of_step, _padded(blocks6)))
        w_0, w_1, w_2, w_3 = fold_fp6(plane0, plane1, plane2, spread(factor, 8), FP6)
        acc = _dot(w_0, x, column, width, acc)
        acc = _dot(w_1, x + width, column, width, acc)
        acc = _dot(w_2, x + 2 * width, column, width, acc)
        acc = _dot(w_3, x + 3 * width, column, width, acc)

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    width = blocks8 * 32
    w8 += n * width
    x += blocks6 * 32
    factors += _padded(blocks6)
    for step in range(first, last):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        factor = fold_factor(_load(factors, step * STEP + blocks_of_step, _padded(blocks8)))
        acc = _dot(fold_e4m3(_load(w8, column, width), spread(factor, 32)), x, column, width, acc)
    return acc

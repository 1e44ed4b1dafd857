"""A tile of the folded product for few rows: warps share K, weights are unpacked to float16 in registers.

Each warp takes a stretch of K of its own: the operands have a leading dimension for it, as a batched product has, and
their sums are added at the end. Products of float16 are exact in the float32 accumulator.
"""

import triton
import triton.language as tl

from micromix_compile.templates.fold import (
    e4m3_to_float16,
    e4m3_to_float32,
    fp4_to_float16,
    fp6_to_float16,
    spread,
    x_to_float16,
)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FACTOR_PADDING = tl.constexpr(16)  # blocks: the factors of each segment fill whole words


@triton.jit
def _load(rows, column, stop):
    """Bytes at `column` of each row, zeros from `stop` on. rows: (1, R, 1) pointers. column: (WARPS, 1, C)."""
    return tl.load(rows + column, mask=column < stop, other=0)


@triton.jit
def _load_x(rows, inside, column, stop):
    """As `_load`, of rows that may be outside: bytes of E4M3."""
    return tl.load(rows + column, mask=inside & (column < stop), other=0)


@triton.jit
def _dot(w, x, acc):
    """acc + w @ x.T of each warp. w: (WARPS, BLOCK_N, C), x: (WARPS, BLOCK_M, C), float16."""
    x = tl.permute(x, (0, 2, 1))
    if _INTERPRETED:
        return tl.dot(w.to(tl.float32), x.to(tl.float32), acc, input_precision="ieee")
    else:
        return tl.dot(w, x, acc)


@triton.jit
def _x_plane(byte):
    """E4M3 bytes as float16."""
    if _INTERPRETED:
        return e4m3_to_float32(byte).to(tl.float16)
    else:
        return byte.to(tl.float8e4nv, bitcast=True).to(tl.float16)


@triton.jit
def factor_stride(blocks4, blocks6, blocks8):
    """Bytes of a row of factors."""
    return _padded(blocks4) + _padded(blocks6) + _padded(blocks8)


@triton.jit
def _padded(blocks):
    return tl.cdiv(blocks, FACTOR_PADDING) * FACTOR_PADDING


@triton.jit
def narrow_tile(
    x, m, inside, w4, w6, w8, factors, plane, n, blocks4, blocks6, blocks8, part,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Sum over part `part` of SPLIT_K of a tile's steps: (BLOCK_N, BLOCK_M) float32, less both row scales and 2**5.

    x, w4, w6, w8, factors: pointers to the tile's first rows. m: (BLOCK_M,) and n: (BLOCK_N,), rows from there. x is
    read where `inside`, (BLOCK_M,). plane: bytes from one FP6 plane to the next. A step takes BLOCK_K channels for each
    warp.
    """
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    warp = tl.arange(0, WARPS)[:, None, None]
    blocks_of_step = tl.arange(0, STEP)[None, None, :]
    inside = inside[None, :, None]
    n = n[None, :, None]
    x += m[None, :, None] * ((blocks4 + blocks6 + blocks8) * 32)
    factors += n * factor_stride(blocks4, blocks6, blocks8)
    steps4 = tl.cdiv(blocks4, STEP * WARPS)
    steps6 = tl.cdiv(blocks6, STEP * WARPS)
    steps = steps4 + steps6 + tl.cdiv(blocks8, STEP * WARPS)
    first = part * steps // SPLIT_K
    last = (part + 1) * steps // SPLIT_K
    acc = tl.zeros((WARPS, BLOCK_N, BLOCK_M), tl.float32)

    half = blocks4 * 16
    w4 += n * half
    for step in range(first, min(last, steps4)):
        at = step * WARPS + warp
        column = at * (STEP * 16) + tl.arange(0, STEP * 16)[None, None, :]
        packed = _load(w4, column, half)
        factor = spread(_load(factors, at * STEP + blocks_of_step, _padded(blocks4)), 16)
        w_first, w_second = fp4_to_float16(packed, factor)
        x_first, x_second = x_to_float16(_load_x(x, inside, column, half), _load_x(x + half, inside, column, half))
        acc = _dot(w_first, x_first, acc)
        acc = _dot(w_second, x_second, acc)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    width = blocks6 * 8
    w6 += n * width
    x += blocks4 * 32
    factors += _padded(blocks4)
    for step in range(first, min(last, steps6)):
        at = step * WARPS + warp
        column = at * (STEP * 8) + tl.arange(0, STEP * 8)[None, None, :]
        plane0 = _load(w6, column, width)
        plane1 = _load(w6 + plane, column, width)
        plane2 = _load(w6 + 2 * plane, column, width)
        factor = spread(_load(factors, at * STEP + blocks_of_step, _padded(blocks6)), 8)
        w_0, w_1, w_2, w_3 = fp6_to_float16(plane0, plane1, plane2, factor, FP6)
        acc = _dot(w_0, _x_plane(_load_x(x, inside, column, width)), acc)
        acc = _dot(w_1, _x_plane(_load_x(x + width, inside, column, width)), acc)
        acc = _dot(w_2, _x_plane(_load_x(x + 2 * width, inside, column, width)), acc)
        acc = _dot(w_3, _x_plane(_load_x(x + 3 * width, inside, column, width)), acc)

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    width = blocks8 * 32
    w8 += n * width
    x += blocks6 * 32
    factors += _padded(blocks6)
    for step in range(first, last):
        at = step * WARPS + warp
        column = at * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        factor = spread(_load(factors, at * STEP + blocks_of_step, _padded(blocks8)), 32)
        w = e4m3_to_float16(_load(w8, column, width), factor)
        acc = _dot(w, _x_plane(_load_x(x, inside, column, width)), acc)
    return tl.sum(acc, 0)

"""Product of folded activations and packed weights for few rows (sm_90): one launch, weights unpacked in registers.

Each warp takes a stretch of K of its own: the operands have a leading dimension for it, as a batched product has, and
their sums are added at the end. Weights go from packed bytes to float16 (`templates.fold`) and are the left operand;
products of float16 are exact in the float32 accumulator. Up to three weights that read one activation (q, k and v; gate
and up) are one launch: a program belongs to one of them.

With SPLIT_K > 1 programs share a tile, too: each writes its sum, and the last to arrive adds all of them, in order, so
that the result does not depend on who came last.
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
FACTOR_SCALE = tl.constexpr(32.0)  # by which factors are less than what they stand for, see `folding`


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
def folded_mm_tile(
    x, inside, w4, w6, w8, w_factor, N, n, blocks4, blocks6, blocks8, part,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, WARPS: tl.constexpr,
    SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Sum over part `part` of SPLIT_K of a tile's steps: (BLOCK_N, BLOCK_M) float32, in units of both row scales.

    x: (1, BLOCK_M, 1) pointers to rows, read where `inside`. n: (1, BLOCK_N, 1) int64. A step takes BLOCK_K channels
    for each warp.
    """
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    warp = tl.arange(0, WARPS)[:, None, None]
    blocks_of_step = tl.arange(0, STEP)[None, None, :]
    padded4 = tl.cdiv(blocks4, FACTOR_PADDING) * FACTOR_PADDING
    padded6 = tl.cdiv(blocks6, FACTOR_PADDING) * FACTOR_PADDING
    padded8 = tl.cdiv(blocks8, FACTOR_PADDING) * FACTOR_PADDING
    factors = w_factor + n * (padded4 + padded6 + padded8)
    steps4 = tl.cdiv(blocks4, STEP * WARPS)
    steps6 = tl.cdiv(blocks6, STEP * WARPS)
    steps = steps4 + steps6 + tl.cdiv(blocks8, STEP * WARPS)
    first = part * steps // SPLIT_K
    last = (part + 1) * steps // SPLIT_K
    acc = tl.zeros((WARPS, BLOCK_N, BLOCK_M), tl.float32)

    w4 += n * (blocks4 * 16)
    half = blocks4 * 16
    for step in range(first, min(last, steps4)):
        at = step * WARPS + warp
        column = at * (STEP * 16) + tl.arange(0, STEP * 16)[None, None, :]
        packed = _load(w4, column, half)
        factor = spread(_load(factors, at * STEP + blocks_of_step, padded4), 16)
        w_first, w_second = fp4_to_float16(packed, factor)
        x_first, x_second = x_to_float16(_load_x(x, inside, column, half), _load_x(x + half, inside, column, half))
        acc = _dot(w_first, x_first, acc)
        acc = _dot(w_second, x_second, acc)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    width = blocks6 * 8
    w6 += n * width
    plane = width.to(tl.int64) * N
    x += blocks4 * 32
    factors += padded4
    for step in range(first, min(last, steps6)):
        at = step * WARPS + warp
        column = at * (STEP * 8) + tl.arange(0, STEP * 8)[None, None, :]
        plane0 = _load(w6, column, width)
        plane1 = _load(w6 + plane, column, width)
        plane2 = _load(w6 + 2 * plane, column, width)
        factor = spread(_load(factors, at * STEP + blocks_of_step, padded6), 8)
        w_0, w_1, w_2, w_3 = fp6_to_float16(plane0, plane1, plane2, factor, FP6)
        acc = _dot(w_0, _x_plane(_load_x(x, inside, column, width)), acc)
        acc = _dot(w_1, _x_plane(_load_x(x + width, inside, column, width)), acc)
        acc = _dot(w_2, _x_plane(_load_x(x + 2 * width, inside, column, width)), acc)
        acc = _dot(w_3, _x_plane(_load_x(x + 3 * width, inside, column, width)), acc)

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    w8 += n * (blocks8 * 32)
    x += blocks6 * 32
    factors += padded6
    for step in range(first, last):
        at = step * WARPS + warp
        column = at * BLOCK_K + tl.arange(0, BLOCK_K)[None, None, :]
        factor = spread(_load(factors, at * STEP + blocks_of_step, padded8), 32)
        w = e4m3_to_float16(_load(w8, column, blocks8 * 32), factor)
        acc = _dot(w, _x_plane(_load_x(x, inside, column, blocks8 * 32)), acc)
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["M", "odd4", "odd6", "odd8", "tiles0", "tiles1"])
def folded_mm_kernel(
    x,  # (M, K) uint8: E4M3 bytes
    x_row_scale,  # (M,) float32
    w4_0, w6_0, w8_0, w_factor_0, w_row_scale_0, bias_0,  # `packing` and `folding.weight_factor`
    w4_1, w6_1, w8_1, w_factor_1, w_row_scale_1, bias_1,
    w4_2, w6_2, w8_2, w_factor_2, w_row_scale_2, bias_2,
    out,  # (M, N0 + N1 + N2)
    partial,  # (SPLIT_K, M, N0 + N1 + N2) float32, unused if SPLIT_K is 1
    locks,  # at least as many int32 zeros as tiles; zeros again afterwards
    M, N0, N1, N2,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    tiles0, tiles1,  # columns of tiles of the first weight, and of the first two
    FP6: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, WARPS: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once. Grid: (column tiles, row tiles, SPLIT_K)."""
    pid_n = tl.program_id(0)
    w4 = w4_0
    w6 = w6_0
    w8 = w8_0
    w_factor = w_factor_0
    w_row_scale = w_row_scale_0
    bias = bias_0
    N = N0
    n_first = 0  # of this weight, in out
    if GROUPS > 1:
        is_second = pid_n >= tiles0
        w4 = tl.where(is_second, w4_1, w4)
        w6 = tl.where(is_second, w6_1, w6)
        w8 = tl.where(is_second, w8_1, w8)
        w_factor = tl.where(is_second, w_factor_1, w_factor)
        w_row_scale = tl.where(is_second, w_row_scale_1, w_row_scale)
        if HAS_BIAS:
            bias = tl.where(is_second, bias_1, bias)
        N = tl.where(is_second, N1, N)
        n_first = tl.where(is_second, N0, n_first)
        pid_n = tl.where(is_second, pid_n - tiles0, pid_n)
    if GROUPS > 2:
        is_third = tl.program_id(0) >= tiles1
        w4 = tl.where(is_third, w4_2, w4)
        w6 = tl.where(is_third, w6_2, w6)
        w8 = tl.where(is_third, w8_2, w8)
        w_factor = tl.where(is_third, w_factor_2, w_factor)
        w_row_scale = tl.where(is_third, w_row_scale_2, w_row_scale)
        if HAS_BIAS:
            bias = tl.where(is_third, bias_2, bias)
        N = tl.where(is_third, N2, N)
        n_first = tl.where(is_third, N0 + N1, n_first)
        pid_n = tl.where(is_third, tl.program_id(0) - tiles1, pid_n)

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_inside = (n % N).to(tl.int64)  # what is outside wraps around and is not stored
    blocks4 = (odd4 >> 1) - 1
    blocks6 = (odd6 >> 1) - 1
    blocks8 = (odd8 >> 1) - 1
    x_rows = x + m.to(tl.int64)[None, :, None] * ((blocks4 + blocks6 + blocks8) * 32)
    acc = folded_mm_tile(
        x_rows, (m < M)[None, :, None], w4, w6, w8, w_factor, N, n_inside[None, :, None], blocks4, blocks6, blocks8,
        tl.program_id(2), FP6, BLOCK_M, BLOCK_N, BLOCK_K, WARPS, SPLIT_K,
    )  # fmt: skip
    columns = N0
    if GROUPS > 1:
        columns += N1
    if GROUPS > 2:
        columns += N2
    inside = (m < M)[None, :] & (n < N)[:, None]
    cell = m.to(tl.int64)[None, :] * columns + n_first + n[:, None]
    is_last = True
    if SPLIT_K > 1:
        size = M.to(tl.int64) * columns
        tl.store(partial + tl.program_id(2) * size + cell, acc, mask=inside)
        tl.debug_barrier()  # all threads' sums are written before the one that counts says so
        lock = locks + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        is_last = tl.atomic_add(lock, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        if SPLIT_K > 1:
            tl.debug_barrier()
            acc = tl.load(partial + cell, mask=inside, other=0.0, cache_modifier=".cg")
            for other in tl.static_range(1, SPLIT_K):
                acc += tl.load(partial + other * size + cell, mask=inside, other=0.0, cache_modifier=".cg")
            tl.store(lock, 0)
        w_rows = tl.load(w_row_scale + n_inside) * FACTOR_SCALE
        result = acc * w_rows[:, None] * tl.load(x_row_scale + m, mask=m < M, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + n_inside).to(tl.float32)[:, None]
        tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside)

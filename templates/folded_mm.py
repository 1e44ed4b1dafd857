"""Product of folded activations and packed weights (sm_90): one launch, weights unpacked in registers.

The weights are the left operand of FP8 MMA, which takes it from registers. Up to three weights that read one activation
(q, k and v; gate and up) are one launch: a program belongs to one of them.

With SPLIT_K > 1 programs share a tile: each writes its sum, and the last to arrive adds all of them, in order, so that
the result does not depend on who came last.
"""

import triton
import triton.language as tl

from micromix_compile.templates.fold import e4m3_to_float32, fold_e4m3, fold_fp4, fold_fp6, padded, spread

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(rows, column, stop):
    """Bytes at `column` of each row, zeros from `stop` on. rows: (R, 1) pointers. column: (1, C)."""
    return tl.load(rows + column, mask=column < stop, other=0)


@triton.jit
def _dot(w, x, inside, column, stop, acc):
    """acc + w @ x.T, of columns before `stop`. w: (BLOCK_N, C) E4M3 bytes.

    x: (BLOCK_M, 1) pointers to E4M3 bytes. inside: (BLOCK_M, 1), which of them are rows; the others are zeros.
    """
    mask = inside & (column < stop)
    if _INTERPRETED:
        right = e4m3_to_float32(tl.load(x + column, mask=mask, other=0))
        return tl.dot(e4m3_to_float32(w), tl.trans(right), acc, input_precision="ieee")
    else:
        rows = x.to(tl.pointer_type(tl.float8e4nv))
        right = tl.load(rows + column, mask=mask, other=0.0)
        return tl.dot(w.to(tl.float8e4nv, bitcast=True), tl.trans(right), acc)


@triton.jit
def folded_mm_tile(
    x, inside, w4, w6, w8, factors, plane, n, blocks4, blocks6, blocks8, part,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Sum over part `part` of SPLIT_K of a tile's steps: (BLOCK_N, BLOCK_M) float32, in units of both row scales.

    x, w4, w6, w8, factors: pointers to the tile's first rows. inside: (BLOCK_M,), which rows of x there are. n:
    (BLOCK_N,), rows of w from the first. plane: bytes from one FP6 plane to the next. FP8 MMA of sm_90 adds with about
    14 bits: each step has a sum of its own.
    """
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    blocks_of_step = tl.arange(0, STEP)[None, :]
    n = n[:, None]
    inside = inside[:, None]
    x += tl.arange(0, BLOCK_M)[:, None] * ((blocks4 + blocks6 + blocks8) * 32)
    factors += n * (padded(blocks4) + padded(blocks6) + padded(blocks8))
    steps4 = tl.cdiv(blocks4, STEP)
    steps6 = tl.cdiv(blocks6, STEP)
    steps = steps4 + steps6 + tl.cdiv(blocks8, STEP)
    first = part * steps // SPLIT_K
    last = (part + 1) * steps // SPLIT_K
    zero = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    acc = zero

    half = blocks4 * 16
    w4 += n * half
    for step in range(first, min(last, steps4)):
        column = step * (STEP * 16) + tl.arange(0, STEP * 16)[None, :]
        factor = _load(factors, step * STEP + blocks_of_step, padded(blocks4))
        low, high = fold_fp4(_load(w4, column, half), spread(factor, 16))
        part_sum = _dot(low, x, inside, column, half, zero)
        acc += _dot(high, x + half, inside, column, half, part_sum)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    width = blocks6 * 8
    w6 += n * width
    x += blocks4 * 32
    factors += padded(blocks4)
    for step in range(first, min(last, steps6)):
        column = step * (STEP * 8) + tl.arange(0, STEP * 8)[None, :]
        plane0 = _load(w6, column, width)
        plane1 = _load(w6 + plane, column, width)
        plane2 = _load(w6 + 2 * plane, column, width)
        factor = _load(factors, step * STEP + blocks_of_step, padded(blocks6))
        w_0, w_1, w_2, w_3 = fold_fp6(plane0, plane1, plane2, spread(factor, 8), FP6)
        part_sum = _dot(w_0, x, inside, column, width, zero)
        part_sum = _dot(w_1, x + width, inside, column, width, part_sum)
        part_sum = _dot(w_2, x + 2 * width, inside, column, width, part_sum)
        acc += _dot(w_3, x + 3 * width, inside, column, width, part_sum)

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    width = blocks8 * 32
    w8 += n * width
    x += blocks6 * 32
    factors += padded(blocks6)
    for step in range(first, last):
        column = step * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
        factor = _load(factors, step * STEP + blocks_of_step, padded(blocks8))
        acc += _dot(fold_e4m3(_load(w8, column, width), spread(factor, 32)), x, inside, column, width, zero)
    return acc


@triton.jit(do_not_specialize=["M", "odd4", "odd6", "odd8", "tiles0", "tiles1"])
def folded_mm_kernel(
    x,  # (M, K) uint8: E4M3 bytes
    x_row_scale,  # (M,) float32
    w4_0, w6_0, w8_0, w_factor_0, w_row_scale_0, bias_0,  # `packing` and `folding.weight_factor`
    w4_1, w6_1, w8_1, w_factor_1, w_row_scale_1, bias_1,
    w4_2, w6_2, w8_2, w_factor_2, w_row_scale_2, bias_2,
    out_0, out_1, out_2,  # (M, N0) and so on
    partial,  # (SPLIT_K, M, N0 + N1 + N2) float32, unused if SPLIT_K is 1
    locks,  # at least as many int32 zeros as tiles; zeros again afterwards
    M, N0, N1, N2,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    tiles0, tiles1,  # columns of tiles of the first weight, and of the first two
    FP6: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Each out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once.

    Grid: (column tiles, row tiles, SPLIT_K).
    """
    pid_n = tl.program_id(0)
    w4 = w4_0
    w6 = w6_0
    w8 = w8_0
    w_factor = w_factor_0
    w_row_scale = w_row_scale_0
    bias = bias_0
    out = out_0
    N = N0
    n_first = 0  # of this weight, in partial
    if GROUPS > 1:
        is_second = pid_n >= tiles0
        w4 = tl.where(is_second, w4_1, w4)
        w6 = tl.where(is_second, w6_1, w6)
        w8 = tl.where(is_second, w8_1, w8)
        w_factor = tl.where(is_second, w_factor_1, w_factor)
        w_row_scale = tl.where(is_second, w_row_scale_1, w_row_scale)
        if HAS_BIAS:
            bias = tl.where(is_second, bias_1, bias)
        out = tl.where(is_second, out_1, out)
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
        out = tl.where(is_third, out_2, out)
        N = tl.where(is_third, N2, N)
        n_first = tl.where(is_third, N0 + N1, n_first)
        pid_n = tl.where(is_third, tl.program_id(0) - tiles1, pid_n)

    # Rows of x outside are not read: all programs read the same rows, and sixteen times the only one is a bottleneck in
    # L2. Rows of w outside are read as the last one. Inside a tile offsets are short, which saves registers.
    m_first = tl.program_id(1) * BLOCK_M
    n_tile = pid_n * BLOCK_N
    m = m_first + tl.arange(0, BLOCK_M)
    n = n_tile + tl.arange(0, BLOCK_N)
    n_local = tl.minimum(n, N - 1) - n_tile
    blocks4 = (odd4 >> 1) - 1
    blocks6 = (odd6 >> 1) - 1
    blocks8 = (odd8 >> 1) - 1
    x += m_first.to(tl.int64) * ((blocks4 + blocks6 + blocks8) * 32)
    w4 += n_tile.to(tl.int64) * (blocks4 * 16)
    w6 += n_tile.to(tl.int64) * (blocks6 * 8)
    w8 += n_tile.to(tl.int64) * (blocks8 * 32)
    w_factor += n_tile.to(tl.int64) * (padded(blocks4) + padded(blocks6) + padded(blocks8))
    plane = tl.cast(N, tl.int64) * (blocks6 * 8)
    acc = folded_mm_tile(
        x, m < M, w4, w6, w8, w_factor, plane, n_local, blocks4, blocks6, blocks8, tl.program_id(2), FP6, BLOCK_M,
        BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    columns = N0
    if GROUPS > 1:
        columns += N1
    if GROUPS > 2:
        columns += N2
    inside = (m < M)[None, :] & (n < N)[:, None]
    m = m.to(tl.int64)
    cell = m[None, :] * columns + n_first + n[:, None]
    is_last = True
    if SPLIT_K > 1:
        size = tl.cast(M, tl.int64) * columns
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
        w_rows = tl.load(w_row_scale + n, mask=n < N, other=0.0)
        result = acc * w_rows[:, None] * tl.load(x_row_scale + m, mask=m < M, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + m[None, :] * N + n[:, None], result.to(out.dtype.element_ty), mask=inside)

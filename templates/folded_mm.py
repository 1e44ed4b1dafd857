"""Product of folded activations and packed weights on FP8 MMA without block scales (sm_90): one launch.

The weights stay packed in memory. Each step along K loads packed bytes, folds their block scales into E4M3 in registers
(`templates.fold`) and multiplies them, as the left operand, by rows of activations. Up to three weights that read one
activation (q, k and v; gate and up) are one launch: a program belongs to one of them.

With SPLIT_K > 1 programs share a tile: each writes its sum, and the last to arrive adds all of them, in order, so that
the result does not depend on who came last.
"""

import triton
import triton.language as tl

from micromix_compile.templates.fold import e4m3_to_float32, fold_e4m3, fold_fp4, fold_fp6, fold_power, fp4_exponent, spread

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(rows, start, stop, WIDTH: tl.constexpr, OTHER: tl.constexpr):
    """Entries start .. start + WIDTH of each row, zeros from `stop` on. rows: (R, 1) pointers."""
    column = start + tl.arange(0, WIDTH)[None, :]
    return tl.load(rows + column, mask=column < stop, other=OTHER)


@triton.jit
def _dot(w, x, acc):
    """acc + w @ x.T. w: (BLOCK_N, W) uint8, E4M3 bytes. x: (BLOCK_M, W) float8e4nv."""
    if _INTERPRETED:
        right = e4m3_to_float32(x.to(tl.uint8, bitcast=True))
        return tl.dot(e4m3_to_float32(w), tl.trans(right), acc, input_precision="ieee")
    else:
        return tl.dot(w.to(tl.float8e4nv, bitcast=True), tl.trans(x), acc)


@triton.jit
def folded_mm_tile(
    x, w4, w6, w8, w_scale, row_exponent, M, N, m, n, blocks4, blocks6, blocks8, part,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """Sum over part `part` of SPLIT_K of a tile's steps: (BLOCK_N, BLOCK_M) float32, in units of both row scales.

    m: (BLOCK_M,) and n: (BLOCK_N, 1) int64, rows of x and w. Scales are loaded a step ahead, for they are too narrow
    for asynchronous copies.
    """
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    blocks = blocks4 + blocks6 + blocks8
    xm = x + m[:, None] * (blocks * 32)
    scale = w_scale + n * blocks
    steps4 = tl.cdiv(blocks4, STEP)
    steps6 = tl.cdiv(blocks6, STEP)
    steps = steps4 + steps6 + tl.cdiv(blocks8, STEP)
    first = part * steps // SPLIT_K
    last = (part + 1) * steps // SPLIT_K
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    w4 += n * (blocks4 * 16)
    ahead = _load(scale, first * STEP, blocks4, STEP, 0)
    for step in range(first, min(last, steps4)):
        start = step * (STEP * 16)
        w = _load(w4, start, blocks4 * 16, STEP * 16, 0)
        exponent = fp4_exponent(ahead, row_exponent)
        ahead = _load(scale, (step + 1) * STEP, blocks4, STEP, 0)
        low, high = fold_fp4(w, spread(exponent, 16))
        acc = _dot(low, _load(xm, start, blocks4 * 16, STEP * 16, 0.0), acc)
        acc = _dot(high, _load(xm + blocks4 * 16, start, blocks4 * 16, STEP * 16, 0.0), acc)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    width = blocks6 * 8
    w6 += n * width
    plane = width.to(tl.int64) * N
    xm += blocks4 * 32
    scale += blocks4
    ahead = _load(scale, first * STEP, blocks6, STEP, 0)
    for step in range(first, min(last, steps6)):
        start = step * (STEP * 8)
        plane0 = _load(w6, start, width, STEP * 8, 0)
        plane1 = _load(w6 + plane, start, width, STEP * 8, 0)
        plane2 = _load(w6 + 2 * plane, start, width, STEP * 8, 0)
        power = fold_power(ahead, row_exponent)
        ahead = _load(scale, (step + 1) * STEP, blocks6, STEP, 0)
        fold0, fold1, fold2, fold3 = fold_fp6(plane0, plane1, plane2, spread(power, 8), FP6)
        acc = _dot(fold0, _load(xm, start, width, STEP * 8, 0.0), acc)
        acc = _dot(fold1, _load(xm + width, start, width, STEP * 8, 0.0), acc)
        acc = _dot(fold2, _load(xm + 2 * width, start, width, STEP * 8, 0.0), acc)
        acc = _dot(fold3, _load(xm + 3 * width, start, width, STEP * 8, 0.0), acc)

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    w8 += n * (blocks8 * 32)
    xm += blocks6 * 32
    scale += blocks6
    ahead = _load(scale, first * STEP, blocks8, STEP, 0)
    for step in range(first, last):
        w = _load(w8, step * BLOCK_K, blocks8 * 32, BLOCK_K, 0)
        power = fold_power(ahead, row_exponent)
        ahead = _load(scale, (step + 1) * STEP, blocks8, STEP, 0)
        acc = _dot(fold_e4m3(w, spread(power, 32)), _load(xm, step * BLOCK_K, blocks8 * 32, BLOCK_K, 0.0), acc)
    return acc


@triton.jit(do_not_specialize=["M", "odd4", "odd6", "odd8", "tiles0", "tiles1"])
def folded_mm_kernel(
    x,  # (M, K) float8e4nv
    x_row_scale,  # (M,) float32
    w4_0, w6_0, w8_0, w_scale_0, w_row_scale_0, bias_0,  # packed as in `packing`; w_row_scale (N,) float32
    w4_1, w6_1, w8_1, w_scale_1, w_row_scale_1, bias_1,
    w4_2, w6_2, w8_2, w_scale_2, w_row_scale_2, bias_2,
    out,  # (M, N0 + N1 + N2)
    partial,  # (SPLIT_K, M, N0 + N1 + N2) float32, unused if SPLIT_K is 1
    locks,  # at least as many int32 zeros as tiles; zeros again afterwards
    M, N0, N1, N2,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    tiles0, tiles1,  # columns of tiles of the first weight, and of the first two
    FP6: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once. Grid: (column tiles, row tiles, SPLIT_K)."""
    pid_n = tl.program_id(0)
    w4 = w4_0
    w6 = w6_0
    w8 = w8_0
    w_scale = w_scale_0
    w_row_scale = w_row_scale_0
    bias = bias_0
    N = N0
    n_first = 0  # of this weight, in out
    if GROUPS > 1:
        is_second = pid_n >= tiles0
        w4 = tl.where(is_second, w4_1, w4)
        w6 = tl.where(is_second, w6_1, w6)
        w8 = tl.where(is_second, w8_1, w8)
        w_scale = tl.where(is_second, w_scale_1, w_scale)
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
        w_scale = tl.where(is_third, w_scale_2, w_scale)
        w_row_scale = tl.where(is_third, w_row_scale_2, w_row_scale)
        if HAS_BIAS:
            bias = tl.where(is_third, bias_2, bias)
        N = tl.where(is_third, N2, N)
        n_first = tl.where(is_third, N0 + N1, n_first)
        pid_n = tl.where(is_third, tl.program_id(0) - tiles1, pid_n)

    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)[:, None]
    m = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)
    n_inside = (n % N).to(tl.int64)  # what is outside wraps around and is not stored
    w_rows = tl.load(w_row_scale + n_inside)
    acc = folded_mm_tile(
        x, w4, w6, w8, w_scale, w_rows.to(tl.int32, bitcast=True) >> 23, M, N, (m % M).to(tl.int64), n_inside,
        (odd4 >> 1) - 1, (odd6 >> 1) - 1, (odd8 >> 1) - 1, tl.program_id(2), FP6, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
    )  # fmt: skip
    columns = N0
    if GROUPS > 1:
        columns += N1
    if GROUPS > 2:
        columns += N2
    inside = (m < M)[None, :] & (n < N)
    cell = m.to(tl.int64)[None, :] * columns + n_first + n
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
        result = acc * w_rows * tl.load(x_row_scale + m, mask=m < M, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + n_inside).to(tl.float32)
        tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside)

"""Product of folded activations and packed weights (sm_90): one launch, weights unpacked in registers.

A tile is the work of `folded_tile_narrow` for few rows and of `folded_tile_wide` for more. Up to three weights that
read one activation (q, k and v; gate and up) are one launch: a program belongs to one of them.

With SPLIT_K > 1 programs share a tile: each writes its sum, and the last to arrive adds all of them, in order, so that
the result does not depend on who came last.
"""

import triton
import triton.language as tl

from micromix_compile.templates.folded_tile_narrow import factor_stride, narrow_tile
from micromix_compile.templates.folded_tile_wide import wide_tile

FACTOR_SCALE = tl.constexpr(32.0)  # by which factors are less than what they stand for, see `folding`


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
    """out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once. Grid: (column tiles, row tiles, SPLIT_K).

    WARPS: that share K in a narrow tile; 0 for a wide one.
    """
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

    # Rows outside are read as the last one, and not stored. Inside a tile offsets are short, which saves registers.
    m_first = tl.program_id(1) * BLOCK_M
    n_tile = pid_n * BLOCK_N
    m = m_first + tl.arange(0, BLOCK_M)
    n = n_tile + tl.arange(0, BLOCK_N)
    m_local = tl.minimum(m, M - 1) - m_first
    n_local = tl.minimum(n, N - 1) - n_tile
    blocks4 = (odd4 >> 1) - 1
    blocks6 = (odd6 >> 1) - 1
    blocks8 = (odd8 >> 1) - 1
    x += m_first.to(tl.int64) * ((blocks4 + blocks6 + blocks8) * 32)
    w4 += n_tile.to(tl.int64) * (blocks4 * 16)
    w6 += n_tile.to(tl.int64) * (blocks6 * 8)
    w8 += n_tile.to(tl.int64) * (blocks8 * 32)
    w_factor += n_tile.to(tl.int64) * factor_stride(blocks4, blocks6, blocks8)
    plane = N.to(tl.int64) * (blocks6 * 8)
    if WARPS > 0:
        acc = narrow_tile(
            x, m_local, m < M, w4, w6, w8, w_factor, plane, n_local, blocks4, blocks6, blocks8, tl.program_id(2),
            FP6, BLOCK_M, BLOCK_N, BLOCK_K, WARPS, SPLIT_K,
        )  # fmt: skip
    else:
        acc = wide_tile(
            x, m_local, w4, w6, w8, w_factor, plane, n_local, blocks4, blocks6, blocks8, tl.program_id(2),
            FP6, BLOCK_M, BLOCK_N, BLOCK_K, SPLIT_K,
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
        w_rows = tl.load(w_row_scale + n, mask=n < N, other=0.0)
        if WARPS > 0:
            w_rows = w_rows * FACTOR_SCALE
        result = acc * w_rows[:, None] * tl.load(x_row_scale + m, mask=m < M, other=0.0)[None, :]
        if HAS_BIAS:
            result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside)

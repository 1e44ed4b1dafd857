"""Products of folded activations with the packed weights of experts (sm_90): one launch for all experts.

Tiles, and what a program does with one, are `folded_mm`'s; what differs is which rows and which weight a tile has. An
expert without rows costs nothing, and one with few has its packed bytes read once.
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.ahead import wait_for_inputs
from micromix_compile.templates.triton.expert_tiles import expert_tile, rows_of_tile
from micromix_compile.templates.triton.fold import blocks_of, row_blocks, words_of
from micromix_compile.templates.triton.folded_mm import _is_last, folded_mm_tile


@triton.jit
def _of_expert(expert, N, w4, w6, w8, w_factor, blocks4, blocks6, blocks8):
    """Pointers to one expert's packed weight and factors."""
    above = expert.to(tl.int64) * N
    words = words_of(blocks4) + words_of(blocks6) + words_of(blocks8)
    return (
        w4 + above * (blocks4 * 16), w6 + above * (blocks6 * 24), w8 + above * (blocks8 * 32),
        w_factor + above * (words * 4),
    )  # fmt: skip


@triton.jit
def _store_scaled(acc, out, x_row_scale, w_row_scale, bias, row, m, inside, n, N, HAS_BIAS: tl.constexpr):
    """out[m, n] = acc * scales + bias, rounded once. acc: (BLOCK_N, BLOCK_M). row: of x, for each m."""
    result = acc * tl.load(w_row_scale + n, mask=n < N, other=0.0)[:, None]
    result *= tl.load(x_row_scale + row, mask=inside, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    cell = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + cell, result.to(out.dtype.element_ty), mask=inside[None, :] & (n < N)[:, None])


@triton.jit
def _store_added(
    sums, out, x_row_scale, w_row_scale, bias, row, m, inside, n_first, N, HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """`_store_scaled` of the sum of a tile's parts, always in the same order."""
    BLOCK_M: tl.constexpr = m.shape[0]
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    cell = sums + tl.arange(0, SIZE)
    total = tl.load(cell, cache_modifier=".cg")
    for other in tl.static_range(1, SPLIT_K):
        total += tl.load(cell + other * SIZE, cache_modifier=".cg")
    total = tl.reshape(total, (BLOCK_N, BLOCK_M))
    n = n_first + tl.arange(0, BLOCK_N)
    _store_scaled(total, out, x_row_scale, w_row_scale, bias, row, m, inside, n, N, HAS_BIAS)


@triton.jit(do_not_specialize=["R", "E", "odd4", "odd6", "odd8", "column_tiles", "tiles"])
def grouped_folded_mm_kernel(
    x,  # (T, `folding.fold_width`) uint8: E4M3 bytes
    x_row_scale,  # (T,) float32
    rows,  # (R,) int32: which row of x a row of the output reads
    offs,  # (E,) int32: where each expert's rows of the output end
    w4, w6, w8, w_factor, w_row_scale, bias,  # of E experts, one behind the other, each as `folded_mm` takes them
    out,  # (R, N)
    partial,  # (tiles, SPLIT_K, BLOCK_N, BLOCK_M) float32, unused if SPLIT_K is 1
    locks,  # (tiles,) int32 zeros, likewise; zeros again afterwards
    R, N, E,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    column_tiles, tiles,  # in a row of tiles, and the most that there can be
    FP6: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, COPIED: tl.constexpr, SUM_STEPS: tl.constexpr,
    SEGMENT_START: tl.constexpr, STAGES8: tl.constexpr, LAUNCH_PDL: tl.constexpr, SHORT_X: tl.constexpr,
):  # fmt: skip
    """out = (x[rows] @ w.T) * x_row_scale * w_row_scale + bias with the weight of each row's expert, rounded once.

    Rows that no expert has become zeros. SHORT_X: x is less than 2 GiB; short offsets save registers. Grid: SPLIT_K
    programs for each of `tiles`, first parts first.
    """
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    if LAUNCH_PDL:
        wait_for_inputs()
    expert, m_first, m_end, pid_n = expert_tile(offs, tile, column_tiles, R, E, BLOCK_E, BLOCK_M)
    m = m_first + tl.arange(0, BLOCK_M)
    inside = m < m_end
    n_first = pid_n * BLOCK_N
    n = n_first + tl.arange(0, BLOCK_N)
    if expert < E:
        blocks4, blocks6, blocks8 = blocks_of(odd4, odd6, odd8)
        w4, w6, w8, w_factor = _of_expert(expert, N, w4, w6, w8, w_factor, blocks4, blocks6, blocks8)
        w_row_scale += expert.to(tl.int64) * N
        if HAS_BIAS:
            bias += expert.to(tl.int64) * N
        start = n_first.to(tl.int64)
        from_row = rows_of_tile(rows, m, inside, BLOCK_M)
        row = from_row + tl.arange(0, BLOCK_M)
        if not SHORT_X:
            from_row = from_row.to(tl.int64)
        acc = folded_mm_tile(
            x + from_row[:, None] * (row_blocks(blocks4, blocks6, blocks8) * 32), inside,
            w4 + start * (blocks4 * 16), w6 + start * (blocks6 * 8), w8 + start * (blocks8 * 32), w_factor + start * 4,
            tl.cast(N, tl.int64) * (blocks6 * 8), tl.minimum(n, N - 1) - n_first, N * 4, blocks4, blocks6, blocks8,
            part, SPLIT_K, FP6, BLOCK_M, BLOCK_N, BLOCK_K, COPIED, SUM_STEPS, SEGMENT_START, STAGES8,
        )  # fmt: skip
        if SPLIT_K == 1:
            _store_scaled(acc, out, x_row_scale, w_row_scale, bias, row, m, inside, n, N, HAS_BIAS)
        else:
            sums = partial + tile.to(tl.int64) * (SPLIT_K * BLOCK_N * BLOCK_M)
            if _is_last(acc, sums, locks, tile, part, SPLIT_K):
                _store_added(
                    sums, out, x_row_scale, w_row_scale, bias, row, m, inside, n_first, N, HAS_BIAS, BLOCK_N, SPLIT_K
                )  # fmt: skip
    else:
        zeros = tl.zeros((BLOCK_N, BLOCK_M), out.dtype.element_ty)
        cell = m.to(tl.int64)[None, :] * N + n[:, None]
        tl.store(out + cell, zeros, mask=inside[None, :] & (n < N)[:, None])

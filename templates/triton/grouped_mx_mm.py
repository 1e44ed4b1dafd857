"""Products of MX activations with the packed weights of experts: one launch for all experts.

Tiles, and what a program does with one, are `mixed_mx_mm`'s, block scales of sm_100 and sm_120 included; what differs
is which rows and which weight a tile has.
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.expert_tiles import expert_tile, rows_of_tile
from micromix_compile.templates.triton.mixed_mx_mm import mixed_mx_mm_tile


@triton.jit
def _store_tile(tile, out, m_first, m_end, pid_n, N):
    """Write a (BLOCK_M, BLOCK_N) float32 tile to its rows and column of tiles, rounded."""
    m = m_first + tl.arange(0, tile.shape[0])
    n = pid_n * tile.shape[1] + tl.arange(0, tile.shape[1])
    inside = (m < m_end)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], tile.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "R", "E", "blocks4", "blocks6", "blocks8", "column_tiles"])
def grouped_mx_mm_kernel(
    x4, x6, x8, x_scale,  # T rows, as `mixed_mx_mm` takes them; plain scales
    rows,  # (R,) int32: which row of x a row of the output reads
    offs,  # (E,) int32: where each expert's rows of the output end
    w4, w6, w8, w_scale, bias,  # of E experts, one behind the other
    out,  # (R, N)
    T, R, N, E, blocks4, blocks6, blocks8, column_tiles,
    FP6: tl.constexpr, W_FP4: tl.constexpr, X_WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, MODE: tl.constexpr,
    SWAP: tl.constexpr, WIDEN_FP4: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out = dequantized(x[rows]) @ dequantized(w).T + bias with the weight of each row's expert, rounded once.

    Rows that no expert has become zeros. Grid: one program for each tile that there can be.
    """
    expert, m_first, m_end, pid_n = expert_tile(offs, tl.program_id(0), column_tiles, R, E, BLOCK_E, BLOCK_M)
    if expert < E:
        m = m_first + tl.arange(0, BLOCK_M)
        above = expert.to(tl.int64) * N
        blocks = blocks4 + blocks6 + blocks8
        acc = mixed_mx_mm_tile(
            x4, x6, x8, x_scale, w4 + above * ((blocks if W_FP4 else blocks4) * 16),
            w6 + above * (0 if W_FP4 else blocks6 * 24), w8 + above * (0 if W_FP4 else blocks8 * 32),
            w_scale + above * blocks, T, N, rows_of_tile(rows, m, m < m_end, BLOCK_M), pid_n * BLOCK_N, blocks4,
            blocks6, blocks8, FP6, W_FP4, X_WIDE, MODE, SWAP, WIDEN_FP4, False, False, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        if HAS_BIAS:
            n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
            acc = acc + tl.load(bias + above + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
        _store_tile(acc, out, m_first, m_end, pid_n, N)
    else:
        _store_tile(tl.zeros((BLOCK_M, BLOCK_N), tl.float32), out, m_first, m_end, pid_n, N)

"""Product of folded activations and packed weights (sm_90): one launch, weights unpacked in registers.

The weights are the left operand of FP8 MMA, which takes it from registers. Up to three weights that read one activation
(q, k and v; gate and up) are one launch: a tile belongs to one of them.

A tile is one program's, or SPLIT_K programs share it: each writes its sum, and the last to arrive adds all of them, in
order, so that the result does not depend on who came last.
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.ahead import let_next_start, prefetch, wait_for_inputs
from micromix_compile.templates.triton.fold import (
    blocks_of,
    e4m3_to_float32,
    factor_at,
    fold_e4m3,
    fold_fp4,
    fold_fp6,
    in_halves,
    in_planes,
    of_group,
    row_blocks,
    spread,
    words_of,
)

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def _load(rows, column, stop):
    """Bytes at `column` of each row, zeros from `stop` on. rows: (R, 1) pointers. column: (1, C)."""
    return tl.load(rows + column, mask=column < stop, other=0)


@triton.jit
def _factors(rows, word_stride, step, blocks, STEP: tl.constexpr, COPIED: tl.constexpr):
    """(R, STEP) factors of a step. rows: (R, 1) pointers to a segment's. word_stride: bytes from four to the next four.

    COPIED: as many columns as give each thread four bytes to copy, STEP or twice that; fewer are not copied ahead.
    """
    column = tl.arange(0, COPIED)[None, :]
    mask = (column < STEP) & (step * STEP + column < words_of(blocks) * 4)
    factor = tl.load(factor_at(rows, word_stride, step * STEP + column), mask=mask, other=0)
    if COPIED != STEP:
        tl.static_assert(COPIED == 2 * STEP)
        pairs = tl.reshape(factor, (factor.shape[0], 2, STEP))
        factor, _ = tl.split(tl.permute(pairs, (0, 2, 1)))
    return factor


@triton.jit
def _add_dot(acc, w, x, inside, step, stop, SUM_STEPS: tl.constexpr):
    """acc + w @ x.T, of a step's columns before `stop`. w: (BLOCK_N, BLOCK_K) E4M3 bytes.

    x: (BLOCK_M, 1) pointers to E4M3 bytes. inside: (BLOCK_M, 1), which of them are rows; the others are zeros.
    """
    column = step * w.shape[1] + tl.arange(0, w.shape[1])[None, :]
    mask = inside & (column < stop)
    if _INTERPRETED:
        right = e4m3_to_float32(tl.load(x + column, mask=mask, other=0))
        return tl.dot(e4m3_to_float32(w), tl.trans(right), acc, input_precision="ieee")
    else:
        rows = x.to(tl.pointer_type(tl.float8e4nv))
        right = tl.load(rows + column, mask=mask, other=0.0)
        left = w.to(tl.float8e4nv, bitcast=True)
        if SUM_STEPS:
            return acc + tl.dot(left, tl.trans(right))
        else:
            return _ended(tl.dot(left, tl.trans(right), acc))


@triton.jit
def _ended(acc):
    """acc, when the matrix instructions that add to it have ended.

    Triton (3.6, 3.7) would let them run on into the next step, where ptxas has other values written to the registers of
    their left operand. With 8 warps results were wrong then.
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def _bound(part, steps4, steps6, steps8, parts, SEGMENT_START: tl.constexpr):
    """The step at which a part begins: parts read about the same number of bytes, 2 for a step of MXFP4 to 3 and 4.

    SEGMENT_START: so many more for MXFP6 and MXFP8 each, where loads that run ahead begin anew.
    """
    start6 = tl.where(steps6 > 0, SEGMENT_START, 0)
    start8 = tl.where(steps8 > 0, SEGMENT_START, 0)
    place = part * (steps4 * 2 + start6 + steps6 * 3 + start8 + steps8 * 4) // parts
    in6 = tl.maximum(place - steps4 * 2 - start6, 0)
    in8 = tl.maximum(in6 - steps6 * 3 - start8, 0)
    return tl.minimum(tl.cdiv(place, 2), steps4) + tl.minimum(tl.cdiv(in6, 3), steps6) + tl.cdiv(in8, 4)


@triton.jit
def _add_fp4(acc, w4, factors, word_stride, x, inside, step, blocks4, STEP: tl.constexpr, COPIED: tl.constexpr,
             SUM_STEPS: tl.constexpr):  # fmt: skip
    """acc + a step of MXFP4 weights. w4: (BLOCK_N, 1) pointers; the others as in `_factors` and `_add_dot`."""
    column = step * (STEP * 16) + tl.arange(0, STEP * 16)[None, :]
    factor = _factors(factors, word_stride, step, blocks4, STEP, COPIED)
    first_half, second_half = fold_fp4(_load(w4, column, blocks4 * 16), spread(factor, 16))
    w = in_halves(first_half, second_half)
    return _add_dot(acc, w, x, inside, step, blocks4 * 32, SUM_STEPS)


@triton.jit
def _add_fp6(acc, w6, plane, factors, word_stride, x, inside, step, blocks6, FP6: tl.constexpr, STEP: tl.constexpr,
             COPIED: tl.constexpr, SUM_STEPS: tl.constexpr):  # fmt: skip
    """acc + a step of MXFP6 weights. plane: bytes from one plane to the next."""
    width = blocks6 * 8
    column = step * (STEP * 8) + tl.arange(0, STEP * 8)[None, :]
    plane0 = _load(w6, column, width)
    plane1 = _load(w6 + plane, column, width)
    plane2 = _load(w6 + 2 * plane, column, width)
    factor = _factors(factors, word_stride, step, blocks6, STEP, COPIED)
    w_0, w_1, w_2, w_3 = fold_fp6(plane0, plane1, plane2, spread(factor, 8), FP6)
    w = in_planes(w_0, w_1, w_2, w_3)
    return _add_dot(acc, w, x, inside, step, tl.cdiv(blocks6, 2) * 64, SUM_STEPS)


@triton.jit
def _add_fp8(acc, w8, factors, word_stride, x, inside, step, blocks8, STEP: tl.constexpr, COPIED: tl.constexpr,
             SUM_STEPS: tl.constexpr):  # fmt: skip
    """acc + a step of MXFP8 weights."""
    width = blocks8 * 32
    column = step * (STEP * 32) + tl.arange(0, STEP * 32)[None, :]
    factor = _factors(factors, word_stride, step, blocks8, STEP, COPIED)
    w = fold_e4m3(_load(w8, column, width), spread(factor, 32))
    return _add_dot(acc, w, x, inside, step, width, SUM_STEPS)


@triton.jit
def folded_mm_tile(
    x, inside, w4, w6, w8, factors, plane, n, word_stride, blocks4, blocks6, blocks8, part, parts,
    FP6: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, COPIED: tl.constexpr,
    SUM_STEPS: tl.constexpr, SEGMENT_START: tl.constexpr, STAGES8: tl.constexpr,
):  # fmt: skip
    """Sum over part `part` of `parts` of a tile's steps: (BLOCK_N, BLOCK_M) float32, in units of both row scales.

    x, w4, w6, w8, factors: pointers to the tile's first rows. inside: (BLOCK_M,), which rows of x there are. n:
    (BLOCK_N,), rows of w from the first. plane: bytes from one FP6 plane to the next. FP8 MMA of sm_90 adds with about
    14 bits: with SUM_STEPS each step has a sum of its own. STAGES8: of the loads of MXFP8, the compiler's num_stages.

    Without SUM_STEPS a loop stands behind the question whether it has a step, or large tiles spill registers.
    """
    STEP: tl.constexpr = BLOCK_K // 32  # blocks
    n = n[:, None]
    inside = inside[:, None]
    x += tl.arange(0, BLOCK_M)[:, None] * (row_blocks(blocks4, blocks6, blocks8) * 32)
    factors += n * 4
    steps4 = tl.cdiv(blocks4, STEP)
    steps6 = tl.cdiv(blocks6, STEP)
    steps8 = tl.cdiv(blocks8, STEP)
    first = _bound(part, steps4, steps6, steps8, parts, SEGMENT_START)
    last = _bound(part + 1, steps4, steps6, steps8, parts, SEGMENT_START)
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    w4 += n * (blocks4 * 16)
    stop = min(last, steps4)
    if SUM_STEPS or first < stop:
        for step in range(first, stop):
            acc = _add_fp4(acc, w4, factors, word_stride, x, inside, step, blocks4, STEP, COPIED, SUM_STEPS)

    first = tl.maximum(first - steps4, 0)
    last = last - steps4
    w6 += n * (blocks6 * 8)
    x += blocks4 * 32
    factors += words_of(blocks4) * word_stride
    stop = min(last, steps6)
    if SUM_STEPS or first < stop:
        for step in range(first, stop):
            acc = _add_fp6(
                acc, w6, plane, factors, word_stride, x, inside, step, blocks6, FP6, STEP, COPIED, SUM_STEPS
            )  # fmt: skip

    first = tl.maximum(first - steps6, 0)
    last = last - steps6
    w8 += n * (blocks8 * 32)
    x += tl.cdiv(blocks6, 2) * 64
    factors += words_of(blocks6) * word_stride
    if SUM_STEPS or first < last:
        for step in tl.range(first, last, num_stages=STAGES8):
            acc = _add_fp8(acc, w8, factors, word_stride, x, inside, step, blocks8, STEP, COPIED, SUM_STEPS)
    return acc


@triton.jit
def _store(acc, out, x_row_scale, w_row_scale, bias, m, n, M, N, HAS_BIAS: tl.constexpr):
    """out[m, n] = acc * scales + bias, rounded once. acc: (BLOCK_N, BLOCK_M)."""
    result = acc * tl.load(w_row_scale + n, mask=n < N, other=0.0)[:, None]
    result *= tl.load(x_row_scale + m, mask=m < M, other=0.0)[None, :]
    if HAS_BIAS:
        result += tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[:, None]
    cell = m.to(tl.int64)[None, :] * N + n[:, None]
    tl.store(out + cell, result.to(out.dtype.element_ty), mask=(m < M)[None, :] & (n < N)[:, None])


@triton.jit
def _is_last(acc, sums, locks, place, part, SPLIT_K: tl.constexpr):
    """Write a part's sum to its place in `sums`, and say whether all others have; the tile's lock is zero then.

    place: of the tile among those that are shared.
    """
    SIZE: tl.constexpr = acc.shape[0] * acc.shape[1]
    # As vectors: Triton gives threads as many neighbours of all matrices of one shape, here too many for float32.
    tl.store(sums + part * SIZE + tl.arange(0, SIZE), tl.reshape(acc, (SIZE,)))
    tl.debug_barrier()  # all threads' sums are written before the one that counts says so
    lock = locks + place
    is_last = tl.atomic_add(lock, 1, sem="acq_rel") == SPLIT_K - 1
    if is_last:
        tl.debug_barrier()
        tl.store(lock, 0)
    return is_last


@triton.jit
def _finish(
    acc, partial, locks, tile, whole, part, parts, out, x_row_scale, w_row_scale, bias, m, n, n_first, M, N,
    HAS_BIAS: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """`_store` a tile, or leave a part's sum for the last of the tile's programs, or be that one."""
    BLOCK_N: tl.constexpr = acc.shape[0]
    BLOCK_M: tl.constexpr = acc.shape[1]
    if SPLIT_K == 1:  # nothing else is compiled then; parts is known only when the kernel runs
        _store(acc, out, x_row_scale, w_row_scale, bias, m, n, M, N, HAS_BIAS)
    elif parts == 1:
        _store(acc, out, x_row_scale, w_row_scale, bias, m, n, M, N, HAS_BIAS)
    else:
        sums = partial + (tile - whole) * (SPLIT_K * BLOCK_N * BLOCK_M)
        if _is_last(acc, sums, locks, tile - whole, part, SPLIT_K):
            _store_total(
                sums, out, x_row_scale, w_row_scale, bias, m, n_first, M, N, HAS_BIAS, BLOCK_M, BLOCK_N, SPLIT_K
            )  # fmt: skip


@triton.jit
def _store_total(
    sums, out, x_row_scale, w_row_scale, bias, m, n_first, M, N, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """`_store` of the sum of a tile's parts, always in the same order."""
    SIZE: tl.constexpr = BLOCK_N * BLOCK_M
    ROWS: tl.constexpr = min(BLOCK_N, 4096 // BLOCK_M)  # of a large tile at a time, for want of registers
    for first in tl.static_range(0, BLOCK_N, ROWS):
        cell = sums + first * BLOCK_M + tl.arange(0, ROWS * BLOCK_M)
        total = tl.load(cell, cache_modifier=".cg")
        for other in tl.static_range(1, SPLIT_K):
            total += tl.load(cell + other * SIZE, cache_modifier=".cg")
        total = tl.reshape(total, (ROWS, BLOCK_M))
        rows = n_first + first + tl.arange(0, ROWS)
        _store(total, out, x_row_scale, w_row_scale, bias, m, rows, M, N, HAS_BIAS)


@triton.jit
def _place(program, whole, shared, SPLIT_K: tl.constexpr):
    """(tile, part, parts) of a program: the whole tiles come first, then the first parts of all shared ones, and so on.

    Tiles go row after row. Last parts take longest, and programs with numbers far apart run on one processor, which so
    gets parts of each kind.
    """
    beyond = tl.maximum(program - whole, 0)
    part = beyond // shared
    parts = tl.where(program < whole, 1, SPLIT_K)
    return tl.minimum(program, whole + beyond % shared), part, parts


@triton.jit
def _packed_of_group(
    tile, tiles0, tiles1, w4_0, w4_1, w4_2, w6_0, w6_1, w6_2, w8_0, w8_1, w8_2, w_factor_0, w_factor_1, w_factor_2,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """`of_group` of a packed weight and its factors."""
    w4 = of_group(tile, tiles0, tiles1, w4_0, w4_1, w4_2, GROUPS)
    w6 = of_group(tile, tiles0, tiles1, w6_0, w6_1, w6_2, GROUPS)
    w8 = of_group(tile, tiles0, tiles1, w8_0, w8_1, w8_2, GROUPS)
    return w4, w6, w8, of_group(tile, tiles0, tiles1, w_factor_0, w_factor_1, w_factor_2, GROUPS)


@triton.jit
def _from_row(row, w4, w6, w8, w_factor, blocks4, blocks6, blocks8):
    """Pointers to a packed weight from a row on."""
    w4 += row.to(tl.int64) * (blocks4 * 16)
    w6 += row.to(tl.int64) * (blocks6 * 8)
    w8 += row.to(tl.int64) * (blocks8 * 32)
    w_factor += row.to(tl.int64) * 4
    return w4, w6, w8, w_factor


@triton.jit
def _begin(w_row_scale, bias, n, N, HAS_BIAS: tl.constexpr):
    """What comes before the inputs are there: asking for what is needed last, and is in no cache."""
    prefetch(w_row_scale + n, n < N)
    if HAS_BIAS:
        prefetch(bias + n, n < N)
    wait_for_inputs()


@triton.jit(do_not_specialize=["M", "odd4", "odd6", "odd8", "tiles0", "tiles1", "column_tiles", "whole", "shared"])
def folded_mm_kernel(
    x,  # (M, `folding.fold_width`) uint8: E4M3 bytes
    x_row_scale,  # (M,) float32
    w4_0, w6_0, w8_0, w_factor_0, w_row_scale_0, bias_0,  # `packing` and `folding.weight_factor`
    w4_1, w6_1, w8_1, w_factor_1, w_row_scale_1, bias_1,
    w4_2, w6_2, w8_2, w_factor_2, w_row_scale_2, bias_2,
    out_0, out_1, out_2,  # (M, N0) and so on
    partial,  # (shared tiles, SPLIT_K, BLOCK_N, BLOCK_M) float32, unused if SPLIT_K is 1
    locks,  # at least as many int32 zeros as shared tiles; zeros again afterwards
    M, N0, N1, N2,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    tiles0, tiles1, column_tiles,  # columns of tiles of the first weight, of the first two, and of all
    whole, shared,  # tiles that are one program's, all if SPLIT_K is 1, and the others
    FP6: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, COPIED: tl.constexpr, SUM_STEPS: tl.constexpr,
    SEGMENT_START: tl.constexpr, STAGES8: tl.constexpr, LAUNCH_PDL: tl.constexpr, RELEASES: tl.constexpr,
):  # fmt: skip
    """Each out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once. Grid: see `_place`."""
    tile = tl.program_id(0)
    part, parts = 0, 1
    if SPLIT_K > 1:
        tile, part, parts = _place(tile, whole, shared, SPLIT_K)
    column_tile = tile % column_tiles
    w4, w6, w8, w_factor = _packed_of_group(
        column_tile, tiles0, tiles1, w4_0, w4_1, w4_2, w6_0, w6_1, w6_2, w8_0, w8_1, w8_2, w_factor_0, w_factor_1,
        w_factor_2, GROUPS,
    )  # fmt: skip
    w_row_scale = of_group(column_tile, tiles0, tiles1, w_row_scale_0, w_row_scale_1, w_row_scale_2, GROUPS)
    bias = bias_0
    if HAS_BIAS:
        bias = of_group(column_tile, tiles0, tiles1, bias_0, bias_1, bias_2, GROUPS)
    out = of_group(column_tile, tiles0, tiles1, out_0, out_1, out_2, GROUPS)
    N = of_group(column_tile, tiles0, tiles1, N0, N1, N2, GROUPS)
    pid_n = column_tile - of_group(column_tile, tiles0, tiles1, 0, tiles0, tiles1, GROUPS)
    # Rows of x outside are not read: all programs read x, from L2. Rows of w outside are read as the last one. Inside a
    # tile offsets are short, which saves registers.
    m_first = tile // column_tiles * BLOCK_M
    n_first = pid_n * BLOCK_N
    m = m_first + tl.arange(0, BLOCK_M)
    n = n_first + tl.arange(0, BLOCK_N)
    n_local = tl.minimum(n, N - 1) - n_first
    blocks4, blocks6, blocks8 = blocks_of(odd4, odd6, odd8)
    x += m_first.to(tl.int64) * (row_blocks(blocks4, blocks6, blocks8) * 32)
    w4, w6, w8, w_factor = _from_row(n_first, w4, w6, w8, w_factor, blocks4, blocks6, blocks8)
    plane = tl.cast(N, tl.int64) * (blocks6 * 8)
    if LAUNCH_PDL:
        _begin(w_row_scale, bias, n, N, HAS_BIAS)
    acc = folded_mm_tile(
        x, m < M, w4, w6, w8, w_factor, plane, n_local, N * 4, blocks4, blocks6, blocks8, part, parts, FP6, BLOCK_M,
        BLOCK_N, BLOCK_K, COPIED, SUM_STEPS, SEGMENT_START, STAGES8,
    )  # fmt: skip
    if LAUNCH_PDL and RELEASES:
        let_next_start()
    _finish(
        acc, partial, locks, tile, whole, part, parts, out, x_row_scale, w_row_scale, bias, m, n, n_first, M, N,
        HAS_BIAS, SPLIT_K,
    )  # fmt: skip

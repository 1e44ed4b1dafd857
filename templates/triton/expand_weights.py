"""Packed weights to folded E4M3 in memory, once per call, for products with many rows: one launch.

Up to three weights that read one activation (q, k and v) come to lie below each other, as one weight of one product, as
far as `FoldedTiles.expansion_runs` joins them.
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.ahead import wait_for_inputs
from micromix_compile.templates.triton.fold import (
    blocks_of,
    data_blocks,
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


@triton.jit
def _store_step(folded, out, inside, step, stop):
    """Columns before `stop` of a segment. folded: (BLOCK_N, C)."""
    column = step * folded.shape[1] + tl.arange(0, folded.shape[1])[None, :]
    tl.store(out + column, folded, mask=inside & (column < stop))


@triton.jit
def _copy(target, source, mask):
    tl.store(target, tl.load(source, mask=mask), mask=mask)


@triton.jit
def _expand_fp4(w4, factors, word_stride, out, inside, blocks4, step, STEP: tl.constexpr):
    block = step * STEP + tl.arange(0, STEP)[None, :]
    factor = tl.load(factor_at(factors, word_stride, block), mask=inside & (block < blocks4), other=0)
    byte = step * (STEP * 16) + tl.arange(0, STEP * 16)[None, :]
    packed = tl.load(w4 + byte, mask=inside & (byte < blocks4 * 16), other=0)
    first, second = fold_fp4(packed, spread(factor, 16))
    _store_step(in_halves(first, second), out, inside, step, blocks4 * 32)


@triton.jit
def _expand_fp6(w6, plane, factors, word_stride, out, inside, blocks6, step, FP6: tl.constexpr, STEP: tl.constexpr):
    block = step * STEP + tl.arange(0, STEP)[None, :]
    factor = tl.load(factor_at(factors, word_stride, block), mask=inside & (block < blocks6), other=0)
    width = blocks6 * 8
    byte = step * (STEP * 8) + tl.arange(0, STEP * 8)[None, :]
    mask = inside & (byte < width)
    plane0 = tl.load(w6 + byte, mask=mask, other=0)
    plane1 = tl.load(w6 + plane + byte, mask=mask, other=0)
    plane2 = tl.load(w6 + 2 * plane + byte, mask=mask, other=0)
    fold0, fold1, fold2, fold3 = fold_fp6(plane0, plane1, plane2, spread(factor, 8), FP6)
    _store_step(in_planes(fold0, fold1, fold2, fold3), out, inside, step, tl.cdiv(blocks6, 2) * 64)


@triton.jit
def _expand_fp8(w8, factors, word_stride, out, inside, blocks8, step, STEP: tl.constexpr):
    block = step * STEP + tl.arange(0, STEP)[None, :]
    factor = tl.load(factor_at(factors, word_stride, block), mask=inside & (block < blocks8), other=0)
    byte = step * (STEP * 32) + tl.arange(0, STEP * 32)[None, :]
    packed = tl.load(w8 + byte, mask=inside & (byte < blocks8 * 32), other=0)
    _store_step(fold_e4m3(packed, spread(factor, 32)), out, inside, step, blocks8 * 32)


@triton.jit(do_not_specialize=["odd4", "odd6", "odd8", "tiles0", "tiles1"])
def expand_weights_kernel(
    w4_0, w6_0, w8_0, w_factor_0, w_row_scale_0, bias_0,  # `packing` and `folding.weight_factor`
    w4_1, w6_1, w8_1, w_factor_1, w_row_scale_1, bias_1,
    w4_2, w6_2, w8_2, w_factor_2, w_row_scale_2, bias_2,
    out,  # (N0 + N1 + N2, `folding.fold_width`) uint8: E4M3 bytes, in `folding.fold_order`
    row_scale,  # (N0 + N1 + N2,) float32
    bias,  # the same, of the biases' type; None without
    N0, N1, N2,
    odd4, odd6, odd8,  # 2 * blocks + 3, see `reorder_fold`
    tiles0, tiles1,  # tiles of BLOCK_N rows of the first weight, and of the first two
    FP6: tl.constexpr, GROUPS: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_N: tl.constexpr, STEP: tl.constexpr,
    LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """Program (i, j) folds the i-th tile of rows in the j-th stretch of STEP blocks; stretches end with a segment."""
    if LAUNCH_PDL:
        wait_for_inputs()
    tile = tl.program_id(0)
    w4 = of_group(tile, tiles0, tiles1, w4_0, w4_1, w4_2, GROUPS)
    w6 = of_group(tile, tiles0, tiles1, w6_0, w6_1, w6_2, GROUPS)
    w8 = of_group(tile, tiles0, tiles1, w8_0, w8_1, w8_2, GROUPS)
    factors = of_group(tile, tiles0, tiles1, w_factor_0, w_factor_1, w_factor_2, GROUPS)
    N = of_group(tile, tiles0, tiles1, N0, N1, N2, GROUPS)
    n = (tile - of_group(tile, tiles0, tiles1, 0, tiles0, tiles1, GROUPS)) * BLOCK_N
    n += tl.arange(0, BLOCK_N)[:, None]
    inside = n < N
    n = n.to(tl.int64)
    row = of_group(tile, tiles0, tiles1, 0, N0, N0 + N1, GROUPS) + n

    step = tl.program_id(1)
    if step == 0:
        scales = of_group(tile, tiles0, tiles1, w_row_scale_0, w_row_scale_1, w_row_scale_2, GROUPS)
        _copy(row_scale + row, scales + n, inside)
        if HAS_BIAS:
            biases = of_group(tile, tiles0, tiles1, bias_0, bias_1, bias_2, GROUPS)
            _copy(bias + row, biases + n, inside)

    blocks4, blocks6, blocks8 = blocks_of(odd4, odd6, odd8)
    steps4 = tl.cdiv(blocks4, STEP)
    steps6 = tl.cdiv(blocks6, STEP)
    word_stride = N * 4
    words4 = words_of(blocks4)
    words6 = words_of(blocks6)
    factors += n * 4
    width = row_blocks(blocks4, blocks6, blocks8) * 32
    out += row * width
    if step < steps4:
        _expand_fp4(w4 + n * (blocks4 * 16), factors, word_stride, out, inside, blocks4, step, STEP)
    elif step < steps4 + steps6:
        _expand_fp6(
            w6 + n * (blocks6 * 8), (blocks6 * 8).to(tl.int64) * N, factors + words4 * word_stride,
            word_stride, out + blocks4 * 32, inside, blocks6, step - steps4, FP6, STEP,
        )  # fmt: skip
        if step == steps4 + steps6 - 1:  # only with MXFP6 a row may be longer than its data
            byte = data_blocks(blocks4, blocks6, blocks8) * 32 + tl.arange(0, 128)[None, :]
            tl.store(out + byte, tl.zeros((BLOCK_N, 128), tl.uint8), mask=inside & (byte < width))
    else:
        _expand_fp8(
            w8 + n * (blocks8 * 32), factors + (words4 + words6) * word_stride, word_stride,
            out + data_blocks(blocks4, blocks6, 0) * 32, inside, blocks8, step - steps4 - steps6, STEP,
        )  # fmt: skip

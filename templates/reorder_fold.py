"""Reorder, quantize and fold on a GPU, behind nothing, an RMSNorm or SiLU·mul: E4M3 rows with one scale each.

The values are those of `reorder_quantize`, divided by the row's power of two and rounded to E4M3, in the order in which
`folded_mm` meets them; `micromix_compile.folding` is the contract. A program takes one row. Launched by
`micromix_compile.gpu_folded`.
"""

import triton
import triton.language as tl

from micromix_compile.templates.fold import data_blocks, float32_to_e4m3, row_blocks
from micromix_compile.templates.reorder_quantize import by_format, gather_row, scale_byte


@triton.jit
def reorder_fold_kernel(
    x_ptr,  # (M, C)
    other_ptr,  # rms_norm: weight (C,), any float dtype; silu_mul: up (M, C); none: unused
    channel_perm_ptr,  # (K,) any integer dtype, -1 reads as zero
    q_ptr,  # (M, `folding.fold_width`) uint8: E4M3 bytes
    row_scale_ptr,  # (M,) float32
    locks_ptr,  # (LOCKS,) int32, set to zero for the products that follow
    C,
    stride_x,
    stride_other,
    odd4,  # 2 * b4 + 3, and so on: compilers make another kernel for an argument of 1 or a multiple of 16
    odd6,
    odd8,
    PRODUCER: tl.constexpr,  # "none", "rms_norm" or "silu_mul"
    EPS: tl.constexpr,
    FP6: tl.constexpr,  # "e2m3" or "e3m2"
    SCALE_ROUNDING: tl.constexpr,  # "floor", "rceil", "even" or "fit"
    W_FP4: tl.constexpr,  # all weights are MXFP4: every block in their order
    FORMATS: tl.constexpr,  # digest of the table that `by_format` reads
    BLOCK_C: tl.constexpr,  # input channels in shared memory at a time; a power of two
    ROW_CHUNKS: tl.constexpr,  # ceil(C / BLOCK_C)
    BLOCK_K: tl.constexpr,  # output channels of one program; a power of two, at least 32
    WHOLE_ROW: tl.constexpr,  # BLOCK_K covers K
    LOCKS: tl.constexpr,
):
    """Fold BLOCK_K output channels, from program_id(1) * BLOCK_K on, of row program_id(0)."""
    BLOCKS: tl.constexpr = BLOCK_K // 32
    b4 = (odd4 >> 1) - 1
    b6 = (odd6 >> 1) - 1
    b8 = (odd8 >> 1) - 1
    blocks = b4 + b6 + b8
    halves = blocks if W_FP4 else b4  # blocks in the order of FP4 weights
    data = blocks if W_FP4 else data_blocks(b4, b6, b8)  # FP6 weights go by pairs
    width = blocks if W_FP4 else row_blocks(b4, b6, b8)
    row = tl.program_id(0).to(tl.int64)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(locks_ptr + tl.arange(0, LOCKS), tl.zeros((LOCKS,), tl.int32))
    x_ptr += row * stride_x

    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Beyond K the index is whatever it is: `gather_row` reads inside the row for any, and nothing is stored.
    index = tl.load(channel_perm_ptr + k, mask=k < blocks * 32).to(tl.int32)
    y, amax = gather_row(x_ptr, other_ptr, row * stride_other, index, C, PRODUCER, EPS, BLOCK_C, ROW_CHUNKS)
    y = tl.reshape(y, (BLOCKS, 32))

    is4 = block < b4
    is8 = block >= b4 + b6
    if WHOLE_ROW:  # what was gathered is at hand in float32
        amax = tl.max(tl.max(y.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1), 0)
    # ceil(log2(amax / 384)) + 127: 384 is the largest value that E2M1, E2M3, E3M2 and E4M3 reach with 1.5 * 2**n.
    row_exponent = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x400000).to(tl.int32)
    row_exponent = tl.maximum(row_exponent, 1)
    scale_bits = tl.where(amax >= 0x7F800000, 0x7FC00000, row_exponent << 23)
    tl.store(row_scale_ptr + row, scale_bits.to(tl.float32, bitcast=True))

    byte = scale_byte(y, is4, is8, FP6, SCALE_ROUNDING)
    code = float32_to_e4m3(_round_folded(y, byte - row_exponent, row_exponent, is4, is8, FP6, SCALE_ROUNDING))
    # Four channels that are neighbours are a word; which word of the row, depends on the format. In one dimension, for
    # in two the compiler does not see along which neighbours lie.
    low, high = tl.split(tl.reshape(code.to(tl.uint32), (BLOCK_K // 4, 2, 2)))
    low, high = tl.split(low | (high << 8))
    c = tl.program_id(1) * (BLOCK_K // 4) + tl.arange(0, BLOCK_K // 4)
    block = c >> 3
    c = c & 7
    half = block * 8 + (c >> 1) + (c & 1) * 4
    second = (block - b4) & 1  # of a pair
    plane = (block - second) * 8 + (c >> 1) * 4 + second * 2 + (c & 1)
    as_is = (block + data - blocks) * 8 + c
    place = tl.where(block < halves, half, tl.where(block < b4 + b6, plane, as_is))
    row_ptr = q_ptr.to(tl.pointer_type(tl.uint32)) + row * (width * 8)
    tl.store(row_ptr + place, low | (high << 16), mask=block < blocks)
    if not W_FP4:  # zeros in the place of the second of the last pair, if it has none, and behind the data
        tl.store(row_ptr + place + 2, tl.zeros_like(place), mask=(block == b4 + b6 - 1) & (data > blocks))
        word = data * 8 + tl.arange(0, 32)
        is_last = tl.program_id(1) == tl.num_programs(1) - 1
        tl.store(row_ptr + word, tl.zeros_like(word), mask=(word < width * 8) & is_last)


@triton.jit
def _round_folded(y, exponent, row_exponent, is4, is8, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """Y / 2**(row_exponent - 127), rounded to the grids of its blocks. y: (BLOCKS, 32); exponent: (BLOCKS,).

    Adding 1.5 * 2**(e + 23 - mantissa_bits), whose ulp is a step of the grid at exponent e, rounds to nearest even.
    """
    folded = y * ((254 - row_exponent) << 23).to(tl.float32, bitcast=True)
    if SCALE_ROUNDING != "rceil":  # with "rceil" nothing exceeds the largest value
        power = (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)
        largest = (by_format(is4, is8, FP6, "max_value") * power)[:, None]
        folded = tl.minimum(tl.maximum(folded, -largest), largest)
    lowest = by_format(is4, is8, FP6, "lowest") + (tl.maximum(exponent, -120) << 23)
    lift = (by_format(is4, is8, FP6, "drop") + 127) << 23 | 0x400000
    power = tl.maximum(folded.to(tl.int32, bitcast=True) & 0x7F800000, tl.maximum(lowest, 1 << 23)[:, None])
    magic = power.to(tl.float32, bitcast=True) * lift.to(tl.float32, bitcast=True)[:, None]
    return (folded + magic) - magic

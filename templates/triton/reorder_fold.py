"""Reorder, quantize and fold on a GPU, behind nothing, an RMSNorm or SiLU·mul: E4M3 rows with one scale each.

In front of the RMSNorm may stand the sum with a residual, which others read, and which is written too.

The values are those of `reorder_quantize`, divided by the row's power of two and rounded to E4M3, in the order in which
`folded_mm` meets them; `numerics.folding` is the contract. A program takes one row or a part of it. Activations that
have one scale a row are rounded just once, and many rows of them take the way of `fold_blocks`. Launched by
`targets.hopper`.
"""

import triton
import triton.language as tl

from micromix_compile.targets.folded_tiles import AHEAD_ROWS
from micromix_compile.templates.triton.ahead import let_next_start, prefetch, wait_for_inputs
from micromix_compile.templates.triton.fold import data_blocks, float32_to_e4m3, one_line, row_blocks, words_of_e4m3
from micromix_compile.templates.triton.fold_blocks import fold_by_blocks, load_order, store_row_scale
from micromix_compile.templates.triton.reorder_quantize import (
    by_format,
    gather_row,
    magnitude_bits,
    round_to,
    scale_byte,
    to_float32,
)
from micromix_compile.templates.triton.rotate import rotate_blocks

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
_FEW_ROWS = tl.constexpr(AHEAD_ROWS)


def _fold_ptx(clamp: str) -> str:
    """Two pairs $1 and $2, times $3, to the grids of lowest $4, lift $5 and largest $6; four E4M3 bytes."""
    pair = """
    mul.rn.bf16x2 y, ${source}, $3;{clamp}
    and.b32 power, y, 0x7F807F80;
    max.u16x2 power, power, $4;
    fma.rn.bf16x2 y, power, $5, y;
    fma.rn.bf16x2 y, power, minus, y;
    shl.b32 low, y, 16;
    and.b32 high, y, 0xFFFF0000;
    cvt.rn.satfinite.e4m3x2.f32 {bytes}, high, low;"""
    halves = "".join(pair.format(source=i + 1, clamp=clamp, bytes=name) for i, name in enumerate(("first", "second")))
    registers = ".reg .b16 first, second; .reg .b32 y, power, minus; .reg .f32 low, high;"
    return one_line(f"{{ {registers} neg.bf16x2 minus, $5;{halves} mov.b32 $0, {{first, second}}; }}")


_PAIRS_MAX_PTX = tl.constexpr(
    one_line("""{
    .reg .b32 a, b;
    and.b32 a, $1, 0x7FFF7FFF;
    and.b32 b, $2, 0x7FFF7FFF;
    max.u16x2 a, a, b;
    and.b32 b, $3, 0x7FFF7FFF;
    max.u16x2 a, a, b;
    and.b32 b, $4, 0x7FFF7FFF;
    max.u16x2 $0, a, b;
}""")
)
_FOLD_PTX = tl.constexpr(_fold_ptx(""))
_CLAMP_AND_FOLD_PTX = tl.constexpr(_fold_ptx(" neg.bf16x2 power, $6; max.bf16x2 y, y, power; min.bf16x2 y, y, $6;"))


@triton.jit
def reorder_fold_kernel(
    x_ptr,  # (M, C)
    other_ptr,  # rms_norm: weight (C,), any float dtype; silu_mul: up (M, C); none: unused
    residual_ptr, total_ptr,  # (M, C): what is added to x where ADDS, and the sum of both
    channel_perm_ptr,  # (K,) any integer dtype, -1 reads as zero
    q_ptr,  # (M, `folding.fold_width`) uint8: E4M3 bytes
    row_scale_ptr,  # (M,) float32
    locks_ptr,  # (LOCKS,) int32, set to zero for the products that follow
    C, stride_x, stride_other, stride_residual,
    odd4, odd6, odd8,  # 2 * b4 + 3 ...: compilers make another kernel for an argument of 1 or a multiple of 16
    odd_rotated,  # of the blocks that are rotated, or None if none is
    PRODUCER: tl.constexpr,  # "none", "rms_norm" or "silu_mul"
    ADDS: tl.constexpr,  # behind an RMSNorm only
    EPS: tl.constexpr, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr,
    ACTIVATIONS: tl.constexpr,  # "same", "fp8" or "mxfp6"
    BY_BLOCKS: tl.constexpr,  # a thread has whole blocks, see `fold_blocks`
    PERMUTES: tl.constexpr,  # channel_perm holds each channel once and nothing else
    W_FP4: tl.constexpr,  # all weights are MXFP4: every block in their order
    FORMATS: tl.constexpr,  # digest of the table that `by_format` reads
    BLOCK_C: tl.constexpr,  # input channels in shared memory at a time; a power of two
    ROW_CHUNKS: tl.constexpr,  # ceil(C / BLOCK_C)
    HAS_ROOM: tl.constexpr,  # see `quantizers.QuantizerTile`
    BLOCK_K: tl.constexpr,  # output channels of one program; a power of two, at least 32
    WHOLE_ROW: tl.constexpr,  # BLOCK_K covers K
    LOCKS: tl.constexpr, LAUNCH_PDL: tl.constexpr,
    RELEASE: tl.constexpr,  # the next kernel may start at this one's "start", its "stores" or its "end"
):  # fmt: skip
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
    if LAUNCH_PDL:
        _begin(channel_perm_ptr, blocks, BLOCK_K, RELEASE)
    if tl.program_id(0) + tl.program_id(1) == 0:
        tl.store(locks_ptr + tl.arange(0, LOCKS), tl.zeros((LOCKS,), tl.int32))
    x_ptr += row * stride_x
    if ADDS:
        residual_ptr += row * stride_residual
        total_ptr += row * C

    rotated = None if odd_rotated is None else (odd_rotated >> 1) - 1
    if BY_BLOCKS and ACTIVATIONS == "fp8":
        fold_by_blocks(
            x_ptr, other_ptr, row * stride_other, residual_ptr, total_ptr, channel_perm_ptr, q_ptr, row_scale_ptr, row,
            C, b4, b4 + b6, blocks, halves, data, width, rotated, PRODUCER, ADDS, EPS, SCALE_ROUNDING, BLOCK_C,
            ROW_CHUNKS, HAS_ROOM, PERMUTES, BLOCKS, WHOLE_ROW, RELEASES=LAUNCH_PDL and RELEASE == "stores",
        )  # fmt: skip
    else:
        _fold_channels(
            x_ptr, other_ptr, stride_other, residual_ptr, total_ptr, channel_perm_ptr, q_ptr, row_scale_ptr, row,
            C, b4, b4 + b6, blocks, halves, data, width, rotated, PRODUCER, ADDS, EPS, FP6, SCALE_ROUNDING, ACTIVATIONS,
            BY_BLOCKS, BLOCK_C, ROW_CHUNKS, HAS_ROOM, BLOCKS, WHOLE_ROW, RELEASES=LAUNCH_PDL and RELEASE == "stores",
        )  # fmt: skip


@triton.jit
def _fold_channels(
    x_ptr, other_ptr, stride_other, residual_ptr, total_ptr, channel_perm_ptr, q_ptr, row_scale_ptr, row, C, b4, b46,
    blocks, halves, data, width, rotated, PRODUCER: tl.constexpr, ADDS: tl.constexpr, EPS: tl.constexpr,
    FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr, ACTIVATIONS: tl.constexpr, BY_BLOCKS: tl.constexpr,
    BLOCK_C: tl.constexpr, ROW_CHUNKS: tl.constexpr, HAS_ROOM: tl.constexpr, BLOCKS: tl.constexpr,
    WHOLE_ROW: tl.constexpr, RELEASES: tl.constexpr,
):  # fmt: skip
    """A program's part of one row, whatever activations are; as `fold_by_blocks`."""
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    # Beyond K the index is whatever it is: `gather_row` reads inside the row for any, and nothing is stored.
    if BY_BLOCKS:
        index = load_order(channel_perm_ptr, blocks, BLOCKS).to(tl.int32)
    else:
        k = tl.program_id(1) * (BLOCKS * 32) + tl.arange(0, BLOCKS * 32)
        index = tl.load(channel_perm_ptr + k, mask=k < blocks * 32).to(tl.int32)
    y, amax = gather_row(
        x_ptr, other_ptr, row * stride_other, residual_ptr, total_ptr, index, C, PRODUCER, ADDS, EPS, BLOCK_C,
        ROW_CHUNKS, HAS_ROOM, PTX=True,
    )  # fmt: skip
    if ACTIVATIONS == "fp8":
        first, second = _fold_row(y, amax, block, row_scale_ptr + row, rotated, SCALE_ROUNDING, BLOCKS)
    else:
        narrowest = b4 if ACTIVATIONS == "same" else 0
        first, second = _fold(
            y, amax, block, narrowest, b46, row_scale_ptr, row, rotated, FP6, SCALE_ROUNDING, BLOCKS, WHOLE_ROW
        )
    if RELEASES:
        let_next_start()
    _store_words(first, second, q_ptr, row, b4, b46, blocks, halves, data, width, BLOCKS)


@triton.jit
def _begin(channel_perm_ptr, blocks, BLOCK_K: tl.constexpr, RELEASE: tl.constexpr):
    """What comes before the inputs are there: the next kernel may start, and the order is asked for."""
    if RELEASE == "start":
        let_next_start()
    if RELEASE != "end":  # the order lies in no cache
        line = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K // 32) * 32
        prefetch(channel_perm_ptr + line, (line < blocks * 32) & (tl.num_programs(0) <= _FEW_ROWS))
    wait_for_inputs()


@triton.jit
def _fold_row(y, amax, block, row_scale_ptr, rotated, SCALE_ROUNDING: tl.constexpr, BLOCKS: tl.constexpr):
    """`_fold` of a row that has one scale. amax: always the row's."""
    scale, is_special = store_row_scale(amax, row_scale_ptr, SCALE_ROUNDING)
    y = to_float32(tl.reshape(y, (BLOCKS, 32)))
    if rotated is not None:
        y = rotate_blocks(y, block < rotated)
    first, second = _words_of_blocks(y * scale)
    return tl.where(is_special, 0, first), tl.where(is_special, 0, second)


@triton.jit
def _fold(y, amax, block, b4, b46, row_scale_ptr, row, rotated, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr,
          BLOCKS: tl.constexpr, WHOLE_ROW: tl.constexpr):  # fmt: skip
    """Every first and every second word of the row's blocks, two (BLOCKS, 4) uint32; the row's scale is stored.

    y: (BLOCKS * 32,). amax: `magnitude_bits` of the row's largest value; that of y where it is the WHOLE_ROW, and
    nothing is rotated. block: (BLOCKS,), where in the row they are. b4, b46: where MXFP4 and MXFP6 end.
    """
    ROTATES: tl.constexpr = rotated is not None
    is_packed: tl.constexpr = y.dtype == tl.bfloat16 and not ROTATES
    if is_packed:  # two bfloat16 a register, of which one instruction does both
        a, b, c, d = _as_pairs(y, BLOCKS)
        block_amax = tl.max(_pairs_amax(a, b, c, d), 1)
    else:
        y = to_float32(tl.reshape(y, (BLOCKS, 32)))
        if ROTATES:
            y = rotate_blocks(y, block < rotated)
        block_amax = tl.max(magnitude_bits(y), 1)
    is4 = block < b4
    is8 = block >= b46
    if WHOLE_ROW and not ROTATES:
        amax = tl.max(block_amax, 0)
    # ceil(log2(amax / 384)) + 127: 384 is the largest value that E2M1, E2M3, E3M2 and E4M3 reach with 1.5 * 2**n.
    row_exponent = (amax >> 23) - 8 + ((amax & 0x7FFFFF) > 0x400000).to(tl.int32)
    row_exponent = tl.maximum(row_exponent, 1)
    scale_bits = tl.where(amax >= 0x7F800000, 0x7FC00000, row_exponent << 23)
    tl.store(row_scale_ptr + row, scale_bits.to(tl.float32, bitcast=True))

    exponent = scale_byte(block_amax, is4, is8, FP6, SCALE_ROUNDING) - row_exponent
    if is_packed:
        scale, lowest, lift, largest = _pair_grids(exponent, row_exponent, is4, is8, FP6)
        first = _fold_pairs(a, b, scale, lowest, lift, largest, SCALE_ROUNDING)
        second = _fold_pairs(c, d, scale, lowest, lift, largest, SCALE_ROUNDING)
    else:
        folded = _round_folded(y, exponent, row_exponent, is4, is8, FP6, SCALE_ROUNDING)
        first, second = _words_of_blocks(folded)
    return first, second


@triton.jit
def _store_words(first, second, q_ptr, row, b4, b46, blocks, halves, data, width, BLOCKS: tl.constexpr):
    """Write a program's words to their places in the row. first, second: (BLOCKS, 4) uint32, as `_fold` returns them.

    Four channels are a word, and where in its row it goes depends on the format. b4, b46, blocks: where MXFP4, MXFP6
    and the channels end, in blocks; halves: those in the order of FP4 weights; data, width: of a row, in blocks.
    """
    # In one dimension, for in two the compiler does not see along which neighbours lie.
    eight = tl.program_id(1) * (BLOCKS * 4) + tl.arange(0, BLOCKS * 4)
    block = eight >> 2
    is_half = block < halves
    is_plane = (block < b46) & (block >= halves)
    place = block * 8 + tl.where(is_plane, -6 * ((block - b4) & 1), tl.where(is_half, 0, (data - blocks) * 8))
    place += (eight & 3) * tl.where(is_plane, 4, tl.where(is_half, 1, 2))
    row_ptr = q_ptr.to(tl.pointer_type(tl.uint32)) + row * (width * 8)
    first_ptrs = row_ptr + place
    second_ptrs = first_ptrs + tl.where(is_half, 4, 1)
    tl.store(first_ptrs, tl.reshape(first, (BLOCKS * 4,)), mask=block < blocks)
    tl.store(second_ptrs, tl.reshape(second, (BLOCKS * 4,)), mask=block < blocks)
    if data > blocks:  # zeros in the place of the second of the last pair, which has none, and behind the data
        is_last = block == b46 - 1
        tl.store(first_ptrs + 2, tl.zeros_like(place), mask=is_last)
        tl.store(second_ptrs + 2, tl.zeros_like(place), mask=is_last)
        if tl.program_id(1) == tl.num_programs(1) - 1:
            behind = data * 8 + tl.arange(0, 32)
            tl.store(row_ptr + behind, tl.zeros_like(behind), mask=behind < width * 8)


@triton.jit
def _words_of_blocks(y):
    """float32 (BLOCKS, 32), rounded to E4M3 -> two (BLOCKS, 4) uint32: every first and every second word."""
    return tl.split(tl.reshape(words_of_e4m3(y), (y.shape[0], 4, 2)))


@triton.jit
def _as_pairs(y, BLOCKS: tl.constexpr):
    """bfloat16 (BLOCKS * 32,) -> four (BLOCKS, 4) uint32: of each eight neighbours the pairs, the lower first."""
    low, high = tl.split(tl.reshape(y.to(tl.uint16, bitcast=True).to(tl.uint32), (BLOCKS, 4, 2, 2, 2)))
    even, odd = tl.split(low | (high << 16))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _pairs_amax(a, b, c, d):
    """The largest `magnitude_bits` of four pairs of bfloat16."""
    if _INTERPRETED:
        upper = tl.maximum(tl.maximum(a & 0x7FFF0000, b & 0x7FFF0000), tl.maximum(c & 0x7FFF0000, d & 0x7FFF0000))
        lower = tl.maximum(tl.maximum(a & 0x7FFF, b & 0x7FFF), tl.maximum(c & 0x7FFF, d & 0x7FFF))
        return tl.maximum(upper, lower << 16).to(tl.int32, bitcast=True)
    most = tl.inline_asm_elementwise(_PAIRS_MAX_PTX, "=r,r,r,r,r", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1)
    return tl.maximum(most & 0xFFFF0000, most << 16).to(tl.int32, bitcast=True)


@triton.jit
def _pair_grids(exponent, row_exponent, is4, is8, FP6: tl.constexpr):
    """What `_fold_pairs` takes besides the pairs, each once in either half of a word: `_grids` of bfloat16."""
    lowest, lift, largest = _grids(exponent, is4, is8, FP6)
    scale = _twice((254 - row_exponent) << 23)
    return scale, _twice(lowest)[:, None], _twice(lift - (16 << 23))[:, None], _twice(largest)[:, None]


@triton.jit
def _fold_pairs(first, second, scale, lowest, lift, largest, SCALE_ROUNDING: tl.constexpr):
    """A word of `float32_to_e4m3(_round_folded(...))` of two pairs of bfloat16.

    The lift is 2**16 smaller than there, as an ulp of bfloat16 is that much larger, so that every sum rounds alike.
    What lies below 2**-126 ends as a zero either way, perhaps of another sign.
    """
    if _INTERPRETED:
        low = _fold_one(first << 16, scale, lowest, lift, largest, SCALE_ROUNDING)
        low |= _fold_one(first, scale, lowest, lift, largest, SCALE_ROUNDING) << 8
        high = _fold_one(second << 16, scale, lowest, lift, largest, SCALE_ROUNDING)
        high |= _fold_one(second, scale, lowest, lift, largest, SCALE_ROUNDING) << 8
        return low | (high << 16)
    ptx: tl.constexpr = _FOLD_PTX if SCALE_ROUNDING == "rceil" else _CLAMP_AND_FOLD_PTX
    return tl.inline_asm_elementwise(
        ptx, "=r,r,r,r,r,r,r", [first, second, scale, lowest, lift, largest], dtype=tl.uint32, is_pure=True, pack=1
    )


@triton.jit
def _fold_one(word, scale, lowest, lift, largest, SCALE_ROUNDING: tl.constexpr):
    """What the PTX of `_fold_pairs` does with the upper half of a word, in float32 rounded to bfloat16; uint32."""
    y = to_float32(round_to(_upper(word) * _upper(scale), tl.bfloat16))
    if SCALE_ROUNDING != "rceil":
        y = tl.minimum(tl.maximum(y, -_upper(largest)), _upper(largest))
    power = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, _upper(lowest).to(tl.int32, bitcast=True))
    magic = power.to(tl.float32, bitcast=True) * _upper(lift)
    y = to_float32(round_to(y + magic, tl.bfloat16))
    return float32_to_e4m3(to_float32(round_to(y - magic, tl.bfloat16))).to(tl.uint32)


@triton.jit
def _upper(word):
    """The bfloat16 in the upper half of a word, as float32."""
    return (word & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _round_folded(y, exponent, row_exponent, is4, is8, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """Y / 2**(row_exponent - 127), rounded to the grids of its blocks. y: (BLOCKS, 32); exponent: (BLOCKS,).

    Adding 1.5 * 2**(e + 23 - mantissa_bits), whose ulp is a step of the grid at exponent e, rounds to nearest even.
    """
    lowest, lift, largest = _grids(exponent, is4, is8, FP6)
    folded = y * ((254 - row_exponent) << 23).to(tl.float32, bitcast=True)
    if SCALE_ROUNDING != "rceil":  # with "rceil" nothing exceeds the largest value
        largest = largest.to(tl.float32, bitcast=True)[:, None]
        folded = tl.minimum(tl.maximum(folded, -largest), largest)
    power = tl.maximum(folded.to(tl.int32, bitcast=True) & 0x7F800000, lowest[:, None])
    magic = power.to(tl.float32, bitcast=True) * lift.to(tl.float32, bitcast=True)[:, None]
    return (folded + magic) - magic


@triton.jit
def _grids(exponent, is4, is8, FP6: tl.constexpr):
    """By block, as the bits of a float32: least normal number, 1.5 * 2**(23 - mantissa_bits), largest value."""
    lowest = tl.maximum(by_format(is4, is8, FP6, "lowest") + (tl.maximum(exponent, -120) << 23), 1 << 23)
    lift = (by_format(is4, is8, FP6, "drop") + 127) << 23 | 0x400000
    power = (tl.maximum(exponent + 127, 0) << 23).to(tl.float32, bitcast=True)
    largest = by_format(is4, is8, FP6, "max_value") * power
    return lowest, lift, largest.to(tl.int32, bitcast=True)


@triton.jit
def _twice(bits):
    """The bfloat16 of float32 bits whose lower half is zeros, in both halves of a word."""
    return ((bits >> 16) * 0x10001).to(tl.uint32, bitcast=True)

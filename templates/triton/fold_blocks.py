"""Reorder and fold many rows of bfloat16 to E4M3 with one scale a row, rotated or not: a thread has whole blocks.

Rotation is then additions of a thread's own registers, and what is stored are vectors of its own words. Most of the
time goes to the memory that the threads of a processor share: 32 of them read 32 channels from anywhere in the row, and
the order that says from where. Hence the order is read as `load_order` does, behind the row, and nothing is exchanged
behind the gather but the row's largest value.

8192 rows on an H200, us, versions of this kernel with three quarters of the blocks rotated (with none): 4096 channels
34.3; with the loads of the order in front of the row's 36.6 (35.0); with an exchange before the stores 36.9 (36.0);
where four neighbouring threads share a block 51.6 (31.0), two rows a program, side by side in shared memory, 36.0
(29.3), two rows one after the other 43.1 (37.3). 14336 channels 131 (124, loads in front); sharing 295 (138), two rows
side by side 201 (152). Orders in which no two threads of 32 read from one bank would take another 3 us off at 4096
channels. `reorder_fold` with scales of blocks takes 43.5 and 184 there.
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.ahead import let_next_start
from micromix_compile.templates.triton.fold import float32_to_e4m3, one_line
from micromix_compile.templates.triton.reorder_quantize import (
    gather_row,
    magnitude_bits,
    produce,
    row_rstd,
    scale_byte,
    to_float32,
)
from micromix_compile.templates.triton.rotate import rotate_blocks

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _words_ptx(rotates: bool) -> str:
    """16 pairs of bfloat16, $8 to $23, times $24, as 8 words of E4M3; rotated if $25 is not zero; and $26.

    The first sums are fused with the normalization: bfloat16 times 2**-5 is exact in float32.
    """
    code = [".reg .pred plain; .reg .b16 low, high; .reg .b32 bits; .reg .f32 minus, f<32>, g<32>;"]
    for pair in range(16):
        code += [f"shl.b32 bits, ${8 + pair}, 16; mov.b32 f{2 * pair}, bits;"]
        code += [f"and.b32 bits, ${8 + pair}, 0xFFFF0000; mov.b32 f{2 * pair + 1}, bits;"]
    if rotates:
        code += ["setp.eq.b32 plain, $25, 0; @plain bra SCALE;"]
        for i in range(16):
            code += [f"mul.rn.f32 minus, f{i + 16}, 0f3D000000; fma.rn.f32 g{i}, f{i}, 0f3D000000, minus;"]
            code += [f"neg.f32 minus, minus; fma.rn.f32 g{i + 16}, f{i}, 0f3D000000, minus;"]
        for apart, old, new in ((8, "g", "f"), (4, "f", "g"), (2, "g", "f"), (1, "f", "g")):
            for i in range(32):
                pair = f"{old}{i - apart}, {old}{i}" if i & apart else f"{old}{i}, {old}{i + apart}"
                code += [f"{'sub' if i & apart else 'add'}.rn.f32 {new}{i}, {pair};"]
        code += [f"mov.f32 f{i}, g{i};" for i in range(32)]
        code += ["SCALE:"]
    code += [f"mul.rn.f32 f{i}, f{i}, $24;" for i in range(32)]
    for word in range(8):
        first, second, third, fourth = (f"f{4 * word + i}" for i in range(4))
        code += [f"cvt.rn.satfinite.e4m3x2.f32 low, {second}, {first};"]
        code += [f"cvt.rn.satfinite.e4m3x2.f32 high, {fourth}, {third};"]
        code += [f"mov.b32 bits, {{low, high}}; and.b32 ${word}, bits, $26;"]
    return one_line(f"{{ {' '.join(code)} }}")


_WORDS_PTX = tl.constexpr(_words_ptx(False))
_ROTATED_WORDS_PTX = tl.constexpr(_words_ptx(True))
_WORDS_CONSTRAINTS = tl.constexpr("=r," * 8 + "r," * 16 + "f,r,r")

# A NaN in either comes out as one, that of a NaN is of largest magnitude.
_LARGER_PTX = tl.constexpr(
    one_line("""{
    .reg .b32 most;
    max.NaN.xorsign.abs.bf16x2 most, $1, $2;
    max.NaN.xorsign.abs.bf16x2 most, most, $3;
    max.NaN.xorsign.abs.bf16x2 most, most, $4;
    and.b32 $0, most, 0x7FFF7FFF;
}""")
)


@triton.jit
def fold_by_blocks(
    x_ptr, other_ptr, other_offset, residual_ptr, total_ptr, channel_perm_ptr, q_ptr, row_scale_ptr, row, C, b4, b46,
    blocks, halves, data, width, rotated, PRODUCER: tl.constexpr, ADDS: tl.constexpr, EPS: tl.constexpr,
    SCALE_ROUNDING: tl.constexpr, BLOCK_C: tl.constexpr, ROW_CHUNKS: tl.constexpr, HAS_ROOM: tl.constexpr,
    PERMUTES: tl.constexpr, BLOCKS: tl.constexpr, WHOLE_ROW: tl.constexpr, RELEASES: tl.constexpr,
):  # fmt: skip
    """A program's part of one row: BLOCKS blocks. rotated: how many blocks of the row are, or None for none.

    PERMUTES: channel_perm holds each channel once and nothing else. RELEASES: the next kernel may start at the stores.
    The others: as in `reorder_fold_kernel` and `reorder_fold._store_words`.
    """
    if PERMUTES and ROW_CHUNKS == 1:
        rstd = 1.0
        if PRODUCER == "rms_norm":
            rstd = row_rstd(x_ptr, residual_ptr, total_ptr, C, ADDS, EPS, BLOCK_C, ROW_CHUNKS)
        if PRODUCER == "silu_mul":
            other_ptr += other_offset
        x = produce(x_ptr, other_ptr, residual_ptr, tl.arange(0, BLOCK_C), C, rstd, PRODUCER, ADDS, True)
        index = load_order(channel_perm_ptr, blocks, BLOCKS)
        y = tl.gather(x, index.to(tl.int32) & (BLOCK_C - 1), 0)
        if WHOLE_ROW:
            amax = _row_amax(y, BLOCKS)
        else:
            amax = tl.max(magnitude_bits(to_float32(x)), 0)
    else:
        index = load_order(channel_perm_ptr, blocks, BLOCKS).to(tl.int32)
        y, amax = gather_row(
            x_ptr, other_ptr, other_offset, residual_ptr, total_ptr, index, C, PRODUCER, ADDS, EPS, BLOCK_C,
            ROW_CHUNKS, HAS_ROOM, PTX=True,
        )  # fmt: skip
    scale, is_special = store_row_scale(amax, row_scale_ptr + row, SCALE_ROUNDING)
    words = _words(y, scale, is_special, rotated, BLOCKS)
    if RELEASES:
        let_next_start()
    _store_blocks(words, q_ptr, row, b4, b46, blocks, halves, data, width, BLOCKS)


@triton.jit
def store_row_scale(amax, ptr, SCALE_ROUNDING: tl.constexpr):
    """Store the scale of a row with this largest `magnitude_bits`, as E4M3 has it: NaN for a NaN or an infinity.

    Returns what the row is to be multiplied by, and whether the scale is NaN.
    """
    byte = tl.maximum(scale_byte(amax, False, True, "e2m3", SCALE_ROUNDING), 1)
    is_special = byte == 255
    tl.store(ptr, tl.where(is_special, 0x7FC00000, byte << 23).to(tl.float32, bitcast=True))
    return (tl.maximum(254 - byte, 1) << 23).to(tl.float32, bitcast=True), is_special


@triton.jit
def load_order(channel_perm_ptr, blocks, BLOCKS: tl.constexpr):
    """A program's part of the order: (BLOCKS * 32,) int16, of which a thread has whole blocks.

    Four vectors of 16 bytes make a block. Were all threads to read the first of theirs, then the second, they would
    meet in two of eight banks. So threads begin with different ones, of which bits of the block's number tell, and put
    them in order afterwards: us of 8192 rows of 4096 channels on an H200 so and without 36.6 and 38.6.
    """
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    turn = (block >> 1) & 3
    ptrs = channel_perm_ptr + tl.multiple_of(block * 32, 32)[:, None] + tl.arange(0, 8)[None, :]
    mask = (block < blocks)[:, None]
    a = tl.load(ptrs + tl.multiple_of(turn * 8, 8)[:, None], mask=mask)
    b = tl.load(ptrs + tl.multiple_of((1 ^ turn) * 8, 8)[:, None], mask=mask)
    c = tl.load(ptrs + tl.multiple_of((2 ^ turn) * 8, 8)[:, None], mask=mask)
    d = tl.load(ptrs + tl.multiple_of((3 ^ turn) * 8, 8)[:, None], mask=mask)
    odd = tl.broadcast_to((0 - (turn & 1)).to(tl.int16)[:, None], (BLOCKS, 8))
    upper = tl.broadcast_to((0 - (turn >> 1)).to(tl.int16)[:, None], (BLOCKS, 8))
    a, b, c, d = _pick(a, b, odd), _pick(b, a, odd), _pick(c, d, odd), _pick(d, c, odd)
    a, b, c, d = _pick(a, c, upper), _pick(b, d, upper), _pick(c, a, upper), _pick(d, b, upper)
    order = tl.join(tl.join(a, c), tl.join(b, d))
    return tl.reshape(tl.permute(order, (0, 2, 3, 1)), (BLOCKS * 32,))


@triton.jit
def _pick(zeros, ones, bits):
    """Bits of `ones` where those of `bits` are one, else of `zeros`: int16, two at a time."""
    if _INTERPRETED:
        return (zeros & ~bits) | (ones & bits)
    else:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xD8;", "=r,r,r,r", [zeros, ones, bits], dtype=tl.int16, is_pure=True, pack=2
        )


@triton.jit
def _neighbours(y, BLOCKS: tl.constexpr):
    """bfloat16 (BLOCKS * 32,) -> (BLOCKS, 16) uint32 of two neighbours, the first in the lower half."""
    low, high = tl.split(tl.reshape(y.to(tl.uint16, bitcast=True).to(tl.uint32), (BLOCKS, 16, 2)))
    return low | (high << 16)


@triton.jit
def _row_amax(y, BLOCKS: tl.constexpr):
    """The largest `magnitude_bits` of bfloat16 (BLOCKS * 32,); any of a NaN's for a NaN."""
    if _INTERPRETED:
        return tl.max(magnitude_bits(to_float32(y)), 0)
    else:
        first, second = _halve(_neighbours(y, BLOCKS))
        a, b = _halve(first)
        c, d = _halve(second)
        most = tl.inline_asm_elementwise(_LARGER_PTX, "=r,r,r,r,r", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1)
        return tl.max(tl.maximum(most & 0xFFFF0000, most << 16).to(tl.int32, bitcast=True))


@triton.jit
def _halve(values):
    """(R, 2 * C) -> the even and the odd columns, (R, C) each, or (R,) of two columns."""
    if values.shape[1] == 2:
        even, odd = tl.split(values)
    else:
        even, odd = tl.split(tl.reshape(values, (values.shape[0], values.shape[1] // 2, 2)))
    return even, odd


@triton.jit
def _quarter(values):
    """(R, 4) -> its columns."""
    even, odd = _halve(values)
    a, c = _halve(even)
    b, d = _halve(odd)
    return a, b, c, d


@triton.jit
def _words(y, scale, is_special, rotated, BLOCKS: tl.constexpr):
    """Channels times `scale` as E4M3, zeros if the row is special: eight words of each block, (BLOCKS,) uint32 each."""
    ROTATES: tl.constexpr = rotated is not None
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    if _INTERPRETED:
        values = to_float32(tl.reshape(y, (BLOCKS, 32)))
        if ROTATES:
            values = rotate_blocks(values, block < rotated)
        code = tl.where(is_special, 0, float32_to_e4m3(values * scale)).to(tl.uint32)
        low, high = _halve(code)
        low, high = _halve(low | (high << 8))
        even, odd = _halve(low | (high << 16))
        a, c, e, g = _quarter(even)
        b, d, f, h = _quarter(odd)
        return a, b, c, d, e, f, g, h
    else:
        even, odd = _halve(_neighbours(y, BLOCKS))
        even0, even1 = _halve(even)
        odd0, odd1 = _halve(odd)
        p0, p4, p8, p12 = _quarter(even0)
        p2, p6, p10, p14 = _quarter(even1)
        p1, p5, p9, p13 = _quarter(odd0)
        p3, p7, p11, p15 = _quarter(odd1)
        is_rotated = (block < rotated).to(tl.int32) if ROTATES else 0
        source: tl.constexpr = _ROTATED_WORDS_PTX if ROTATES else _WORDS_PTX
        return tl.inline_asm_elementwise(
            source,
            _WORDS_CONSTRAINTS,
            [
                p0, p1, p2, p3, p4, p5, p6, p7, p8, p9, p10, p11, p12, p13, p14, p15, scale, is_rotated,
                tl.where(is_special, 0, -1),
            ],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=1,
        )  # fmt: skip


@triton.jit
def _vector(a, b, c, d):
    """Four (BLOCKS,) as the columns of (BLOCKS, 4)."""
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), (a.shape[0], 4))


@triton.jit
def _store_blocks(words, q_ptr, row, b4, b46, blocks, halves, data, width, BLOCKS: tl.constexpr):
    """`reorder_fold._store_words` of eight words a block."""
    a, b, c, d, e, f, g, h = words
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    is_half = block < halves
    is_plane = (block < b46) & (block >= halves)
    row_ptr = q_ptr.to(tl.pointer_type(tl.uint32)) + row * (width * 8)
    place = tl.multiple_of(block * 8 + tl.where(is_half, 0, (data - blocks) * 8), 8)
    ptrs = row_ptr + place[:, None] + tl.arange(0, 4)[None, :]
    mask = ((block < blocks) & (is_plane == 0))[:, None]
    upper = _vector(a, tl.where(is_half, c, b), tl.where(is_half, e, c), tl.where(is_half, g, d))
    lower = _vector(tl.where(is_half, b, e), tl.where(is_half, d, f), tl.where(is_half, f, g), h)
    tl.store(ptrs, upper, mask=mask)
    tl.store(ptrs + 4, lower, mask=mask)
    if b46 > halves:
        first = tl.multiple_of(block * 8 - 6 * ((block - b4) & 1), 2)
        planes = row_ptr + first[:, None] + tl.arange(0, 2)[None, :]
        _store_planes(planes, tl.join(a, b), tl.join(c, d), tl.join(e, f), tl.join(g, h), is_plane)
        if data > blocks:  # zeros in the place of the second of the last pair, which has none, and behind the data
            zeros = tl.zeros((BLOCKS, 2), tl.uint32)
            _store_planes(planes + 2, zeros, zeros, zeros, zeros, block == b46 - 1)
            if tl.program_id(1) == tl.num_programs(1) - 1:
                behind = data * 8 + tl.arange(0, 32)
                tl.store(row_ptr + behind, tl.zeros_like(behind), mask=behind < width * 8)


@triton.jit
def _store_planes(ptrs, first, second, third, fourth, mask):
    """Two words of each plane of a block, 16 bytes apart."""
    tl.store(ptrs, first, mask=mask[:, None])
    tl.store(ptrs + 4, second, mask=mask[:, None])
    tl.store(ptrs + 8, third, mask=mask[:, None])
    tl.store(ptrs + 12, fourth, mask=mask[:, None])

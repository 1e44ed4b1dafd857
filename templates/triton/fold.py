"""Device functions that unpack MX weights to folded E4M3, for FP8 MMA without block scales (sm_90).

`numerics.folding` says what folded means. Where it counts they are inline PTX on words of four bytes: table
look-ups by byte permutation, bit placement and packed conversion, two to three instructions a code. The interpreter,
which has no inline PTX, takes the branch beside it that says the same in integers.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def one_line(ptx: str) -> str:
    """Inductor writes constants into generated source, where a line break would not survive."""
    return " ".join(ptx.split())


def _word_ptx(source: str, destination: str) -> str:
    """Four E4M3 bytes times `factor`, rounded to E4M3 again."""
    return f"""
    mov.b32 {{first, second}}, {source};
    cvt.rn.f16x2.e4m3x2 a, first;
    cvt.rn.f16x2.e4m3x2 b, second;
    mul.rn.f16x2 a, a, factor;
    mul.rn.f16x2 b, b, factor;
    cvt.rn.satfinite.e4m3x2.f16x2 first, a;
    cvt.rn.satfinite.e4m3x2.f16x2 second, b;
    mov.b32 {destination}, {{first, second}};"""


@triton.constexpr_function
def fp6_planes(fp6):
    """How the fourth byte lies in the other three, see `PlaneLayout`: used, moves.

    The import stands here because Triton hashes, and Inductor copies, the globals that device functions name.
    """
    from micromix_compile.numerics.formats import fp6_format

    planes = fp6_format(fp6).planes
    assert planes is not None, "every FP6 format has its planes"
    return planes.used, planes.moves


def _fp6_ptx(fp6: str) -> str:
    """Three planes, $4 to $6, and factors to four words."""
    used, moves = fp6_planes(fp6)
    words = [
        f"\n    and.b32 t, ${4 + plane}, {used * 0x01010101:#x};" + _word_ptx("t", f"${plane}") for plane in range(3)
    ]
    gather = "\n    mov.b32 t, 0;" + "".join(
        f"""
    {"shl" if shift < 0 else "shr"}.b32 a, ${4 + plane}, {abs(shift)};
    lop3.b32 t, a, {bits * 0x01010101:#x}, t, 0xEA;"""
        for plane, bits, shift in moves
    )
    return one_line(f"{{ {_REGISTERS} {_FACTOR.format(7)}{''.join(words)}{gather}{_word_ptx('t', '$3')} }}")


_REGISTERS = ".reg .b16 first, second; .reg .b32 a, b, t, factor;"
_FACTOR = "prmt.b32 factor, ${}, 0, 0x0404;"  # float16, from its upper byte, twice
_E2M3_PTX = tl.constexpr(_fp6_ptx("e2m3"))
_E3M2_PTX = tl.constexpr(_fp6_ptx("e3m2"))
_E4M3_PTX = tl.constexpr(one_line(f"{{ {_REGISTERS} {_FACTOR.format(2)}{_word_ptx('$1', '$0')} }}"))

_TO_WORD_PTX = tl.constexpr(
    one_line("""{
    .reg .b16 low, high;
    cvt.rn.satfinite.e4m3x2.f32 low, $2, $1;
    cvt.rn.satfinite.e4m3x2.f32 high, $4, $3;
    mov.b32 $0, {low, high};
}""")
)

# A table of the magnitudes times 2**-5, a byte each, on which a step of one in the exponent adds 8 to all but the zero
# in its lowest byte. Signs are bits 3 of the nibbles, which prmt spreads over bytes. Products and shifts to the left go
# to another pipeline than the rest, which is the busier one.
_E2M1_PTX = tl.constexpr(
    one_line("""{
    .reg .b32 factor, low, high, code, upper, sign;
    and.b32 factor, $3, 0xFF;
    mad.lo.u32 low, factor, 0x01010100, 0x14100800;
    mad.lo.u32 high, factor, 0x01010101, 0x24201C18;
    and.b32 code, $2, 0x77777777;
    shr.u32 upper, $2, 16;
    prmt.b32 sign, 0x80808080, 0x80808080, $2;
    shl.b32 sign, sign, 7;
    prmt.b32 $0, low, high, code;
    lop3.b32 $0, sign, 0x80808080, $0, 0xEA;
    shr.u32 code, code, 16;
    prmt.b32 sign, 0x80808080, 0x80808080, upper;
    shl.b32 sign, sign, 7;
    prmt.b32 $1, low, high, code;
    lop3.b32 $1, sign, 0x80808080, $1, 0xEA;
}""")
)


@triton.jit
def fold_fp4(packed, factor):
    """Two E2M1 codes a byte (R, C) and the factors of their blocks (R, C) -> two (R, C) of E4M3 bytes.

    Of each four bytes, which hold eight channels, the first result has the first four and the second the rest.
    """
    if _INTERPRETED:
        shape: tl.constexpr = packed.shape
        pairs = tl.reshape(tl.join(packed & 0xF, packed >> 4), (shape[0], shape[1] // 4, 2, 4))
        low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
        return _fold_codes(tl.reshape(low, shape), factor), _fold_codes(tl.reshape(high, shape), factor)
    else:
        return tl.inline_asm_elementwise(
            _E2M1_PTX, "=&r,=&r,r,r", [packed, factor], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )


@triton.jit
def _fold_codes(code, factor):
    magnitude = code & 0x7
    table = tl.where(magnitude < 2, magnitude * 8, magnitude * 4 + 8)  # the bytes of the table above
    return (tl.where(magnitude == 0, 0, table + factor) | ((code & 0x8) << 4)).to(tl.uint8)


@triton.jit
def fold_fp6(plane0, plane1, plane2, factor, FP6: tl.constexpr):
    """Three byte planes of FP6 codes and factors, all (R, C) -> four (R, C) of E4M3 bytes, a plane each."""
    if _INTERPRETED:
        used, moves = fp6_planes(FP6)
        fourth = tl.zeros_like(plane0)
        for plane, bits, shift in moves:
            byte = (plane0, plane1, plane2)[plane]
            fourth = fourth | ((byte << -shift if shift < 0 else byte >> shift) & bits)
        return (
            fold_e4m3(plane0 & used, factor), fold_e4m3(plane1 & used, factor), fold_e4m3(plane2 & used, factor),
            fold_e4m3(fourth, factor),
        )  # fmt: skip
    else:
        source: tl.constexpr = _E3M2_PTX if FP6 == "e3m2" else _E2M3_PTX
        return tl.inline_asm_elementwise(
            source, "=&r,=&r,=&r,=&r,r,r,r,r", [plane0, plane1, plane2, factor],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def fold_e4m3(byte, factor):
    """E4M3 bytes times their factors, rounded to E4M3, all (R, C)."""
    if _INTERPRETED:
        value = (factor.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
        return float32_to_e4m3(e4m3_to_float32(byte) * value)
    else:
        return tl.inline_asm_elementwise(_E4M3_PTX, "=&r,r,r", [byte, factor], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def in_halves(first, second):
    """MXFP4 unpacked, two (R, C) -> (R, 2 * C) in `folding.fold_order`: 16 of the first, 16 of the second, and so on.

    Where the result is the left operand of FP8 MMA, this and `in_planes` only say which registers are which.
    """
    shape: tl.constexpr = (first.shape[0], first.shape[1] // 16, 16)
    joined = tl.join(tl.reshape(first, shape), tl.reshape(second, shape))
    return tl.reshape(tl.permute(joined, (0, 1, 3, 2)), (first.shape[0], 2 * first.shape[1]))


@triton.jit
def in_planes(plane0, plane1, plane2, plane3):
    """MXFP6 unpacked, four (R, C) -> (R, 4 * C) in `folding.fold_order`: 16 of each, and so on."""
    shape: tl.constexpr = (plane0.shape[0], plane0.shape[1] // 16, 16)
    pair0 = tl.join(tl.reshape(plane0, shape), tl.reshape(plane1, shape))
    pair1 = tl.join(tl.reshape(plane2, shape), tl.reshape(plane3, shape))
    joined = tl.permute(tl.join(pair0, pair1), (0, 1, 4, 3, 2))
    return tl.reshape(joined, (plane0.shape[0], 4 * plane0.shape[1]))


@triton.jit
def spread(per_block, WIDTH: tl.constexpr):
    """(R, B) -> (R, B * WIDTH), each entry repeated."""
    rows: tl.constexpr = per_block.shape[0]
    blocks: tl.constexpr = per_block.shape[1]
    return tl.reshape(tl.broadcast_to(per_block[:, :, None], (rows, blocks, WIDTH)), (rows, blocks * WIDTH))


@triton.jit
def data_blocks(blocks4, blocks6, blocks8):
    """Blocks of a row in `folding.fold_order` up to the last that is not zeros."""
    return blocks4 + tl.cdiv(blocks6, 2) * 2 + blocks8


@triton.jit
def row_blocks(blocks4, blocks6, blocks8):
    """`folding.fold_width`, in blocks."""
    blocks = data_blocks(blocks4, blocks6, blocks8)
    return tl.where(blocks6 % 2 == 0, blocks, tl.cdiv(blocks, 4) * 4)


@triton.jit
def words_of(blocks):
    """Words that the factors of a row's blocks take in one segment: see `folding.FACTOR_WORD`."""
    return tl.cdiv(blocks, 4)


@triton.jit
def factor_at(rows, word_stride, block):
    """Where a block's factor is. rows: pointers to a segment's first. word_stride: bytes from four to the next four."""
    return rows + block // 4 * word_stride + block % 4


@triton.jit
def of_group(tile, tiles0, tiles1, first, second, third, GROUPS: tl.constexpr):
    """Which of three is the weight's that a tile of weights is of. tiles0, tiles1: where the second and third begin."""
    mine = first
    if GROUPS > 1:
        mine = tl.where(tile >= tiles0, second, mine)
    if GROUPS > 2:
        mine = tl.where(tile >= tiles1, third, mine)
    return mine


@triton.jit
def e4m3_to_float32(byte):
    """Finite E4M3 bytes as float32, by integer operations."""
    byte = byte.to(tl.uint32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def words_of_e4m3(y):
    """float32 (R, C) rounded to E4M3, to nearest even, saturating: (R, C / 4) uint32 of four neighbours each.

    A NaN becomes anything. Inline, for of the bytes that Triton converts one by one ptxas 12.8 mixed some up with the
    register that stands for an undefined half: see `targets.ptx.Compiled.half_defined`.
    """
    shape: tl.constexpr = (y.shape[0], y.shape[1] // 4, 2, 2)
    if _INTERPRETED:
        even, odd = tl.split(tl.reshape(float32_to_e4m3(y).to(tl.uint32), shape))
        low, high = tl.split(even | (odd << 8))
        words = low | (high << 16)
    else:
        even, odd = tl.split(tl.reshape(y, shape))
        a, c = tl.split(even)
        b, d = tl.split(odd)
        words = tl.inline_asm_elementwise(
            _TO_WORD_PTX, "=r,f,f,f,f", [a, b, c, d], dtype=tl.uint32, is_pure=True, pack=1
        )
    return words


@triton.jit
def float32_to_e4m3(x):
    """float32 as E4M3 bytes, for the interpreter, whose own conversion does not round to nearest even."""
    bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
    power = tl.maximum(bits & 0x7F800000, 121 << 23).to(tl.float32, bitcast=True)  # from 2**-6, the least normal
    total = (bits.to(tl.float32, bitcast=True) + power * 1048576.0).to(tl.int32, bitcast=True)
    first: tl.constexpr = (121 + 20) << 23
    code = total + (total >> 20) - (first + (first >> 20))
    return (code | ((x.to(tl.int32, bitcast=True) >> 31) & 0x80)).to(tl.uint8)


@triton.jit
def blocks_of(odd4, odd6, odd8):
    """Blocks of each segment from 2 * blocks + 3: a number that no compiler specializes a kernel on."""
    return (odd4 >> 1) - 1, (odd6 >> 1) - 1, (odd8 >> 1) - 1

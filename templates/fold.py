"""Device functions for GPUs whose matrix instructions take no block scales (sm_90): packed MX weights to float16, or to
folded E4M3. See `micromix_compile.folding`.

Where it counts they are inline PTX on words of four bytes: bit placement, byte permutation and packed arithmetic, which
take two instructions a code. The interpreter, which has no inline PTX, takes the branch beside it that says
the same in integers. Factors, a byte a block, are the upper bytes of float16 powers of two.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def _word_to_float16(source: str, low: str, high: str) -> str:
    """PTX: four E4M3 bytes to two pairs of float16 times `factor`."""
    return f"""
    mov.b32 {{first, second}}, {source};
    cvt.rn.f16x2.e4m3x2 a, first;
    cvt.rn.f16x2.e4m3x2 b, second;
    mul.rn.f16x2 {low}, a, factor;
    mul.rn.f16x2 {high}, b, factor;"""


def _word_to_e4m3(source: str, destination: str) -> str:
    """PTX: four E4M3 bytes times `factor`, rounded to E4M3 again."""
    return f"""{_word_to_float16(source, "a", "b")}
    cvt.rn.satfinite.e4m3x2.f16x2 first, a;
    cvt.rn.satfinite.e4m3x2.f16x2 second, b;
    mov.b32 {destination}, {{first, second}};"""


def _planes(first: int, used: int, moves: tuple[tuple[int, int, int], ...]) -> list[str]:
    """PTX: steps that leave E4M3 words of three planes, operands `first` on, and of the hidden fourth in `t`, in turn.

    used, moves: see `packing`.
    """
    gather = "mov.b32 t, 0;" + "".join(
        f"""
    {"shl" if shift < 0 else "shr"}.b32 a, ${first + plane}, {abs(shift)};
    lop3.b32 t, a, {bits * 0x01010101:#x}, t, 0xEA;"""
        for plane, bits, shift in moves
    )
    return [f"and.b32 t, ${first + plane}, {used * 0x01010101:#x};" for plane in range(3)] + [gather]


_REGISTERS = ".reg .b16 first, second; .reg .b32 a, b, t, sign, factor;"
_E2M3_PLANES = (0x9F, ((0, 0x80, -1), (0, 0x10, 1), (1, 0x0C, 3), (2, 0x03, 5)))
_E3M2_PLANES = (0xBE, ((0, 0x82, -1), (1, 0x20, 1), (1, 0x04, -2), (2, 0x10, 2), (2, 0x08, -3)))


def _factor(operand: int) -> str:
    """PTX: `factor` from the byte that all bytes of an operand are: the upper byte of both float16 halves."""
    return f"prmt.b32 factor, ${operand}, 0, 0x0404;"


def _fp6_ptx(to_float16: bool, used: int, moves: tuple[tuple[int, int, int], ...]) -> str:
    """PTX: three planes and factors to four words of float16 pairs or of E4M3."""
    outputs = 8 if to_float16 else 4
    words = []
    for plane, step in enumerate(_planes(outputs, used, moves)):
        last = _word_to_float16("t", f"${2 * plane}", f"${2 * plane + 1}") if to_float16 else _word_to_e4m3("t", f"${plane}")
        words.append(f"\n    {step}{last}")
    return f"{{ {_REGISTERS}\n    {_factor(outputs + 3)}{''.join(words)}\n}}"


# The bits of four E2M1 codes are those of four E4M3 numbers of 2**-6 times their values.
_FP4_TO_FLOAT16 = tl.constexpr(
    f"""{{ {_REGISTERS}
    {_factor(5)}
    shl.b32 t, $4, 2;
    and.b32 t, t, 0x1C1C1C1C;
    shl.b32 sign, $4, 4;
    lop3.b32 t, sign, 0x80808080, t, 0xEA;{_word_to_float16("t", "$0", "$1")}
    shr.u32 t, $4, 2;
    and.b32 t, t, 0x1C1C1C1C;
    lop3.b32 t, $4, 0x80808080, t, 0xEA;{_word_to_float16("t", "$2", "$3")}
}}"""
)
_E2M3_TO_FLOAT16 = tl.constexpr(_fp6_ptx(True, *_E2M3_PLANES))
_E3M2_TO_FLOAT16 = tl.constexpr(_fp6_ptx(True, *_E3M2_PLANES))
_E4M3_TO_FLOAT16 = tl.constexpr(f"{{ {_REGISTERS}\n    {_factor(3)}{_word_to_float16('$2', '$0', '$1')}\n}}")
_E2M3_FOLDED = tl.constexpr(_fp6_ptx(False, *_E2M3_PLANES))
_E3M2_FOLDED = tl.constexpr(_fp6_ptx(False, *_E3M2_PLANES))
_E4M3_FOLDED = tl.constexpr(f"{{ {_REGISTERS}\n    {_factor(2)}{_word_to_e4m3('$1', '$0')}\n}}")

# Two words of activations, channels 0 to 3 and 4 to 7 of eight, to float16 in the order of the nibbles of weights: even
# channels, then odd ones.
_X_TO_FLOAT16 = tl.constexpr(
    f"""{{ {_REGISTERS}
    prmt.b32 t, $4, $5, 0x6420;
    mov.b32 {{first, second}}, t;
    cvt.rn.f16x2.e4m3x2 $0, first;
    cvt.rn.f16x2.e4m3x2 $1, second;
    prmt.b32 t, $4, $5, 0x7531;
    mov.b32 {{first, second}}, t;
    cvt.rn.f16x2.e4m3x2 $2, first;
    cvt.rn.f16x2.e4m3x2 $3, second;
}}"""
)

# E2M1 to folded E4M3: a table of the magnitudes times 2**-5, a byte each, on which a step of one in the exponent adds 8
# to all but the zero in its lowest byte.
_FP4_FOLDED = tl.constexpr(
    """{
    .reg .b32 low, high, code, upper, sign;
    and.b32 low, $3, 0xFFFFFF00;
    add.u32 low, low, 0x14100800;
    add.u32 high, $3, 0x24201C18;
    shr.u32 upper, $2, 16;
    and.b32 code, $2, 0x7777;
    prmt.b32 code, low, high, code;
    prmt.b32 sign, 0x80808080, 0x80808080, $2;
    shl.b32 sign, sign, 7;
    lop3.b32 $0, sign, 0x80808080, code, 0xEA;
    and.b32 code, upper, 0x7777;
    prmt.b32 code, low, high, code;
    prmt.b32 sign, 0x80808080, 0x80808080, upper;
    shl.b32 sign, sign, 7;
    lop3.b32 $1, sign, 0x80808080, code, 0xEA;
}"""
)


@triton.jit
def fp4_to_float16(packed, factor):
    """Two E2M1 codes a byte (..., C) times 2**-6 and `factor` -> two (..., C) of float16: even channels, odd ones."""
    if _INTERPRETED:
        scale = _factor_value(factor) * 0.015625  # 2**-6
        return (_fp4_value(packed) * scale).to(tl.float16), (_fp4_value(packed >> 4) * scale).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _FP4_TO_FLOAT16, "=r,=r,=r,=r,r,r", [packed, factor], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def x_to_float16(low, high):
    """E4M3 activations, channels 0 to 3 and 4 to 7 of each eight -> float16 in the order of `fp4_to_float16`."""
    if _INTERPRETED:
        rows: tl.constexpr = low.numel // 4
        pairs = tl.reshape(tl.permute(tl.reshape(tl.join(low, high), (rows, 4, 2)), (0, 2, 1)), (rows, 4, 2))
        first, second = tl.split(pairs)  # of channels 0 to 7 as they are, the even and the odd ones
        first = tl.reshape(first, low.shape)
        second = tl.reshape(second, low.shape)
        return e4m3_to_float32(first).to(tl.float16), e4m3_to_float32(second).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _X_TO_FLOAT16, "=r,=r,=r,=r,r,r", [low, high], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )


@triton.jit
def fp6_to_float16(plane0, plane1, plane2, factor, FP6: tl.constexpr):
    """Three byte planes (..., C) of FP6 codes, as E4M3 values times `factor` -> four (..., C) of float16, a plane each."""
    if _INTERPRETED:
        fourth = _fourth_plane(plane0, plane1, plane2, FP6)
        used: tl.constexpr = 0xBE if FP6 == "e3m2" else 0x9F
        return (
            e4m3_to_float16(plane0 & used, factor), e4m3_to_float16(plane1 & used, factor),
            e4m3_to_float16(plane2 & used, factor), e4m3_to_float16(fourth, factor),
        )  # fmt: skip
    else:
        source: tl.constexpr = _E3M2_TO_FLOAT16 if FP6 == "e3m2" else _E2M3_TO_FLOAT16
        return tl.inline_asm_elementwise(
            source, "=r,=r,=r,=r,=r,=r,=r,=r,r,r,r,r", [plane0, plane1, plane2, factor],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def e4m3_to_float16(byte, factor):
    """E4M3 bytes times `factor` -> float16."""
    if _INTERPRETED:
        return (e4m3_to_float32(byte) * _factor_value(factor)).to(tl.float16)
    else:
        return tl.inline_asm_elementwise(
            _E4M3_TO_FLOAT16, "=r,=r,r,r", [byte, factor], dtype=tl.float16, is_pure=True, pack=4
        )


@triton.jit
def fold_fp4(packed, step):
    """As `fp4_to_float16`, to two of E4M3 bytes: channels 0 to 3 and 4 to 7 of each eight. step: from `fold_step`."""
    if _INTERPRETED:
        low, high = _nibbles(packed)
        return _fold_fp4_bytes(low, step), _fold_fp4_bytes(high, step)
    else:
        return tl.inline_asm_elementwise(
            _FP4_FOLDED, "=r,=r,r,r", [packed, step], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )


@triton.jit
def fold_fp6(plane0, plane1, plane2, factor, FP6: tl.constexpr):
    """As `fp6_to_float16`, rounded to four of E4M3 bytes. factor: from `fold_factor`."""
    if _INTERPRETED:
        fourth = _fourth_plane(plane0, plane1, plane2, FP6)
        used: tl.constexpr = 0xBE if FP6 == "e3m2" else 0x9F
        return (
            _fold_bytes(plane0 & used, factor), _fold_bytes(plane1 & used, factor),
            _fold_bytes(plane2 & used, factor), _fold_bytes(fourth, factor),
        )  # fmt: skip
    else:
        source: tl.constexpr = _E3M2_FOLDED if FP6 == "e3m2" else _E2M3_FOLDED
        return tl.inline_asm_elementwise(
            source, "=r,=r,=r,=r,r,r,r,r", [plane0, plane1, plane2, factor],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def fold_e4m3(byte, factor):
    """E4M3 bytes times `factor`, from `fold_factor`, rounded to E4M3."""
    if _INTERPRETED:
        return _fold_bytes(byte, factor)
    else:
        return tl.inline_asm_elementwise(_E4M3_FOLDED, "=r,r,r", [byte, factor], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def fold_step(factor):
    """Of MXFP4 blocks: eight times their exponent relative to -5; blocks with less count as -5."""
    return ((tl.maximum(factor >> 2, 11) - 11) << 3).to(tl.uint8)


@triton.jit
def fold_factor(factor):
    """`factor` times 2**5, the two that are float16 subnormals included."""
    return tl.where(factor >= 4, factor + 20, tl.where(factor == 2, 20, tl.where(factor == 1, 16, 0))).to(tl.uint8)


@triton.jit
def spread(per_block, WIDTH: tl.constexpr):
    """(..., B) -> (..., B * WIDTH), each entry repeated. Two or three dimensions."""
    if len(per_block.shape) == 2:
        shape: tl.constexpr = (per_block.shape[0], per_block.shape[1], WIDTH)
        flat: tl.constexpr = (per_block.shape[0], per_block.shape[1] * WIDTH)
        return tl.reshape(tl.broadcast_to(per_block[:, :, None], shape), flat)
    else:
        shape: tl.constexpr = (per_block.shape[0], per_block.shape[1], per_block.shape[2], WIDTH)
        flat: tl.constexpr = (per_block.shape[0], per_block.shape[1], per_block.shape[2] * WIDTH)
        return tl.reshape(tl.broadcast_to(per_block[:, :, :, None], shape), flat)


@triton.jit
def e4m3_to_float32(byte):
    """Finite E4M3 bytes as float32, by integer operations."""
    byte = byte.to(tl.uint32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def float32_to_e4m3(x):
    """float32 rounded to E4M3 bytes, to nearest even, saturating; a NaN becomes anything."""
    if _INTERPRETED:  # its own conversion does not round to nearest even
        bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
        power = tl.maximum(bits & 0x7F800000, 121 << 23).to(tl.float32, bitcast=True)  # from 2**-6, the least normal
        total = (bits.to(tl.float32, bitcast=True) + power * 1048576.0).to(tl.int32, bitcast=True)
        first: tl.constexpr = (121 + 20) << 23
        code = total + (total >> 20) - (first + (first >> 20))
        return (code | ((x.to(tl.int32, bitcast=True) >> 31) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)


# What follows serves the interpreter only.


@triton.jit
def _nibbles(packed):
    """Bytes of channels 0 to 3 and of 4 to 7 of each eight, both in the shape of `packed`; its last extent is even."""
    rows: tl.constexpr = packed.numel // 4
    pairs = tl.reshape(tl.join(packed & 0xF, packed >> 4), (rows, 2, 4))
    low, high = tl.split(tl.permute(pairs, (0, 2, 1)))
    return tl.reshape(low, packed.shape), tl.reshape(high, packed.shape)


@triton.jit
def _fp4_value(code):
    magnitude = (code & 0x7).to(tl.float32)
    exponent = (code & 0x7) >> 1
    mantissa = (code & 0x1).to(tl.float32)
    value = tl.where(exponent == 0, magnitude * 0.5, (1.0 + mantissa * 0.5) * tl.exp2(exponent.to(tl.float32) - 1.0))
    return tl.where((code & 0x8) != 0, -value, value)


@triton.jit
def _factor_value(factor):
    return (factor.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _fold_fp4_bytes(code, step):
    magnitude = code & 0x7
    table = tl.where(magnitude < 2, magnitude * 8, magnitude * 4 + 8)  # the bytes of the table above
    return (tl.where(magnitude == 0, 0, table + step) | ((code & 0x8) << 4)).to(tl.uint8)


@triton.jit
def _fold_bytes(byte, factor):
    return float32_to_e4m3(e4m3_to_float32(byte) * _factor_value(factor))


@triton.jit
def _fourth_plane(plane0, plane1, plane2, FP6: tl.constexpr):
    if FP6 == "e3m2":
        fourth = ((plane0 & 0x41) << 1) | ((plane1 >> 1) & 0x20) | ((plane1 << 2) & 0x04)
        fourth = fourth | ((plane2 >> 2) & 0x10) | ((plane2 << 3) & 0x08)
    else:
        fourth = ((plane0 << 1) & 0x80) | ((plane0 >> 1) & 0x10)
        fourth = fourth | ((plane1 >> 3) & 0x0C) | ((plane2 >> 5) & 0x03)
    return fourth

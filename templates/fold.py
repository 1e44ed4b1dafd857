"""Device functions that fold block scales into E4M3, for MMA without block scales (sm_90). See `micromix_compile.folding`.

A folded operand is E4M3 throughout, with one power of two a row: element * 2**(block exponent - row exponent), rounded
to E4M3. On a GPU the three decoders below work on words of four codes by byte permutation and packed conversion; the
interpreter, which has no inline PTX, takes the branch beside them that says the same in integers.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# The table's bytes are the E4M3 codes of the magnitudes of E2M1 times 2**-5. A step of one in the exponent adds 8 to all
# but the zero, which is the lowest byte.
_FOLD_FP4 = tl.constexpr(
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


def _factor(operand: int) -> str:
    """PTX: `factor` = 2**(t - 15) twice in float16, t being each byte of the operand."""
    return f"and.b32 factor, ${operand}, 0x00FF00FF; shl.b32 factor, factor, 10;"


def _scale_word(source: str, destination: str) -> str:
    """PTX: four E4M3 bytes times `factor`, rounded to E4M3."""
    return f"""
    mov.b32 {{low, high}}, {source};
    cvt.rn.f16x2.e4m3x2 a, low;
    cvt.rn.f16x2.e4m3x2 b, high;
    mul.rn.f16x2 a, a, factor;
    mul.rn.f16x2 b, b, factor;
    cvt.rn.satfinite.e4m3x2.f16x2 low, a;
    cvt.rn.satfinite.e4m3x2.f16x2 high, b;
    mov.b32 {destination}, {{low, high}};"""


def _fold_fp6_ptx(used: int, moves: tuple[tuple[int, int, int], ...]) -> str:
    """PTX: three planes, $4 to $6, to four folded words; see `packing` for what `used` and `moves` are."""
    gather = "".join(
        f"""
    {"shl" if shift < 0 else "shr"}.b32 t, ${4 + plane}, {abs(shift)};
    lop3.b32 fourth, t, {bits * 0x01010101:#x}, fourth, 0xEA;"""
        for plane, bits, shift in moves
    )
    words = "".join(
        f"\n    and.b32 t, ${4 + plane}, {used * 0x01010101:#x};" + _scale_word("t", f"${plane}") for plane in range(3)
    )
    return f"""{{
    .reg .b16 low, high;
    .reg .b32 a, b, factor, fourth, t;
    {_factor(7)}
    mov.b32 fourth, 0;{gather}{words}{_scale_word("fourth", "$3")}
}}"""


_FOLD_E4M3 = tl.constexpr(
    f"""{{
    .reg .b16 low, high;
    .reg .b32 a, b, factor;
    {_factor(2)}{_scale_word("$1", "$0")}
}}"""
)
_FOLD_E2M3 = tl.constexpr(_fold_fp6_ptx(0x9F, ((0, 0x80, -1), (0, 0x10, 1), (1, 0x0C, 3), (2, 0x03, 5))))
_FOLD_E3M2 = tl.constexpr(
    _fold_fp6_ptx(0xBE, ((0, 0x82, -1), (1, 0x20, 1), (1, 0x04, -2), (2, 0x10, 2), (2, 0x08, -3)))
)


@triton.jit
def spread(per_block, WIDTH: tl.constexpr):
    """(R, B) -> (R, B * WIDTH), each entry repeated."""
    rows: tl.constexpr = per_block.shape[0]
    blocks: tl.constexpr = per_block.shape[1]
    return tl.reshape(tl.broadcast_to(per_block[:, :, None], (rows, blocks, WIDTH)), (rows, blocks * WIDTH))


@triton.jit
def fp4_exponent(scale, row_exponent):
    """What `fold_fp4` takes: exponents of scale bytes (R, B) less those of their rows (R, 1), plus 5, at least 0."""
    return tl.maximum(scale.to(tl.int32) - (row_exponent - 5), 0).to(tl.uint8)


@triton.jit
def fold_power(scale, row_exponent):
    """What `fold_e4m3` and `fold_fp6` take: exponents relative to those of the rows, plus 15; 0 for less than 2**-14."""
    return tl.minimum(tl.maximum(scale.to(tl.int32) - (row_exponent - 15), 0), 30).to(tl.uint8)


@triton.jit
def fold_fp4(packed, exponent):
    """Two E2M1 codes a byte (R, C) and exponents + 5 (R, C) of their blocks, 0 to 11 -> two (R, C) of E4M3 bytes.

    Of each four bytes, which hold channels 8 w .. 8 w + 7, the first result has the first four and the second the rest.
    """
    step = exponent << 3
    if _INTERPRETED:
        nibbles = tl.reshape(tl.join(packed & 0xF, packed >> 4), (packed.shape[0], packed.shape[1] // 4, 2, 4))
        halves = tl.permute(nibbles, (0, 1, 3, 2))
        first, second = tl.split(halves)
        shape: tl.constexpr = packed.shape
        return _fp4_bytes(tl.reshape(first, shape), step), _fp4_bytes(tl.reshape(second, shape), step)
    else:
        return tl.inline_asm_elementwise(
            _FOLD_FP4, "=r,=r,r,r", [packed, step], dtype=(tl.uint8, tl.uint8), is_pure=True, pack=4
        )


@triton.jit
def _fp4_bytes(code, step):
    magnitude = code & 0x7
    table = tl.where(magnitude < 2, magnitude * 8, magnitude * 4 + 8)  # the bytes of the table above
    return (tl.where(magnitude == 0, 0, table + step) | ((code & 0x8) << 4)).to(tl.uint8)


@triton.jit
def fold_fp6(plane0, plane1, plane2, power, FP6: tl.constexpr):
    """Three byte planes (R, C) of FP6 codes, times 2**(power - 15) -> four (R, C) of E4M3 bytes, a plane each."""
    if _INTERPRETED:
        if FP6 == "e3m2":
            used: tl.constexpr = 0xBE
            fourth = ((plane0 & 0x41) << 1) | ((plane1 >> 1) & 0x20) | ((plane1 << 2) & 0x04)
            fourth = fourth | ((plane2 >> 2) & 0x10) | ((plane2 << 3) & 0x08)
        else:
            used: tl.constexpr = 0x9F
            fourth = ((plane0 << 1) & 0x80) | ((plane0 >> 1) & 0x10)
            fourth = fourth | ((plane1 >> 3) & 0x0C) | ((plane2 >> 5) & 0x03)
        return (
            fold_e4m3(plane0 & used, power), fold_e4m3(plane1 & used, power), fold_e4m3(plane2 & used, power),
            fold_e4m3(fourth, power),
        )  # fmt: skip
    else:
        source: tl.constexpr = _FOLD_E3M2 if FP6 == "e3m2" else _FOLD_E2M3
        return tl.inline_asm_elementwise(
            source, "=r,=r,=r,=r,r,r,r,r", [plane0, plane1, plane2, power],
            dtype=(tl.uint8, tl.uint8, tl.uint8, tl.uint8), is_pure=True, pack=4,
        )  # fmt: skip


@triton.jit
def fold_e4m3(byte, power):
    """E4M3 bytes (R, C) times 2**(power - 15), power (R, C) uint8 from 1 to 30, rounded to E4M3; a power of 0 is 0."""
    if _INTERPRETED:
        scale = ((power.to(tl.int32) + 112) << 23).to(tl.float32, bitcast=True)
        scaled = e4m3_to_float32(byte) * tl.where(power == 0, 0.0, scale)
        return float32_to_e4m3(scaled)
    else:
        return tl.inline_asm_elementwise(_FOLD_E4M3, "=r,r,r", [byte, power], dtype=tl.uint8, is_pure=True, pack=4)


@triton.jit
def e4m3_to_float32(byte):
    """Finite E4M3 bytes as float32, by integer operations."""
    byte = byte.to(tl.uint32)
    bits = ((byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**120


@triton.jit
def float32_to_e4m3(x):
    """Float32 rounded to E4M3 bytes, to nearest even, saturating; NaN is anything."""
    if _INTERPRETED:  # its own conversion does not round to nearest even
        bits = tl.minimum(tl.abs(x), 448.0).to(tl.int32, bitcast=True)
        power = tl.maximum(bits & 0x7F800000, 121 << 23).to(tl.float32, bitcast=True)  # from 2**-6, the least normal
        total = (bits.to(tl.float32, bitcast=True) + power * 1048576.0).to(tl.int32, bitcast=True)
        first: tl.constexpr = (121 + 20) << 23
        code = total + (total >> 20) - (first + (first >> 20))
        return (code | ((x.to(tl.int32, bitcast=True) >> 31) & 0x80)).to(tl.uint8)
    else:
        return x.to(tl.float8e4nv).to(tl.uint8, bitcast=True)

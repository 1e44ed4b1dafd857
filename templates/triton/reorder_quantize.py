"""Reorder and quantize on a GPU, behind nothing, an RMSNorm or SiLU·mul: one launch writes all parts of all rows.

A program takes one row, or a part of it. It reads the row in memory order, where loads are wide, computes what stands
before the quantizer, and reorders the result through shared memory: gathering from global memory takes half as long
again (90 against 58 us, H200, 8192 x 4096 bfloat16). One tile holds blocks of all three formats, so what differs
between formats is data (one number a block), not code.

Every rounding of the quantizer is made of integer operations and float32 additions, which are the same on every target
and in Triton's interpreter. `reference` is the contract: equal bytes. Launched by `targets.quantizers`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from micromix_compile.templates.triton.rotate import rotate_blocks

# The interpreter's cast to bfloat16 truncates; a GPU's rounds to nearest even.
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Two float32 to bfloat16, times two bfloat16: 3.5 instructions a channel less behind an RMSNorm than one by one, and
# F2FP for F2F (sm_90a).
_ROUND_AND_MULTIPLY_PTX = tl.constexpr(
    "{ .reg .b32 pair, zeros; mov.b32 zeros, 0x80008000; cvt.rn.bf16x2.f32 pair, $2, $1; "
    "fma.rn.bf16x2 $0, pair, $3, zeros; }"
)


@triton.jit
def reorder_quantize_kernel(
    x_ptr,  # (M, C)
    other_ptr,  # rms_norm: weight (C,), any float dtype; silu_mul: up (M, C); none: unused
    channel_perm_ptr,  # (K,) any integer dtype, -1 reads as zero
    q4_ptr,  # (M, b4 * 16) uint8, for b4 blocks of 32 channels in MXFP4
    q6_ptr,  # (M, b6 * 32) uint8
    q8_ptr,  # (M, b8 * 32) uint8; all K channels unless ACTIVATIONS is "same", the two before are unused then
    scale_ptr,  # (M, b4 + b6 + b8) uint8, K = 32 * (b4 + b6 + b8)
    C,
    stride_x,
    stride_other,
    odd4,  # 2 * b4 + 3, and so on: compilers make another kernel for an argument of 1 or a multiple of 16
    odd6,
    odd8,
    odd_rotated,  # of the blocks that are rotated, or None if none is
    PRODUCER: tl.constexpr,  # "none", "rms_norm" or "silu_mul"
    EPS: tl.constexpr,
    FP6: tl.constexpr,  # "e2m3" or "e3m2"
    SCALE_ROUNDING: tl.constexpr,  # "floor", "rceil", "even" or "fit"
    ACTIVATIONS: tl.constexpr,  # "same", "fp8" or "mxfp6"
    FORMATS: tl.constexpr,  # digest of the table that `_field` reads, which Triton's cache would not see otherwise
    BLOCK_C: tl.constexpr,  # input channels in shared memory at a time; a power of two
    ROW_CHUNKS: tl.constexpr,  # ceil(C / BLOCK_C)
    HAS_ROOM: tl.constexpr,  # see `quantizers.QuantizerTile`
    BLOCK_K: tl.constexpr,  # output channels of one program; a power of two, at least 32
):
    """Quantize BLOCK_K output channels, from program_id(1) * BLOCK_K on, of row program_id(0)."""
    tl.static_assert(PRODUCER == "none" or PRODUCER == "rms_norm" or PRODUCER == "silu_mul", "unknown PRODUCER")
    tl.static_assert(BLOCK_K % 32 == 0, "BLOCK_K must hold whole blocks")
    BLOCKS: tl.constexpr = BLOCK_K // 32
    b4 = (odd4 >> 1) - 1
    b6 = (odd6 >> 1) - 1
    b8 = (odd8 >> 1) - 1
    blocks = b4 + b6 + b8
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    # Beyond K the index is whatever it is: `gather_row` reads inside the row for any, and nothing is stored.
    index = tl.load(channel_perm_ptr + k, mask=k < blocks * 32).to(tl.int32)
    row = tl.program_id(0).to(tl.int64)
    y, amax = gather_row(
        x_ptr + row * stride_x, other_ptr, row * stride_other, None, None, index, C, PRODUCER, False, EPS, BLOCK_C,
        ROW_CHUNKS, HAS_ROOM, PTX=False,
    )  # fmt: skip
    y = to_float32(tl.reshape(y, (BLOCKS, 32)))
    if odd_rotated is not None:
        y = rotate_blocks(y, block < (odd_rotated >> 1) - 1)
    if ACTIVATIONS == "same":
        _quantize_blocks(
            y, block, q4_ptr + row * (b4 * 16), q6_ptr + row * (b6 * 32), q8_ptr + row * (b8 * 32),
            scale_ptr + row * blocks, b4, b6, b8, FP6, SCALE_ROUNDING,
        )  # fmt: skip
    else:
        _quantize_to_bytes(
            y, block, amax, q8_ptr + row * (blocks * 32), scale_ptr + row * blocks, b4 + b6, blocks, FP6,
            SCALE_ROUNDING, ACTIVATIONS,
        )  # fmt: skip


@triton.jit
def gather_row(
    x_ptr,
    other_ptr,
    other_offset,
    residual_ptr,
    total_ptr,
    index,
    C,
    PRODUCER: tl.constexpr,
    ADDS: tl.constexpr,
    EPS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
    HAS_ROOM: tl.constexpr,
    PTX: tl.constexpr,
):
    """produced row[index], zero where index is outside [0, C), and the largest magnitude of all the row.

    index: (BLOCK_K,) int32. The magnitude is of `magnitude_bits`. ADDS: in front of an RMSNorm x is a sum with the
    residual, which is written to total_ptr. PTX: inline PTX may be used.
    """
    tl.static_assert(PRODUCER == "rms_norm" or not ADDS, "only a norm stands behind a sum")
    rstd = 1.0
    if PRODUCER == "rms_norm":
        rstd = row_rstd(x_ptr, residual_ptr, total_ptr, C, ADDS, EPS, BLOCK_C, ROW_CHUNKS)
    if PRODUCER == "silu_mul":
        other_ptr += other_offset
    row = produce(x_ptr, other_ptr, residual_ptr, tl.arange(0, BLOCK_C), C, rstd, PRODUCER, ADDS, PTX)
    if HAS_ROOM:  # the last channel of the chunk is a zero behind the row
        y = tl.gather(row, tl.minimum(index.to(tl.uint32, bitcast=True), BLOCK_C - 1).to(tl.int32, bitcast=True), 0)
    else:
        y = _gather_chunk(row, index, tl.zeros(index.shape, row.dtype))
    amax = tl.max(magnitude_bits(to_float32(row)), 0)
    for chunk in tl.static_range(1, ROW_CHUNKS):
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        row = produce(x_ptr, other_ptr, residual_ptr, c, C, rstd, PRODUCER, ADDS, PTX)
        y = _gather_chunk(row, index - chunk * BLOCK_C, y)
        amax = tl.maximum(amax, tl.max(magnitude_bits(to_float32(row)), 0))
    return y, amax


@triton.jit
def _gather_chunk(row, index, y):
    """row[index], and y where the index is outside."""
    gathered = tl.gather(row, index & (row.shape[0] - 1), 0)
    return tl.where(index.to(tl.uint32, bitcast=True) < row.shape[0], gathered, y)


@triton.jit
def magnitude_bits(y):
    """The bits of |y| for float32, which are in order of magnitude, infinity and NaN behind all others."""
    return y.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _load_x(x_ptr, residual_ptr, c, C, ADDS: tl.constexpr):
    """Channels `c` of x, or of x plus the residual, zero from C on."""
    x = tl.load(x_ptr + c, mask=c < C, other=0.0)
    if ADDS:
        x = round_to(to_float32(x) + to_float32(tl.load(residual_ptr + c, mask=c < C, other=0.0)), x.dtype)
    return x


@triton.jit
def produce(x_ptr, other_ptr, residual_ptr, c, C, rstd, PRODUCER: tl.constexpr, ADDS: tl.constexpr, PTX: tl.constexpr):
    """Channels `c` of the quantizer's input, zero from C on. Every step rounds as eager PyTorch does.

    In x's dtype; in float32 if that of the weight differs, as PyTorch promotes the product. From C on NaN instead of
    zero behind an RMSNorm whose rstd is NaN or infinite.
    """
    x = _load_x(x_ptr, residual_ptr, c, C, ADDS)
    if PRODUCER == "none":
        y = x
    else:
        other = tl.load(other_ptr + c, mask=c < C, other=0.0)
        x32 = to_float32(x)
        if PRODUCER == "rms_norm":
            x32 = x32 * rstd
        else:
            x32 = x32 / (1.0 + tl.exp(-x32))
        if PTX and not _INTERPRETED and x.dtype == tl.bfloat16 and other.dtype == tl.bfloat16:
            y = tl.inline_asm_elementwise(
                _ROUND_AND_MULTIPLY_PTX, "=r,r,r,r", [x32, other], dtype=tl.bfloat16, is_pure=True, pack=2
            )
        else:
            y = to_float32(round_to(x32, x.dtype)) * to_float32(other)
            if other.dtype == x.dtype:
                y = round_to(y, x.dtype)
    return y


@triton.jit
def row_rstd(
    x_ptr, residual_ptr, total_ptr, C, ADDS: tl.constexpr, EPS: tl.constexpr, BLOCK_C: tl.constexpr,
    ROW_CHUNKS: tl.constexpr,
):  # fmt: skip
    """1 / sqrt(mean(x**2) + eps) of one row, in float32; the first of its programs stores a sum."""
    total = tl.zeros((BLOCK_C,), tl.float32)
    for chunk in tl.static_range(ROW_CHUNKS):
        c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
        x = _load_x(x_ptr, residual_ptr, c, C, ADDS)
        if ADDS:
            tl.store(total_ptr + c, x, mask=(c < C) & (tl.program_id(1) == 0))
        x = to_float32(x)
        total += x * x
    return tl.rsqrt(tl.sum(total, 0) / C + EPS)


@triton.jit
def to_float32(x):
    """x as float32. The bits of a bfloat16 are moved, which the interpreter gets right for subnormals too."""
    if x.dtype == tl.bfloat16:
        y = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        y = x.to(tl.float32)
    return y


@triton.jit
def round_to(x, DTYPE: tl.constexpr):
    """float32 rounded to DTYPE, to nearest even."""
    if _INTERPRETED and DTYPE == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(DTYPE)
    return y


@triton.jit
def _quantize_blocks(
    y,  # (BLOCKS, 32) float32
    block,  # (BLOCKS,) int32: the numbers of the blocks
    q4_ptr,
    q6_ptr,
    q8_ptr,
    scale_ptr,
    b4,
    b6,
    b8,
    FP6: tl.constexpr,
    SCALE_ROUNDING: tl.constexpr,
):
    """Quantize blocks of one row, each to its format, and store codes and scales; past the last block store nothing."""
    BLOCKS: tl.constexpr = y.shape[0]
    is4 = block < b4
    is8 = block >= b4 + b6
    exists = block < b4 + b6 + b8
    is6 = (block >= b4) & (block < b4 + b6)

    byte = scale_byte(tl.max(magnitude_bits(y), 1), is4, is8, FP6, SCALE_ROUNDING)
    baked, excess = _bake(byte, is6, FP6)
    tl.store(scale_ptr + block, (baked - excess).to(tl.uint8), mask=exists)

    # An FP4 block has its sign in bit 3, the others in bit 7.
    sign = (y.to(tl.int32, bitcast=True) >> 31) & tl.where(is4, 0x08, 0x80)[:, None]
    code = _encode(y, byte, is4, is8, FP6, SCALE_ROUNDING) | sign
    low, high = tl.split(tl.reshape(code, (BLOCKS, 16, 2)))
    q4_ptrs = q4_ptr + block[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(q4_ptrs, (low | (high << 4)).to(tl.uint8), mask=is4[:, None])
    k = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    q6_ptrs = q6_ptr + (k - b4 * 32)
    q8_ptrs = q8_ptr + (k - (b4 + b6) * 32)
    tl.store(q6_ptrs, code.to(tl.uint8), mask=is6[:, None])
    tl.store(q8_ptrs, code.to(tl.uint8), mask=(is8 & exists)[:, None])

    # What hardly ever happens is written over afterwards: done in place it would cost every block registers and time.
    is_nan = exists & (byte == 255)
    if tl.max((is_nan | (excess > 0)).to(tl.int32), 0) > 0:
        tl.debug_barrier()  # another thread may have stored the bytes that are read and replaced here
        nothing = tl.zeros((BLOCKS, 32), tl.uint8)
        tl.store(q4_ptrs, tl.zeros((BLOCKS, 16), tl.uint8), mask=(is_nan & is4)[:, None])
        tl.store(q6_ptrs, nothing, mask=(is_nan & is6)[:, None])
        tl.store(q8_ptrs, nothing, mask=(is_nan & is8)[:, None])
        _raise_e4m3(q6_ptrs, excess)


@triton.jit
def _quantize_to_bytes(
    y, block, amax, q_ptr, scale_ptr, narrow, blocks, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr,
    ACTIVATIONS: tl.constexpr,
):  # fmt: skip
    """`_quantize_blocks` where all channels become E4M3 bytes: by one scale a row, or `narrow` blocks as MXFP6.

    amax: `magnitude_bits` of the row's largest value.
    """
    BLOCKS: tl.constexpr = y.shape[0]
    exists = block < blocks
    is4 = tl.zeros((BLOCKS,), tl.int1)
    if ACTIVATIONS == "fp8":
        is8 = tl.full((BLOCKS,), 1, tl.int1)
        byte = tl.maximum(scale_byte(tl.zeros((BLOCKS,), tl.int32) + amax, is4, is8, FP6, SCALE_ROUNDING), 1)
    else:
        tl.static_assert(ACTIVATIONS == "mxfp6", "unknown ACTIVATIONS")
        is8 = block >= narrow
        byte = scale_byte(tl.max(magnitude_bits(y), 1), is4, is8, FP6, SCALE_ROUNDING)
    baked, excess = _bake(byte, is8 == 0, FP6)
    tl.store(scale_ptr + block, (baked - excess).to(tl.uint8), mask=exists)

    sign = (y.to(tl.int32, bitcast=True) >> 31) & 0x80
    code = _encode(y, byte, is4, is8, FP6, SCALE_ROUNDING) | sign
    ptrs = q_ptr + (block[:, None] * 32 + tl.arange(0, 32)[None, :])
    tl.store(ptrs, code.to(tl.uint8), mask=exists[:, None])
    is_nan = exists & (byte == 255)
    if tl.max((is_nan | (excess > 0)).to(tl.int32), 0) > 0:  # as there
        tl.debug_barrier()
        tl.store(ptrs, tl.zeros((BLOCKS, 32), tl.uint8), mask=is_nan[:, None])
        _raise_e4m3(ptrs, excess)


@triton.jit
def _bake(byte, is6, FP6: tl.constexpr):
    """The bytes of scales with what is in them for FP6, and what they have no room for.

    FP6 leaves as E4M3 with the constant factor in the scale. Where the scale has no room the code takes the rest.
    """
    baked = byte + tl.where(is6 & (byte < 255), _field(FP6, "e4m3_shift"), 0)
    excess = tl.where(byte < 255, tl.maximum(baked - 254, 0), 0)
    return baked, excess


@triton.jit
def _raise_e4m3(ptrs, exponent):
    """Multiply the E4M3 bytes at `ptrs` (BLOCKS, 32) by 2**exponent (BLOCKS,), exactly; 0 leaves a block untouched."""
    mask = (exponent > 0)[:, None]
    code = tl.load(ptrs, mask=mask, other=0).to(tl.int32)
    magnitude = code & 0x7F
    for step in range(tl.max(exponent, 0)):
        doubled = tl.where(magnitude < 8, magnitude << 1, magnitude + 8)
        magnitude = tl.where((exponent > step)[:, None], doubled, magnitude)
    tl.store(ptrs, (magnitude | (code & 0x80)).to(tl.uint8), mask=mask)


@triton.jit
def scale_byte(amax, is4, is8, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """E8M0 bytes (BLOCKS,) int32 of blocks with these largest `magnitude_bits`, 255 for a NaN or an infinity."""
    exponent = amax >> 23
    mantissa = amax & 0x7FFFFF
    byte = exponent - by_format(is4, is8, FP6, "emax")
    if SCALE_ROUNDING == "rceil":
        byte += (mantissa > by_format(is4, is8, FP6, "max_mantissa")).to(tl.int32)
    elif SCALE_ROUNDING == "even":
        byte += (mantissa + by_format(is4, is8, FP6, "half_step")) >> 23
    elif SCALE_ROUNDING == "fit":
        most = by_format(is4, is8, FP6, "max_mantissa") + by_format(is4, is8, FP6, "half_step")
        byte += (mantissa > most).to(tl.int32)
    else:
        tl.static_assert(SCALE_ROUNDING == "floor", "unknown SCALE_ROUNDING")
    return tl.where(exponent == 255, 255, tl.maximum(byte, 0))


@triton.jit
def _encode(y, byte, is4, is8, FP6: tl.constexpr, SCALE_ROUNDING: tl.constexpr):
    """Magnitude codes of y * 2**(127 - byte), to nearest even, saturating; FP6 codes in E4M3's place.

    y: (BLOCKS, 32) float32. byte: (BLOCKS,) int32. Returns int32, of which only the low 8 bits mean
    anything, and none in a block with byte 255.
    """
    scaled = y * (tl.maximum(254 - byte, 1) << 23).to(tl.float32, bitcast=True)[:, None]
    if SCALE_ROUNDING != "rceil":  # with "rceil" nothing exceeds the largest value
        largest = by_format(is4, is8, FP6, "max_value")[:, None]
        scaled = tl.minimum(tl.maximum(scaled, -largest), largest)
    # One code step at exponent e is 2**(e - mantissa_bits). Adding 2**(e - mantissa_bits + 23), whose ulp is that
    # step, lets the fp32 adder round to nearest even; the low bits of the sum are the count of steps, its exponent
    # field says which e. So sum + (sum >> drop) is the code, off by a constant, in the low 8 bits.
    drop = by_format(is4, is8, FP6, "drop")
    lowest = by_format(is4, is8, FP6, "lowest")
    lift = (drop + 127) << 23  # 2**drop
    first = lowest + (drop << 23)
    power = tl.maximum(scaled.to(tl.int32, bitcast=True) & 0x7F800000, lowest[:, None])
    magic = power.to(tl.float32, bitcast=True) * lift.to(tl.float32, bitcast=True)[:, None]
    total = (tl.abs(scaled) + magic).to(tl.int32, bitcast=True)
    code = total + (total >> drop[:, None]) - (first + (first >> drop))[:, None]
    if _field(FP6, "to_e4m3") > 0:
        is6 = (is4 | is8) == 0
        code = code << tl.where(is6, _field(FP6, "to_e4m3"), 0)[:, None]
    return code


@triton.jit
def by_format(is4, is8, FP6: tl.constexpr, NAME: tl.constexpr):
    """The field NAME of each block's format."""
    return tl.where(is8, _field("e4m3", NAME), tl.where(is4, _field("e2m1", NAME), _field(FP6, NAME)))


@triton.constexpr_function
def _field(fmt, name):
    """A field of the format `fmt`, or one of five numbers that follow from its fields.

    The import stands here because Triton hashes, and Inductor copies, the globals that device functions name.
    """
    from micromix_compile.numerics.formats import elem_format

    form = elem_format(fmt)
    width = 23 - form.mantissa_bits
    derived = {
        "drop": width,  # float32 mantissa bits that the element does not have
        "lowest": (127 + form.min_exponent) << 23,  # bits of the smallest normal number
        "to_e4m3": 3 - form.mantissa_bits,  # how far left of itself a code lies in an E4M3 byte
        "half_step": 1 << (width - 1),
        "max_mantissa": (form.max_code & ((1 << form.mantissa_bits) - 1)) << width,  # of max_value, as in float32
    }
    return derived[name] if name in derived else getattr(form, name)

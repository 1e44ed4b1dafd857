"""The mixed MXFP4/MXFP6/MXFP8 product in Triton: one float32 accumulator over three segments of K.

`mixed_mx_mm_tile` computes one (BLOCK_M, BLOCK_N) tile. Two shells call it: `mixed_mx_mm_kernel` below, for eager
calls and tests, and `mixed_mx_mm.py.jinja`, which Inductor renders with the epilogue it fuses. Operands are laid out as
in `numerics.packing`; extents along K come at run time, in blocks of 32 channels, so that one binary serves
every layer of a model.

MODE says how two MX operands are multiplied:
  "scaled"  `tl.dot_scaled`: the block-scaled MMA of sm_100 and sm_120
  "bf16"    dequantize to bfloat16, which is exact (see `_values`), then `tl.dot`: every other GPU
  "f32"     dequantize to float32, then `tl.dot`: Triton's interpreter, whose bfloat16 is not IEEE's
"""

import triton
import triton.language as tl

from micromix_compile.templates.triton.fold import fp6_planes

BLOCK_SIZE = tl.constexpr(32)  # channels that share a scale
SWIZZLE_BLOCKS = tl.constexpr(4)  # a swizzled scale tile: 128 rows by 4 blocks, 512 bytes

_E2M1_TO_E4M3_SHIFT = tl.constexpr(6)  # an E2M1 code is 2**6 times the E4M3 code with its bits


@triton.jit
def _unpack_fp4(packed):
    """(R, C) uint8, two E2M1 codes a byte -> (R, 2 C) uint8, the codes' bits in E4M3 bytes (values / 2**6)."""
    low = ((packed & 0x08) << 4) | ((packed & 0x07) << 2)
    high = (packed & 0x80) | ((packed & 0x70) >> 2)
    return tl.reshape(tl.join(low, high), (packed.shape[0], 2 * packed.shape[1]))


@triton.constexpr_function
def _used_bits(fp6):
    """The bits that an FP6 code uses of an E4M3 byte, in each byte of a word."""
    return fp6_planes(fp6)[0] * 0x01010101


@triton.constexpr_function
def _moves(fp6):
    """How many of `PlaneLayout.moves` a format has."""
    return len(fp6_planes(fp6)[1])


@triton.constexpr_function
def _move(fp6, index, part):
    """(plane, bits in each byte of a word, shift)[part] of a move."""
    plane, bits, shift = fp6_planes(fp6)[1][index]
    return (plane, bits * 0x01010101, shift)[part]


@triton.jit
def _moved(plane0, plane1, plane2, PLANE: tl.constexpr, BITS: tl.constexpr, SHIFT: tl.constexpr):
    """In each byte of a word, bits of the fourth plane's byte that lie in one of the others (`PlaneLayout.moves`)."""
    word = plane0 if PLANE == 0 else (plane1 if PLANE == 1 else plane2)
    moved = word << -SHIFT if SHIFT < 0 else word >> SHIFT
    return moved & BITS


@triton.jit
def _unpack_fp6(plane0, plane1, plane2, FP6: tl.constexpr):
    """Three byte planes as (R, W) uint32 words -> (R, 16 W) uint8 E4M3 bytes; see `packing.pack_fp6`."""
    rows: tl.constexpr = plane0.shape[0]
    words: tl.constexpr = plane0.shape[1]
    used: tl.constexpr = _used_bits(FP6)
    fourth = tl.zeros_like(plane0)
    for i in tl.static_range(_moves(FP6)):
        fourth |= _moved(plane0, plane1, plane2, _move(FP6, i, 0), _move(FP6, i, 1), _move(FP6, i, 2))
    # Plane j holds channels 8 j .. 8 j + 7 of every block of 32: two words a plane and block.
    even = tl.join(plane0 & used, plane2 & used)
    odd = tl.join(plane1 & used, fourth)
    word = tl.reshape(tl.join(even, odd), (rows, words // 2, 2, 4))  # (row, block, half, plane)
    word = tl.permute(word, (0, 1, 3, 2))
    byte = tl.join(tl.join(word & 0xFF, (word >> 16) & 0xFF), tl.join((word >> 8) & 0xFF, word >> 24))
    return tl.reshape(byte.to(tl.uint8), (rows, 16 * words))


@triton.jit
def _e8m0_to_float32(byte):
    """2**(byte - 127), NaN for 255; byte 0 is the subnormal 2**-127 (OCP MX 5.4.1)."""
    byte = byte.to(tl.int32)
    bits = tl.where(byte == 0, 0x00400000, byte << 23)
    return tl.where(byte == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _values(byte, scale, SHIFT: tl.constexpr, MODE: tl.constexpr):
    """(R, K) E4M3 bytes and (R, K / 32) E8M0 scales -> (R, K) byte * 2**SHIFT * scale, bfloat16 or float32.

    Exact, but for results that bfloat16 cannot hold: multiples of less than its smallest subnormal, 2**-133.
    """
    rows: tl.constexpr = byte.shape[0]
    blocks: tl.constexpr = scale.shape[1]
    value = _e4m3_to_float32(byte, SHIFT)
    value = tl.reshape(value, (rows, blocks, BLOCK_SIZE)) * _e8m0_to_float32(scale)[:, :, None]
    if MODE == "bf16":
        value = value.to(tl.bfloat16)
    return tl.reshape(value, (rows, blocks * BLOCK_SIZE))


@triton.jit
def _e4m3_to_float32(byte, SHIFT: tl.constexpr):
    """E4M3 bytes times 2**SHIFT by integer operations, which every GPU and the interpreter have.

    A magnitude, moved to the place of float32's exponent and mantissa, is its value times 2**(7 - 127), subnormals
    included; the multiplication by 2**120 is exact. The conversion instruction of sm_90 is slower (H200, Triton 3.6).
    """
    byte = byte.to(tl.uint32)
    bits = tl.where(byte & 0x7F == 0x7F, 0x7FC00000, (byte & 0x7F) << 20) | ((byte & 0x80) << 24)
    return bits.to(tl.uint32).to(tl.float32, bitcast=True) * 2.0 ** (120 + SHIFT)


@triton.jit
def _operand(byte, scale, ELEM_FORMAT: tl.constexpr, MODE: tl.constexpr):
    """Dequantize what memory holds of one operand; "e2m1" is packed by two, anything else E4M3 bytes."""
    if ELEM_FORMAT == "e2m1":
        return _values(_unpack_fp4(byte), scale, _E2M1_TO_E4M3_SHIFT, MODE)
    else:
        return _values(byte, scale, 0, MODE)


@triton.jit
def _widen_fp4(packed):
    """(R, C) uint8, two E2M1 codes a byte -> (R, 2 C) uint8, the E4M3 codes of the same values.

    Unlike `_unpack_fp4` this leaves no power of two for the scale, which may have no room for it: E2M1's normal numbers
    keep their mantissa under another bias, and its one subnormal, 0.5, is E4M3's 0x30.
    """
    codes = tl.reshape(tl.join(packed & 0xF, packed >> 4), (packed.shape[0], 2 * packed.shape[1]))
    magnitude = codes & 0x7
    return tl.where(magnitude < 2, magnitude * 0x30, 0x30 + (magnitude << 2)).to(tl.uint8) | ((codes & 0x8) << 4)


@triton.jit
def mx_dot(x, x_scale, w, w_scale, acc, X_FORMAT: tl.constexpr, W_FORMAT: tl.constexpr, MODE: tl.constexpr,
           SWAP: tl.constexpr):  # fmt: skip
    """acc + dequantized(x) @ dequantized(w).T, or its transpose where SWAP.

    x: (BLOCK_M, BLOCK_K) and w: (BLOCK_N, BLOCK_K) elements as bytes, half as many bytes for "e2m1"; scales
    (rows, BLOCK_K / 32) uint8; acc: (BLOCK_M, BLOCK_N) float32, transposed where SWAP.
    """
    if MODE == "scaled":
        if X_FORMAT == "e4m3":
            x = x.to(tl.float8e4nv, bitcast=True)
        if W_FORMAT == "e4m3":
            w = w.to(tl.float8e4nv, bitcast=True)
        if SWAP:
            acc = tl.dot_scaled(w, w_scale, W_FORMAT, tl.trans(x), x_scale, X_FORMAT, acc)
        else:
            acc = tl.dot_scaled(x, x_scale, X_FORMAT, tl.trans(w), w_scale, W_FORMAT, acc)
    else:
        x = _operand(x, x_scale, X_FORMAT, MODE)
        w = _operand(w, w_scale, W_FORMAT, MODE)
        if SWAP:
            acc = tl.dot(w, tl.trans(x), acc, input_precision="ieee")
        else:
            acc = tl.dot(x, tl.trans(w), acc, input_precision="ieee")
    return acc


@triton.jit
def _load(rows, start, stop, WIDTH: tl.constexpr):
    """Entries start .. start + WIDTH of each row, zeros from `stop` on. rows: (R, 1) pointers."""
    column = start + tl.arange(0, WIDTH)[None, :]
    return tl.load(rows + column, mask=column < stop, other=0)


@triton.jit
def _load_x(part, x8, m, step, first, blocks, all_blocks, BLOCK_K: tl.constexpr, PACKED: tl.constexpr,
            X_WIDE: tl.constexpr):  # fmt: skip
    """(BLOCK_M, BLOCK_K) of one step through a segment of x, of PACKED elements a byte. m: (BLOCK_M, 1) rows.

    The segment is a part of its own, or, where X_WIDE, of x8 from block `first` on, which has all blocks.
    """
    if X_WIDE:
        return _load(x8 + m * (all_blocks * 32) + first * 32, step * BLOCK_K, blocks * 32, BLOCK_K)
    else:
        width: tl.constexpr = 32 // PACKED
        return _load(part + m * (blocks * width), step * (BLOCK_K // PACKED), blocks * width, BLOCK_K // PACKED)


@triton.jit
def _load_scale(base, row0, rows, all_rows, first, step, blocks, row_blocks, ROWS: tl.constexpr,
                STEP_BLOCKS: tl.constexpr, SWIZZLED: tl.constexpr):  # fmt: skip
    """(ROWS, STEP_BLOCKS) scales of one step through a segment.

    plain: row-major, `row_blocks` bytes a row, the segment from byte `first`. swizzled: 512-byte tiles of 128 rows by
    4 blocks, the tiles of a segment in a row, rows and segments padded to whole tiles (`packing.swizzle_scale`).
    """
    if SWIZZLED:
        tl.static_assert(ROWS % 128 == 0 and STEP_BLOCKS % 4 == 0, "whole scale tiles")
        row_tiles: tl.constexpr = ROWS // 128
        step_tiles: tl.constexpr = STEP_BLOCKS // 4
        tile = step * step_tiles + tl.arange(0, step_tiles)
        tile_row = (row0 // 128 + tl.arange(0, row_tiles)) % tl.cdiv(all_rows, 128)
        offset = (tile_row.to(tl.int64)[:, None, None] * row_blocks + first + tile[None, :, None]) * 512
        inside = (tile < tl.cdiv(blocks, 4))[None, :, None]
        flat = tl.load(base + offset + tl.arange(0, 512)[None, None, :], mask=inside, other=0)
        scale = tl.reshape(flat, (row_tiles, step_tiles, 32, 4, 4))
        return tl.reshape(tl.permute(scale, (0, 3, 2, 1, 4)), (ROWS, STEP_BLOCKS))
    else:
        return _load(base + rows * row_blocks + first, step * STEP_BLOCKS, blocks, STEP_BLOCKS)


@triton.jit
def _load_fp6(w6, n, N, step, blocks6, FP6: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_N, BLOCK_K) E4M3 bytes of one step of packed MXFP6 weights. n: (BLOCK_N, 1) rows."""
    plane = (blocks6 * 2).to(tl.int64) * N  # words
    words = w6.to(tl.pointer_type(tl.uint32)) + n * (blocks6 * 2)
    plane0 = _load(words, step * (BLOCK_K // 16), blocks6 * 2, BLOCK_K // 16)
    plane1 = _load(words + plane, step * (BLOCK_K // 16), blocks6 * 2, BLOCK_K // 16)
    plane2 = _load(words + 2 * plane, step * (BLOCK_K // 16), blocks6 * 2, BLOCK_K // 16)
    return _unpack_fp6(plane0, plane1, plane2, FP6)


@triton.jit
def mixed_mx_mm_tile(
    x4, x6, x8, x_scale, w4, w6, w8, w_scale, M, N, m0, n0, blocks4, blocks6, blocks8,
    FP6: tl.constexpr, W_FP4: tl.constexpr, X_WIDE: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
    WIDEN_FP4: tl.constexpr, X_SWIZZLED: tl.constexpr, W_SWIZZLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The tile of dequantized(x) @ dequantized(w).T at rows m0 and columns n0: (BLOCK_M, BLOCK_N) float32.

    M, N: extents. blocks4, blocks6, blocks8: K of each segment in blocks of 32 channels. W_FP4: all of w is MXFP4, in
    w4. X_WIDE: all of x is E4M3 bytes, in x8, with plain scales, and the segments are those of w. SWAP: compute the
    transpose, weights on the left. WIDEN_FP4: MXFP4 weights meet MXFP8 activations as MXFP8. Rows past M or N wrap
    around, so nothing outside the operands is read.
    """
    tl.static_assert(BLOCK_K % 64 == 0, "BLOCK_K covers whole words of FP6 planes")
    step_blocks: tl.constexpr = BLOCK_K // BLOCK_SIZE
    m = ((m0 + tl.arange(0, BLOCK_M)) % M).to(tl.int64)[:, None]
    n = ((n0 + tl.arange(0, BLOCK_N)) % N).to(tl.int64)[:, None]
    tiles4 = tl.cdiv(blocks4, SWIZZLE_BLOCKS)
    tiles6 = tl.cdiv(blocks6, SWIZZLE_BLOCKS)
    tiles = tiles4 + tiles6 + tl.cdiv(blocks8, SWIZZLE_BLOCKS)
    blocks = blocks4 + blocks6 + blocks8
    x_row_scales = tiles if X_SWIZZLED else blocks
    w_row_scales = tiles if W_SWIZZLED else blocks
    w4_row = (blocks if W_FP4 else blocks4) * 16
    acc = tl.zeros((BLOCK_N, BLOCK_M) if SWAP else (BLOCK_M, BLOCK_N), tl.float32)

    for step in range(tl.cdiv(blocks4, step_blocks)):
        x = _load_x(x4, x8, m, step, 0, blocks4, blocks, BLOCK_K, 2, X_WIDE)
        w = _load(w4 + n * w4_row, step * (BLOCK_K // 2), blocks4 * 16, BLOCK_K // 2)
        xs = _load_scale(x_scale, m0, m, M, 0, step, blocks4, x_row_scales, BLOCK_M, step_blocks, X_SWIZZLED)
        ws = _load_scale(w_scale, n0, n, N, 0, step, blocks4, w_row_scales, BLOCK_N, step_blocks, W_SWIZZLED)
        acc = _mx_dot_fp4_weights(x, xs, w, ws, acc, "e4m3" if X_WIDE else "e2m1", MODE, SWAP, WIDEN_FP4)

    x_first = tiles4 if X_SWIZZLED else blocks4
    w_first = tiles4 if W_SWIZZLED else blocks4
    for step in range(tl.cdiv(blocks6, step_blocks)):
        x = _load_x(x6, x8, m, step, blocks4, blocks6, blocks, BLOCK_K, 1, X_WIDE)
        xs = _load_scale(x_scale, m0, m, M, x_first, step, blocks6, x_row_scales, BLOCK_M, step_blocks, X_SWIZZLED)
        ws = _load_scale(w_scale, n0, n, N, w_first, step, blocks6, w_row_scales, BLOCK_N, step_blocks, W_SWIZZLED)
        if W_FP4:
            w = _load(w4 + n * w4_row + blocks4 * 16, step * (BLOCK_K // 2), blocks6 * 16, BLOCK_K // 2)
            acc = _mx_dot_fp4_weights(x, xs, w, ws, acc, "e4m3", MODE, SWAP, WIDEN_FP4)
        else:
            w = _load_fp6(w6, n, N, step, blocks6, FP6, BLOCK_K)
            acc = mx_dot(x, xs, w, ws, acc, "e4m3", "e4m3", MODE, SWAP)

    x_first = tiles4 + tiles6 if X_SWIZZLED else blocks4 + blocks6
    w_first = tiles4 + tiles6 if W_SWIZZLED else blocks4 + blocks6
    for step in range(tl.cdiv(blocks8, step_blocks)):
        x = _load_x(x8, x8, m, step, blocks4 + blocks6, blocks8, blocks, BLOCK_K, 1, X_WIDE)
        xs = _load_scale(x_scale, m0, m, M, x_first, step, blocks8, x_row_scales, BLOCK_M, step_blocks, X_SWIZZLED)
        ws = _load_scale(w_scale, n0, n, N, w_first, step, blocks8, w_row_scales, BLOCK_N, step_blocks, W_SWIZZLED)
        if W_FP4:
            first = (blocks4 + blocks6) * 16
            w = _load(w4 + n * w4_row + first, step * (BLOCK_K // 2), blocks8 * 16, BLOCK_K // 2)
            acc = _mx_dot_fp4_weights(x, xs, w, ws, acc, "e4m3", MODE, SWAP, WIDEN_FP4)
        else:
            w = _load(w8 + n * (blocks8 * 32), step * BLOCK_K, blocks8 * 32, BLOCK_K)
            acc = mx_dot(x, xs, w, ws, acc, "e4m3", "e4m3", MODE, SWAP)
    return tl.trans(acc) if SWAP else acc


@triton.jit
def _mx_dot_fp4_weights(x, x_scale, w, w_scale, acc, X_FORMAT: tl.constexpr, MODE: tl.constexpr, SWAP: tl.constexpr,
                        WIDEN: tl.constexpr):  # fmt: skip
    """`mx_dot` of activations and packed MXFP4 weights, which E4M3 meets as E4M3 where WIDEN."""
    if WIDEN and X_FORMAT == "e4m3":
        return mx_dot(x, x_scale, _widen_fp4(w), w_scale, acc, "e4m3", "e4m3", MODE, SWAP)
    else:
        return mx_dot(x, x_scale, w, w_scale, acc, X_FORMAT, "e2m1", MODE, SWAP)


@triton.jit
def tile_origin(pid, M, N, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr):
    """First row and column of a program's tile, in columns of GROUP_M tiles, so that neighbours share weights in L2."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    group = pid // (GROUP_M * tiles_n)
    height = min(tiles_m - group * GROUP_M, GROUP_M)
    inside = pid % (GROUP_M * tiles_n)
    return (group * GROUP_M + inside % height) * BLOCK_M, (inside // height) * BLOCK_N


@triton.jit(do_not_specialize=["M", "blocks4", "blocks6", "blocks8"])
def mixed_mx_mm_kernel(
    x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, out, M, N, blocks4, blocks6, blocks8,
    FP6: tl.constexpr, W_FP4: tl.constexpr, X_WIDE: tl.constexpr, HAS_BIAS: tl.constexpr, MODE: tl.constexpr,
    SWAP: tl.constexpr, WIDEN_FP4: tl.constexpr, X_SWIZZLED: tl.constexpr, W_SWIZZLED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """out (M, N) = dequantized(x) @ dequantized(w).T + bias, rounded once. Grid: one program a tile."""
    m0, n0 = tile_origin(tl.program_id(0), M, N, BLOCK_M, BLOCK_N, GROUP_M)
    acc = mixed_mx_mm_tile(
        x4, x6, x8, x_scale, w4, w6, w8, w_scale, M, N, m0, n0, blocks4, blocks6, blocks8,
        FP6, W_FP4, X_WIDE, MODE, SWAP, WIDEN_FP4, X_SWIZZLED, W_SWIZZLED, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    m = m0 + tl.arange(0, BLOCK_M)
    n = n0 + tl.arange(0, BLOCK_N)
    if HAS_BIAS:
        acc = acc + tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(out + m.to(tl.int64)[:, None] * N + n[None, :], acc.to(out.dtype.element_ty), mask=inside)

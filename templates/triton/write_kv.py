"""Keys and values of new tokens to E4M3 bytes, at their places in a cache: one launch for both.

Half of the programs write keys, the others values. A program takes some rows, the channels of one head of one token
each, as blocks that share a scale; extents that are no powers of two are masked. Rounding is the quantizer's, so bytes
are the reference's. Launched by `targets.kv_cache`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from micromix_compile.templates.triton.reorder_quantize import _encode, magnitude_bits, scale_byte, to_float32


@triton.jit
def write_kv_kernel(
    key_ptr,  # (B, H, T, D) by its strides, those of channels are 1
    value_ptr,  # likewise, with as many channels as values have
    position_ptr,  # (T,) int32 or int64
    k_q_ptr,  # (B, H, L, D) uint8
    k_scale_ptr,  # (B, H, L, BLOCKS) uint8
    v_q_ptr,
    v_scale_ptr,
    H,
    T,
    L,
    rows,  # B * H * T
    key_stride_b,
    key_stride_h,
    key_stride_t,
    value_stride_b,
    value_stride_h,
    value_stride_t,
    K_BLOCKS: tl.constexpr,
    K_BLOCK_SIZE: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    V_BLOCK_SIZE: tl.constexpr,
    SCALE_ROUNDING: tl.constexpr,
    FORMATS: tl.constexpr,  # digest of the table that the rounding reads, which Triton's cache would not see otherwise
    ROWS: tl.constexpr,  # of a program; a power of two
):
    """Write ROWS rows of keys, or of values where program_id(1) is 1, from program_id(0) * ROWS on."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    token = row % T
    head = (row // T) % H
    batch = row // (T * H)
    position = tl.load(position_ptr + token, mask=exists, other=0).to(tl.int64)
    is_inside = (position >= 0) & (position < L)
    tl.device_assert(is_inside, "a position is outside the cache: it is full")
    at = (batch * H + head).to(tl.int64) * L + position
    exists = exists & is_inside
    batch, head, token = batch.to(tl.int64), head.to(tl.int64), token.to(tl.int64)
    if tl.program_id(1) == 0:
        source = key_ptr + batch * key_stride_b + head * key_stride_h + token * key_stride_t
        _write_rows(source, at, exists, k_q_ptr, k_scale_ptr, K_BLOCKS, K_BLOCK_SIZE, SCALE_ROUNDING)
    else:
        source = value_ptr + batch * value_stride_b + head * value_stride_h + token * value_stride_t
        _write_rows(source, at, exists, v_q_ptr, v_scale_ptr, V_BLOCKS, V_BLOCK_SIZE, SCALE_ROUNDING)


@triton.jit
def _write_rows(
    source, at, exists, q_ptr, scale_ptr, BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_ROUNDING: tl.constexpr
):
    """source: (ROWS,) pointers to first channels. at: (ROWS,) int64, the rows of the cache that they go to."""
    ROWS: tl.constexpr = at.shape[0]
    PADDED_BLOCKS: tl.constexpr = triton.next_power_of_2(BLOCKS)
    PADDED_SIZE: tl.constexpr = triton.next_power_of_2(BLOCK_SIZE)
    flat = tl.arange(0, ROWS * PADDED_BLOCKS)  # blocks of all rows
    block = flat % PADDED_BLOCKS
    source = tl.reshape(tl.broadcast_to(source[:, None], (ROWS, PADDED_BLOCKS)), (ROWS * PADDED_BLOCKS,))
    at = tl.reshape(tl.broadcast_to(at[:, None], (ROWS, PADDED_BLOCKS)), (ROWS * PADDED_BLOCKS,))
    exists = tl.reshape(tl.broadcast_to(exists[:, None], (ROWS, PADDED_BLOCKS)), (ROWS * PADDED_BLOCKS,))
    exists = exists & (block < BLOCKS)
    inner = tl.arange(0, PADDED_SIZE)
    mask = exists[:, None] & (inner < BLOCK_SIZE)[None, :]
    channel = block[:, None] * BLOCK_SIZE + inner[None, :]

    y = to_float32(tl.load(source[:, None] + channel, mask=mask, other=0.0))
    no = tl.zeros(block.shape, tl.int1)
    yes = tl.full(block.shape, 1, tl.int1)
    byte = scale_byte(tl.max(magnitude_bits(y), 1), no, yes, "e2m3", SCALE_ROUNDING)
    sign = (y.to(tl.int32, bitcast=True) >> 31) & 0x80
    code = _encode(y, byte, no, yes, "e2m3", SCALE_ROUNDING) | sign
    code = tl.where((byte == 255)[:, None], 0, code)
    tl.store(q_ptr + at[:, None] * (BLOCKS * BLOCK_SIZE) + channel, code.to(tl.uint8), mask=mask)
    tl.store(scale_ptr + at * BLOCKS + block, byte.to(tl.uint8), mask=exists)

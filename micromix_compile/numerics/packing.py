"""Byte layouts of quantized matrices, and the way back.

A quantized matrix of R rows and K = k4 + k6 + k8 channels is
  q4     (R, k4 // 2)       two E2M1 codes a byte, even k in the low nibble
  q6     activations (R, k6): the FP6 codes moved into E4M3 bytes
         weights (3, R, k6 // 4): the same bytes squeezed into three byte planes, 6 bits an element
  q8     (R, k8)            E4M3 bytes
  scale  (R, K // 32)       E8M0 bytes, in the order of the channels

Every FP6 code is an E4M3 code times a constant power of two: e3m2 = E4M3(s 0eee mm0) * 2**4 and
e2m3 = E4M3(s 00ee mmm) * 2**6, subnormals included. That constant is baked into the scale byte, so that whoever
multiplies sees plain MXFP8. Where the byte would pass 254 the code takes the excess power of two instead: both
formats leave E4M3 enough exponents for it.
"""

from __future__ import annotations

from itertools import accumulate
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.numerics.formats import BLOCK_SIZE, E8M0_NAN, ElemFormat, PlaneLayout, fp6_format
from micromix_compile.numerics.layout import split_scale

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_SCALE = 254

_BOUNDARY = 256  # as the allocator's own; kernels want 16


def pack_fp4(codes: Tensor) -> Tensor:
    """(R, K) uint8 E2M1 codes -> (R, K // 2) uint8, even k in the low nibble."""
    return codes[:, 0::2] | (codes[:, 1::2] << 4)


def unpack_fp4(packed: Tensor) -> Tensor:
    """(R, K // 2) uint8 -> (R, K) uint8 E2M1 codes."""
    return torch.stack((packed & 0xF, packed >> 4), dim=-1).flatten(1)


def align_fp6(codes: Tensor, scale: Tensor, fp6: str) -> tuple[Tensor, Tensor]:
    """FP6 codes as E4M3 bytes, with the constant factor baked into the scale.

    codes: (R, K) uint8. scale: (R, K // 32) uint8. Returns the same shapes. NaN scales stay NaN.
    """
    fmt = fp6_format(fp6)
    assert fmt.e4m3_shift is not None, "every FP6 format has an E4M3 shift"
    excess = (scale.to(torch.int32) + fmt.e4m3_shift - MAX_SCALE).clamp(min=0)
    excess = torch.where(scale == E8M0_NAN, 0, excess)
    baked = torch.where(scale == E8M0_NAN, E8M0_NAN, scale.to(torch.int32) + fmt.e4m3_shift - excess)
    magnitude = (codes & 0x1F) << (3 - fmt.mantissa_bits)
    raised = _raise_e4m3(magnitude.unflatten(-1, (-1, BLOCK_SIZE)), excess.unsqueeze(-1)).flatten(-2)
    return ((codes & 0x20) << 2) | raised, baked.to(torch.uint8)


def _raise_e4m3(magnitude: Tensor, exponent: Tensor) -> Tensor:
    """E4M3 magnitude codes times 2**exponent, exact while the result is finite. Zero and subnormals included."""
    value = magnitude.to(torch.int32)
    for step in range(int(exponent.max()) if exponent.numel() else 0):
        doubled = torch.where(value < 8, value << 1, value + 8)
        value = torch.where(exponent > step, doubled, value)
    return value.to(torch.uint8)


def pack_fp6(aligned: Tensor, fp6: str) -> Tensor:
    """(R, K) uint8 E4M3 bytes of FP6 codes -> (3, R, K // 4) uint8 byte planes.

    In every block of 32, plane j holds the bytes of k = 8 j .. 8 j + 7, and the two bits that no code uses in each
    of them carry the byte of k = 24 .. 31. Raises ValueError where a byte is not an aligned code of `fp6` (a block
    near the top of float32's range, whose codes had to take a power of two from the scale).
    """
    layout = _planes(fp6_format(fp6))
    if bool((aligned & ~layout.used & 0xFF).any()):
        row = int((aligned & ~layout.used & 0xFF).any(1).nonzero()[0])
        raise ValueError(f"row {row} holds magnitudes above 2**120, which MXFP6 weights cannot store")
    quarters = aligned.unflatten(1, (-1, 4, BLOCK_SIZE // 4))  # (R, K // 32, 4, 8)
    planes = [quarters[:, :, j].clone() for j in range(3)]
    for plane, bits, shift in layout.moves:
        moved = quarters[:, :, 3] & bits
        planes[plane] |= moved << shift if shift > 0 else moved >> -shift
    return torch.stack(planes).flatten(2)


def unpack_fp6(planes: Tensor, fp6: str) -> Tensor:
    """(3, R, K // 4) uint8 byte planes -> (R, K) uint8 E4M3 bytes."""
    layout = _planes(fp6_format(fp6))
    blocks = planes.unflatten(2, (-1, BLOCK_SIZE // 4))  # (3, R, K // 32, 8)
    fourth = torch.zeros_like(blocks[0])
    for plane, bits, shift in layout.moves:
        fourth |= (blocks[plane] >> shift if shift > 0 else blocks[plane] << -shift) & bits
    return torch.stack((*(blocks & layout.used).unbind(0), fourth), dim=2).flatten(1)


def swizzle_scale(scale: Tensor, split: tuple[int, int, int]) -> Tensor:
    """Plain scales in the order in which tcgen05 copies them to tensor memory (PTX ISA, block scaling, scale_vec).

    scale: (R, K // 32) uint8. split: (k4, k6, k8), the channels of each segment. Returns uint8
    (ceil(R / 128), tiles, 512): tiles of 128 rows by 4 blocks, those of a segment side by side; rows and segments are
    padded to whole tiles with zeros. In a tile, row 32 i + r and block c lie at byte 16 r + 4 i + c.
    """
    rows = -(-scale.shape[0] // 128) * 128
    padded = []
    for segment in split_scale(scale, split):
        blocks = -(-segment.shape[1] // 4) * 4
        padded.append(segment.new_zeros((rows, blocks)))
        padded[-1][: segment.shape[0], : segment.shape[1]] = segment
    tiles = torch.cat(padded, 1).reshape(rows // 128, 4, 32, -1, 4)  # (row tile, i, r, tile, c)
    return tiles.permute(0, 3, 2, 1, 4).reshape(rows // 128, -1, 512)


def in_one_storage(parts: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Copies of uint8 tensors on a device, side by side in one allocation, each on a boundary of `_BOUNDARY` bytes.

    PyTorch's allocator may give each large tensor up to 1 MiB more than it asks for: 0.17 GiB for an 8B model's. A move
    of the module to another device gives each an allocation of its own again, and `save_pretrained` copies them.
    """
    lengths = [-(-part.numel() // _BOUNDARY) * _BOUNDARY for part in parts]
    storage = torch.empty(sum(lengths), dtype=torch.uint8, device=device).untyped_storage()
    copies = []  # no views: a tensor of its own has a version of its own
    for start, part in zip(accumulate(lengths[:-1], initial=0), parts, strict=True):
        room = torch.empty(0, dtype=torch.uint8, device=device)
        strides = torch.empty(part.shape, device="meta").stride()
        copies.append(room.set_(storage, start, part.shape, strides).copy_(part))
    return copies


def with_own_storage(part: Tensor) -> Tensor:
    """`part` of `in_one_storage` as a tensor whose storage begins and ends with it, in the same memory.

    What is no plain tensor, such as FSDP's, is returned as it is.
    """
    if type(part) is not Tensor or part.device.type == "meta":
        return part
    storage = part.untyped_storage()
    if storage.nbytes() == part.numel():
        return part
    start = part.storage_offset()
    own = torch.empty(0, dtype=part.dtype, device=part.device)
    return own.set_(storage[start : start + part.numel()], 0, part.shape, part.stride())


def _planes(fmt: ElemFormat) -> PlaneLayout:
    assert fmt.planes is not None, "every FP6 format has its planes"
    return fmt.planes

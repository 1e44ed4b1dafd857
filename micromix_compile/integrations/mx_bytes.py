"""Bytes of others' MX weights, and ours: the same codes and the same scales, moved.

Theirs, of compressed-tensors and ModelOpt, for a weight (N, K) with K a multiple of 32:
  mxfp4  weight_packed (N, K / 2) uint8, even k in the low nibble
  mxfp6  weight_packed (N, 3 K / 4) uint8: four E2M3 codes in three bytes, the first in the lowest bits
  mxfp8  weight (N, K) float8_e4m3fn
each with weight_scale (N, K / 32) uint8 (E8M0). gpt-oss's, for a weight NAME of experts:
  mxfp4  NAME_blocks (E, N, K / 32, 16) uint8, even k in the low nibble, and NAME_scales (E, N, K / 32) uint8
Ours are those of `packing`, with one segment.

E2M1 and E2M3 codes are E4M3 codes times 2**6, so that either can be held as MXFP8, too: more bytes of the same values,
where activations are in MXFP8 and not all weights of the model are MXFP4.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from micromix_compile.numerics import packing
from micromix_compile.numerics.formats import BLOCK_SIZE, E8M0_NAN, ELEM_FORMATS
from micromix_compile.numerics.layout import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.numerics.layout import Split

SCALE: Final = "weight_scale"
FP6: Final = "e2m3"
_NAN_CODE: Final = 0x7F  # of E4M3, without its sign


class TheirFormat(NamedTuple):
    """How others store a format: the tensor of the codes, its dtype, bytes of a row per 32 channels; the element."""

    codes: str
    dtype: torch.dtype
    block_bytes: int
    elem_format: str

    def shapes(self, n: int, channels: int) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each tensor of a weight (n, channels)."""
        blocks = channels // BLOCK_SIZE
        return {self.codes: (self.dtype, (n, blocks * self.block_bytes)), SCALE: (torch.uint8, (n, blocks))}

    @property
    def bits(self) -> int:
        """Of an element."""
        return ELEM_FORMATS[self.elem_format].bits


THEIR_FORMATS: Final = {
    "mxfp4": TheirFormat("weight_packed", torch.uint8, 16, "e2m1"),
    "mxfp6": TheirFormat("weight_packed", torch.uint8, 24, FP6),
    "mxfp8": TheirFormat("weight", torch.float8_e4m3fn, 32, "e4m3"),
}
"""By our names, in the order of the segments."""


def one_segment(form: str, channels: int) -> Split:
    """The split whose channels all have one of `THEIR_FORMATS`."""
    k4, k6, k8 = (channels if form == name else 0 for name in THEIR_FORMATS)
    return k4, k6, k8


def packed_from(tensors: Mapping[str, Tensor], form: str, held: str) -> PackedWeight:
    """Our bytes of a weight of others.

    tensors: as `TheirFormat.shapes` says. held: `form`, or "mxfp8". Raises ValueError for a NaN among the codes, and
    for a scale that has no room for the 2**6 of a code that moves.
    """
    codes, scale = tensors[THEIR_FORMATS[form].codes].view(torch.uint8), tensors[SCALE]
    n, channels = scale.shape[0], scale.shape[1] * BLOCK_SIZE
    nothing4, nothing6, nothing8 = (codes.new_empty(shape) for shape in ((n, 0), (3, n, 0), (n, 0)))
    if held == "mxfp4":
        return PackedWeight(codes, nothing6, nothing8, scale)
    aligned, scale = _e4m3_bytes(codes, scale, form)
    assert aligned.shape == (n, channels), "a byte a channel"
    if held == "mxfp6":
        return PackedWeight(nothing4, packing.pack_fp6(aligned, FP6), nothing8, scale)
    return PackedWeight(nothing4, nothing6, aligned, scale)


def experts_from(blocks: Tensor, scales: Tensor) -> PackedWeight:
    """Our bytes of gpt-oss's MXFP4 weights of experts: theirs, in our shapes.

    blocks: (E, N, K / 32, 16) uint8. scales: (E, N, K / 32) uint8. Raises ValueError for a scale of 255, which is NaN
    here and by the standard, and infinite to those who run gpt-oss.
    """
    if bool((scales == E8M0_NAN).any()):
        raise ValueError(f"scales must be 0 to {E8M0_NAN - 1}, got {E8M0_NAN}")
    experts, n = scales.shape[:2]
    nothing6, nothing8 = blocks.new_empty((experts, 3, n, 0)), blocks.new_empty((experts, n, 0))
    return PackedWeight(blocks.flatten(2), nothing6, nothing8, scales)


def packed_to(packed: PackedWeight, form: str) -> dict[str, Tensor]:
    """Others' tensors of a weight of ours with one segment, the inverse of `packed_from` where nothing else held it."""
    theirs = THEIR_FORMATS[form]
    if form == "mxfp4":
        return {theirs.codes: packed.w4, SCALE: packed.w_scale}
    if form == "mxfp8":
        return {theirs.codes: packed.w8.view(theirs.dtype), SCALE: packed.w_scale}
    aligned = packing.unpack_fp6(packed.w6, FP6)
    codes = ((aligned & 0x80) >> 2) | (aligned & 0x1F)
    return {theirs.codes: pack_fp6_words(codes), SCALE: _moved(packed.w_scale, -_shift(FP6))}


def _e4m3_bytes(codes: Tensor, scale: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """(N, K) codes of any of the formats as E4M3 bytes, and their scales."""
    if form == "mxfp8":
        if bool((codes & _NAN_CODE == _NAN_CODE).any()):
            raise ValueError("weight holds NaN (0x7F or 0xFF), which packed weights do not")
        return codes, scale
    shift = _shift(THEIR_FORMATS[form].elem_format)
    finite = scale[scale != E8M0_NAN]
    if finite.numel() and int(finite.max()) > packing.MAX_SCALE - shift:
        accepted = f"0 to {packing.MAX_SCALE - shift} or {E8M0_NAN}"
        raise ValueError(f"{SCALE} must be {accepted} where {form} is held as E4M3 bytes, got {int(finite.max())}")
    if form == "mxfp4":
        narrow = packing.unpack_fp4(codes)
        aligned = ((narrow & 0x8) << 4) | ((narrow & 0x7) << 2)
    else:
        narrow = unpack_fp6_words(codes)
        aligned = ((narrow & 0x20) << 2) | (narrow & 0x1F)
    return aligned, _moved(scale, shift)


def _shift(elem_format: str) -> int:
    shift = ELEM_FORMATS[elem_format].e4m3_shift
    assert shift is not None, "narrow formats have one"
    return shift


def _moved(scale: Tensor, by: int) -> Tensor:
    """E8M0 bytes times 2**by; NaN stays NaN."""
    return torch.where(scale == E8M0_NAN, scale, scale + by)


def pack_fp6_words(codes: Tensor) -> Tensor:
    """(N, K) uint8 codes of 6 bits -> (N, 3 K / 4) uint8, four in three bytes from the lowest bits up."""
    first, second, third, fourth = codes.unflatten(1, (-1, 4)).unbind(2)
    words = (first | (second << 6), (second >> 2) | (third << 4), (third >> 4) | (fourth << 2))
    return torch.stack(words, 2).flatten(1)


def unpack_fp6_words(packed: Tensor) -> Tensor:
    """(N, 3 K / 4) uint8 -> (N, K) uint8 codes of 6 bits."""
    low, middle, high = packed.unflatten(1, (-1, 3)).unbind(2)
    codes = (low & 0x3F, (low >> 6) | ((middle & 0x0F) << 2), (middle >> 4) | ((high & 0x03) << 4), high >> 2)
    return torch.stack(codes, 2).flatten(1)

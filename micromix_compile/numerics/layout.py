"""From a split to shapes and back: what quantized matrices look like whose channels are [MXFP4 | MXFP6 | MXFP8].

Rows, and what has only shapes, such as the nodes of a compiler, are taken as they come: extents may be symbolic.
"""

from __future__ import annotations

import math
from typing import Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from micromix_compile.numerics.formats import BLOCK_SIZE, elem_format, segment_formats

Split = tuple[int, int, int]
"""(k4, k6, k8): channels per format, multiples of 32."""

ACTIVATIONS: Final = ("same", "fp8", "mxfp6")
"""What activations are rounded to: each channel to the format of its weight; all to E4M3 with one scale a row; or each
to MXFP6, but to MXFP8 where its weight is that. But for the first, all of them are E4M3 bytes in memory."""


class Shaped(Protocol):
    """A tensor, or what stands for one."""

    @property
    def shape(self) -> Any:
        """Extents."""


class RowLayout(NamedTuple):
    """How rows become quantized activations: the quantizers' arguments behind the order, in their order.

    k4, k6, k8: the split of the weights, unless these are all MXFP4. activations: of `ACTIVATIONS`. rotated: how many
    channels of the order are rotated, from the first on (see `rotation`).
    """

    k4: int
    k6: int
    k8: int
    fp6: str
    scale_rounding: str
    activations: str = "same"
    rotated: int = 0

    @property
    def split(self) -> Split:
        """(k4, k6, k8)."""
        return self.k4, self.k6, self.k8

    def of_split(self, split: Split, rotated: int) -> RowLayout:
        """The same of other channels."""
        k4, k6, k8 = split
        return self._replace(k4=k4, k6=k6, k8=k8, rotated=rotated)


class PackedWeight(NamedTuple):
    """A quantized (N, C) weight: w4 (N, k4 // 2), w6 (3, N, k6 // 4), w8 (N, k8), w_scale (N, K // 32), uint8.

    Those of experts have one more dimension in front: (E, N, k4 // 2), (E, 3, N, k6 // 4), and so on.
    """

    w4: Tensor
    w6: Tensor
    w8: Tensor
    w_scale: Tensor


def padded_channels(in_features: int) -> int:
    """K: `in_features` rounded up to whole blocks of 32."""
    return math.ceil(in_features / BLOCK_SIZE) * BLOCK_SIZE


def order_dtype(channels: int) -> torch.dtype:
    """Of an order where it is used: the smallest that holds it, for a GPU's quantizer reads it anew for every row."""
    return torch.int16 if channels <= torch.iinfo(torch.int16).max + 1 else torch.int32


def weight_split(split: Split, weights: str) -> Split:
    """The split of the weights that meet activations split so: the same, or all MXFP4."""
    return split if weights == "same" else (sum(split), 0, 0)


def activation_split(split: Split, activations: str) -> Split:
    """The split of the activations that meet weights split so: the same, or all in E4M3 bytes."""
    return split if activations == "same" else (0, 0, sum(split))


def segment_bits(fp6: str) -> tuple[int, int, int]:
    """Bits of an element in each segment."""
    four, six, eight = (elem_format(name).bits for name in segment_formats(fp6))
    return four, six, eight


def block_counts(split: Split) -> tuple[int, int, int]:
    """Blocks of 32 channels in each segment."""
    k4, k6, k8 = (k // BLOCK_SIZE for k in split)
    return k4, k6, k8


def block_formats(split: Split, fp6: str) -> list[str]:
    """The element format of each block, from left to right."""
    counts = zip(segment_formats(fp6), block_counts(split), strict=True)
    return [name for name, count in counts for _ in range(count)]


def activation_shapes(rows: Any, split: Split) -> tuple[tuple[Any, int], ...]:
    """The shapes of a `QuantizedActivation` of so many rows: q4, q6, q8 and scale."""
    k4, k6, k8 = split
    return (rows, k4 // 2), (rows, k6), (rows, k8), (rows, sum(split) // BLOCK_SIZE)


def packed_shapes(n: Any, split: Split, experts: int | None = None) -> tuple[tuple[Any, ...], ...]:
    """The shapes of a `PackedWeight` of n rows: w4, w6, w8 and w_scale. experts: how many, if it is of experts."""
    k4, k6, k8 = split
    shapes = (n, k4 // 2), (3, n, k6 // 4), (n, k8), (n, sum(split) // BLOCK_SIZE)
    return shapes if experts is None else tuple((experts, *shape) for shape in shapes)


def split_of_activation(q4: Shaped, q6: Shaped, q8: Shaped) -> Split:
    """The split of the activation that has these parts."""
    return 2 * q4.shape[1], q6.shape[1], q8.shape[1]


def split_of_weight(w4: Shaped, w6: Shaped, w8: Shaped) -> Split:
    """The split of the weight, or of the experts' weights, that has these parts."""
    return 2 * w4.shape[-1], 4 * w6.shape[-1], w8.shape[-1]


def split_scale(scale: Tensor, split: Split) -> tuple[Tensor, Tensor, Tensor]:
    """The columns of scales (R, K // 32) that belong to each segment."""
    scale4, scale6, scale8 = scale.split(block_counts(split), dim=1)
    return scale4, scale6, scale8


def row_bytes(split: Split, fp6: str) -> int:
    """Bytes of a packed weight's row, with scales."""
    bits = sum(k * each for k, each in zip(split, segment_bits(fp6), strict=True))
    return bits // 8 + sum(split) // BLOCK_SIZE


def weights_are_fp4(split: Split, w_split: Split) -> bool:
    """Whether weights are all MXFP4, and activations are not. Raises ValueError for splits that fit no mode.

    Those that fit are equal, or all weights are MXFP4, or all activations are E4M3 bytes.
    """
    if w_split == weight_split(split, "mxfp4"):
        return split != w_split
    if split in (w_split, activation_split(w_split, "fp8")):
        return False
    raise ValueError(
        f"weights must be split like the activations, {split}, or all MXFP4, or meet MXFP8 alone, got {w_split}"
    )


def activations_are_wide(split: Split, w_split: Split) -> bool:
    """Whether activations are all E4M3 bytes, and weights are in several formats. Raises as `weights_are_fp4` does."""
    return not weights_are_fp4(split, w_split) and split != w_split


def product_split(split: Split, w_split: Split) -> Split:
    """The segments that a product of activations and weights split so goes through, one after the other."""
    return w_split if activations_are_wide(split, w_split) else split

"""From a split to shapes: what quantized matrices look like whose channels are [MXFP4 | MXFP6 | MXFP8]."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from micromix_compile.numerics.formats import BLOCK_SIZE

Split = tuple[int, int, int]
"""(k4, k6, k8): channels per format, multiples of 32."""


class PackedWeight(NamedTuple):
    """A quantized (N, C) weight: w4 (N, k4 // 2), w6 (3, N, k6 // 4), w8 (N, k8), w_scale (N, K // 32), uint8."""

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


def packed_shapes(n: int, split: Split) -> tuple[tuple[int, ...], ...]:
    """The shapes of a `PackedWeight` of n rows whose channels are split so."""
    k4, k6, k8 = split
    return (n, k4 // 2), (3, n, k6 // 4), (n, k8), (n, (k4 + k6 + k8) // BLOCK_SIZE)

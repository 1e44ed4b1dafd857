"""Rotation of blocks: 32 channels of the sorted order times a Hadamard matrix, which spreads what is large over all.

H32 has entries of 1 and -1, and H32 H32^T = 32. Activations are multiplied by 2**-5 H32 and weights by H32, so that
products stay what they are: powers of two are exact. Of activations no value comes out larger than the block's largest,
hence the bound of a row's largest value, of which scales are made, needs no rotation. Only the sums of the butterflies
round, in float32 and in one order, which every device keeps: the bytes are the same on all.

QuaRot (arXiv 2404.00456) and others rotate all channels at once; inside the blocks of MX formats: MR-GPTQ (arXiv
2509.23202), BRQ (arXiv 2511.04214).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE

if TYPE_CHECKING:
    from torch import Tensor

NORMALIZATION: Final = 1 / BLOCK_SIZE


def rotate_activation(y: Tensor, rotated: int) -> Tensor:
    """y 2**-5 H32, block by block, in the first `rotated` channels; y as it is behind them. y: (M, K) float32."""
    return torch.cat((_butterflies(y[:, :rotated] * NORMALIZATION), y[:, rotated:]), 1)


def rotate_weight(weight: Tensor, rotated: int) -> Tensor:
    """The weight that meets such activations: w H32 in the first `rotated` channels. weight: (N, K) float32.

    What exceeds float32 in a sum, of weights above 2**123, is infinite, and poisons its block.
    """
    return torch.cat((_butterflies(weight[:, :rotated]), weight[:, rotated:]), 1)


def unrotate_weight(weight: Tensor, rotated: int) -> Tensor:
    """The inverse of `rotate_weight`, up to the rounding of its sums."""
    return rotate_activation(weight, rotated)


def hadamard(device: torch.device) -> Tensor:
    """H32: (32, 32) float32, symmetric."""
    return rotate_weight(torch.eye(BLOCK_SIZE, dtype=torch.float32, device=device), BLOCK_SIZE)


def rotate_moment(moment: Tensor, rotated: int) -> Tensor:
    """The second moment (K, K) of rotated activations, from that of the activations in the same order."""
    return rotate_activation(rotate_activation(moment, rotated).mT.contiguous(), rotated)


def _butterflies(values: Tensor) -> Tensor:
    """values H32 for each block of 32. Five times, all pairs (a, b) become (a + b, a - b): first those 16 apart."""
    blocks = values.unflatten(1, (-1, BLOCK_SIZE))
    for _ in range(5):  # the index of the pair moves in front of that in the pair: next come those 8 apart
        upper, lower = blocks.unflatten(2, (2, BLOCK_SIZE // 2)).unbind(2)
        blocks = torch.stack((upper + lower, upper - lower), 3).flatten(2)
    rotated: Tensor = blocks.flatten(1)
    return rotated

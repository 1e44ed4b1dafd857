"""The order in which channels share blocks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import padded_channels

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.types import ChannelStatistics


def order_by_size(statistics: ChannelStatistics, config: MicroMixConfig) -> Tensor:
    """(C,) int64: channels ascending by mean |x|, for splits that mix formats."""
    return torch.argsort(statistics.abs_mean, stable=True)


def order_of_one_format(statistics: ChannelStatistics, config: MicroMixConfig) -> Tensor:
    """(C,) int64: the model's order or `sheltered_order`, as the config's `uniform_order` says."""
    if config.uniform_order == "sheltered":
        return sheltered_order(statistics.abs_mean)
    return torch.arange(statistics.abs_mean.numel(), device="cpu")


def padded(order: Tensor) -> Tensor:
    """channel_perm (K,) int32 of an order (C,): whole blocks, of which -1 pads the first."""
    padding = padded_channels(order.numel()) - order.numel()
    return torch.nn.functional.pad(order, (padding, 0), value=-1).to(torch.int32)


SHELTER = 0.002
"""Energy, as a share of that of its block's largest channel, up to which a channel is taken to lose all it holds.
MXFP4 takes about so much, MXFP6 less; but small channels also matter less. Chosen on the default model by the predicted
divergence of its activations in MXFP4 (MXFP6), calibration text: .65 (.028) with 0.00006, .61 (.028) with 0.00025, .38
(.023) with 0.001, .38 (.024) with 0.004, .40 (.025) with 0.017, .43 (.026) with 0.25."""


def sheltered_order(magnitudes: Tensor) -> Tensor:
    """(C,) int64: channels in an order whose blocks of 32 lose little to their largest channel.

    magnitudes: (C,) float32, >= 0, finite, typical of each channel.

    A block's scale follows its largest channel, and a channel far below is flattened. So the largest channel that is
    left takes the 31 that lose least beside it, until none is left: those of its own size, or so small that it hardly
    matters. Blocks ascend by their largest channel; the first may be the rest that fills no block.
    """
    sizes, order = magnitudes.to("cpu", torch.float64).sort(stable=True)
    channels, blocks = _Ascending(sizes.square()), []
    while channels.left > BLOCK_SIZE:
        blocks.append(channels.take_block())
    places = [*channels.rest(), *(place for block in reversed(blocks) for place in block)]
    return order[torch.tensor(places, dtype=torch.int64, device="cpu")]


class _Ascending:
    """Channels by ascending energy, as runs [start, stop) of places with equal energies, taken from both ends.

    What a channel of energy e loses beside one of energy E, min(e, SHELTER * E) - SHELTER * e, rises with e and then
    falls. So those that lose least stand at the ends of what is left, and all blocks take as long as one sort. No two
    runs above the peak lose the same: float32 sizes that differ at all do so by far more than float64 rounds.
    """

    def __init__(self, energies: Tensor) -> None:
        values, counts = torch.unique_consecutive(energies, return_counts=True)
        self._energies: list[float] = values.tolist()
        self._stops: list[int] = counts.cumsum(0).tolist()
        self._starts = [0, *self._stops[:-1]]
        self._low, self._high = 0, len(self._energies) - 1
        self.left = energies.numel()

    def take_block(self) -> list[int]:
        """The place of the largest channel, and before it, ascending, those of the 31 that lose least beside it."""
        top = self._energies[self._high]
        self._stops[self._high] -= 1
        beside: list[int] = []
        largest = self._stops[self._high]
        self._drop_empty()
        while (missing := BLOCK_SIZE - 1 - len(beside)) > 0:
            is_high = _loss(self._energies[self._high], top) < _loss(self._energies[self._low], top)
            run = self._high if is_high else self._low
            start = self._starts[run]
            self._starts[run] = min(start + missing, self._stops[run])
            beside += range(start, self._starts[run])
            self._drop_empty()
        self.left -= BLOCK_SIZE
        return [*sorted(beside), largest]

    def _drop_empty(self) -> None:
        while self._low < self._high and self._starts[self._low] == self._stops[self._low]:
            self._low += 1
        while self._low < self._high and self._starts[self._high] == self._stops[self._high]:
            self._high -= 1

    def rest(self) -> list[int]:
        """The places that no block took, ascending."""
        runs = range(self._low, self._high + 1)
        return [place for run in runs for place in range(self._starts[run], self._stops[run])]


def _loss(energy: float, top: float) -> float:
    """What a channel loses beside a block's largest."""
    return min(energy, SHELTER * top) - SHELTER * energy

"""Orders that tensor parallelism can cut: a linear's input channels in S equal shards, each with a split of its own.

A rank that computes a linear from some of its input channels holds whole shards, one after the other. No block crosses
a shard. Stored is one order of all channels, which one device runs like any other:

    [MXFP4 of shard 0, MXFP4 of shard 1, ... | MXFP6 of shard 0, ... | MXFP8 of shard 0, ...]

so that a rank's part is one slice of each segment, whatever number of ranks divides S.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import PackedWeight, Split

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def total(shards: Sequence[Split]) -> Split:
    """The split of all shards together."""
    k4, k6, k8 = (sum(counts) for counts in zip(*shards, strict=True))
    return k4, k6, k8


def check_cut(channels: int, shards: int, name: str) -> None:
    """Raise ValueError unless `channels` can be cut into so many shards of whole blocks."""
    if channels % (shards * BLOCK_SIZE):
        raise ValueError(
            f"{name} has {channels} input channels, which shards={shards} do not cut into whole blocks of "
            f"{BLOCK_SIZE}: shards times {BLOCK_SIZE} must divide {channels}"
        )


def check_ranks(shards: int, ranks: int, name: str) -> None:
    """Raise ValueError unless an order of so many shards can be dealt to so many ranks."""
    if shards % ranks:
        raise ValueError(
            f"{name} is ordered for shards={shards}, which {ranks} ranks do not divide: calibrate with shards={ranks} "
            f"or a multiple of it, or use as many ranks as divide {shards}"
        )


def joined_order(orders: Sequence[Tensor], splits: Sequence[Split]) -> Tensor:
    """One order (K,) int32 of the orders (K / S,) int32 of the shards, each of which counts its own channels from 0."""
    width = orders[0].numel()
    whole = [order + i * width for i, order in enumerate(orders)]
    parts = [order.split(split) for order, split in zip(whole, splits, strict=True)]
    return torch.cat([segments[i] for i in range(3) for segments in parts])


def own_rows(rows: int, rank: int, ranks: int, parts: int = 1) -> tuple[slice, ...]:
    """The rows of a rank of a matrix that is so many equal parts, one below the other: its share of each part."""
    each = rows // parts // ranks
    return tuple(slice(start, start + each) for start in ((part * ranks + rank) * each for part in range(parts)))


class Cut(NamedTuple):
    """What one of several ranks takes of a packed weight: some channels, some rows, or some experts.

    shards: the splits of its shards, a multiple of `ranks`; one of an order that is not cut. w_fp4: all weights are
    MXFP4, whatever the splits of their channels say. rows: the rank's come one slice below the other. experts: of a
    weight with a dimension of them in front.
    """

    shards: tuple[Split, ...]
    rank: int = 0
    ranks: int = 1
    w_fp4: bool = False
    rows: tuple[slice, ...] = (slice(None),)
    experts: slice = slice(None)

    @property
    def _own(self) -> slice:
        each = len(self.shards) // self.ranks
        return slice(self.rank * each, (self.rank + 1) * each)

    @property
    def split(self) -> Split:
        """(k4, k6, k8) of the rank's channels."""
        return total(self.shards[self._own])

    def rotated(self, rotated: int) -> int:
        """How many channels of the rank's order are rotated, if the first `rotated` of the whole one are."""
        return sum(max(0, min(rotated - start, length)) for start, length in self._slices(1))

    def order(self, channel_perm: Tensor) -> Tensor:
        """The rank's order (K / R,) int32, of its own channels counted from 0."""
        own = self._columns(channel_perm, 1)
        return own - self.rank * (channel_perm.numel() // self.ranks)

    def height(self, rows: int) -> int:
        """How many of so many rows are the rank's."""
        return sum(len(range(rows)[part]) for part in self.rows)

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """The rank's part of one of the tensors of a `PackedWeight`, called by its field."""
        columns = self._own_columns(name, tensor[self.experts])
        parts = [columns[..., rows, :] for rows in self.rows]
        return parts[0] if len(parts) == 1 else torch.cat(parts, -2)

    def weight(self, packed: PackedWeight) -> PackedWeight:
        """The rank's part of a packed weight."""
        return PackedWeight(*(self.part(name, tensor) for name, tensor in packed._asdict().items()))

    def _own_columns(self, name: str, tensor: Tensor) -> Tensor:
        segment, divisor = _PLACES[name]
        if self.ranks == 1 or not tensor.numel():
            return tensor
        if segment is None or self.w_fp4:
            return self._columns(tensor, divisor)
        start = sum(shard[segment] for shard in self.shards[: self._own.start])
        return tensor.narrow(-1, start // divisor, self.split[segment] // divisor)

    def _columns(self, tensor: Tensor, divisor: int) -> Tensor:
        """Its slices of all segments, side by side."""
        return torch.cat([tensor.narrow(-1, start, length) for start, length in self._slices(divisor)], -1)

    def _slices(self, divisor: int) -> list[tuple[int, int]]:
        """(start, length) in the whole order of the rank's slice of each segment, in units of `divisor` channels."""
        whole, skipped = total(self.shards), total(((0, 0, 0), *self.shards[: self._own.start]))
        starts = [sum(whole[:i]) + skipped[i] for i in range(3)]
        return [(start // divisor, size // divisor) for start, size in zip(starts, self.split, strict=True)]


_PLACES = {"w4": (0, 2), "w6": (1, 4), "w8": (2, 1), "w_scale": (None, BLOCK_SIZE)}
"""Of each part of a packed weight: its segment, or None for all of them; channels a byte of its last dimension."""

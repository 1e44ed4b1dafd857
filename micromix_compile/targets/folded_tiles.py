"""Which tile a folded product takes, in how many parts, packed or by way of the library: decided here and only here.

`FoldedTiles` answers for one kind of GPU from its tables and its number of processors; rows are those of one call.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from micromix_compile.targets.kernels import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.gluon_tiles import GluonTiles, Plan
    from micromix_compile.targets.kernels import FoldedWeight

PROCESSORS: Final = 132
"""Where there is no device to ask: of the GPUs that the figures here come from. Nothing was measured with others."""

_ANY: Final = 1 << 62

AHEAD_ROWS: Final = 4
"""Up to which folding quantizers ask for the order of the channels ahead of their input, and let their product start
before they end: for more, that takes longer than it helps, see `FoldedTiles.release_for`."""


@dataclass(frozen=True, slots=True)
class FoldedTile:
    """One program's share of `folded_mm_kernel`: (BLOCK_M, BLOCK_N) of the output in steps of BLOCK_K.

    SUM_STEPS: each step has a sum of its own, for the matrix instructions add with about 14 bits. Without, they add
    over all of K, as the library's do with fast accumulation, which leaves registers for more programs or larger tiles.
    SEGMENT_START: what the first step of MXFP6, and of MXFP8, counts for where programs share a tile, beside its bytes;
    a step of MXFP4 counts for 2.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SUM_STEPS: bool = True
    SEGMENT_START: int = 0

    @property
    def releases(self) -> bool:
        """`RELEASES` of the kernel: whether the next one may start before this has added up and stored its sums.

        On an H100 at M = 16, us of quantizer and product with and without: N x K of 4096 x 4096 10.2 and 10.6, of 6144
        x 4096 12.3 and 12.6, of 4096 x 14336 23.1 and 22.6; but at M = 64 16.1 and 15.8 of the second, 31.2 and 29.6 of
        the last.
        """
        return self.BLOCK_M == 16

    def stages8(self, split: tuple[int, int, int], weights: int) -> int:
        """`STAGES8` of the kernel for weights of (k4, k6, k8): two where MXFP8 is a small part and registers suffice.

        On an H100, us of quantizer and product in 2 and 3 stages, a 75/20/5 split, M = 1 and 16: N x K of 4096 x 4096
        9.0 and 9.4, 10.3 and 10.4; of 6144 x 4096 10.6 and 11.1, 11.8 and 11.9; of 4096 x 14336 20.3 and 21.3, 22.1 and
        22.4; at M = 64 14.7 and 15.0 for 6144 x 4096, 42.1 and 42.5 for 28672 x 4096. With 15 % MXFP8 two are better in
        9 of 12 cases, with 20 % in 5, with nothing else 11.4 and 10.6 at 4096 x 4096 and M = 1. With sums a step two
        take 130 registers instead of 127, so that three programs fit a processor instead of four: 39.6 and 35.4 at M =
        16, 28672 x 4096. At M = 64 and one weight without a bias they take 128 instead of 130, so that four fit, of
        which those that start early crowd: with a bias 4096 x 4096, held to 128, took 16.2, with three programs 12.7.
        """
        is_small = 6 * split[2] <= sum(split)
        return 2 if is_small and not self.SUM_STEPS and (self.BLOCK_M == 16 or weights > 1) else self.num_stages

    @property
    def copied_factors(self) -> int:
        """`COPIED` of the kernel: factors of a row and step, or twice that where each thread would have 2 bytes."""
        factors = self.BLOCK_K // 32
        return factors if factors * self.BLOCK_N >= 4 * 32 * self.num_warps else 2 * factors


PROGRAMS: Final = 3
"""Of the small tiles, that are counted on to run on a processor at a time."""

WIDE_PROGRAMS: Final = 2
"""The same of the wide tiles."""

LONG: Final = 8192
"""Bytes of a folded row from which on there may be `MAX_LONG_SPLIT` parts, and few of the widest tiles pay, in parts,
which take as long to add up for any number of them. At 256 rows, an earlier product, us with that tile and without: 57
and 76 for 4096 x 14336, but 28 and 23 for 4096 x 4096."""

# Of an earlier product. At M = 16, us with all tiles in 2, 4, 6 and 8 parts: 10.3, 9.0, 9.8 and 14.0 for N x K of 4096
# x 4096, 12.8, 11.5, 14.7 and 15.6 for 6144 x 4096, 23.1, 18.3, 17.1 and 21.5 for 4096 x 14336, on an H200. On an H100
# at M = 64 in 2, 3 and 4: 13.4, 12.4 and 11.6, then 16.1, 16.2 and 14.5, then 37.9, 31.6 and 28.5; in 6 12.1, 18.5 and
# 26.2.
MAX_SPLIT: Final = 4
"""Parts of a shared tile."""

MAX_LONG_SPLIT: Final = 6
"""The same of `LONG` channels and more."""


class Parts(NamedTuple):
    """How tiles are shared out: `whole` of them to a program each, each of the others to `split` programs."""

    whole: int
    split: int


Sizes = tuple[tuple[int, FoldedTile], ...]
"""(largest number of rows, tile), ascending."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FoldedTiles:
    """What decides for one kind of GPU.

    small, shared, wide: tiles, the shared for programs that share all of them, the wide for more rows than the small
    have. processors: of the device. shared_memory: bytes a program may use. expand_from: rows from which on a weight is
    expanded in memory for the library's FP8 product. max_expanded: bytes up to which weights that read one activation
    are expanded together, for one product of all. gluon: which products the persistent kernel takes, before all others.
    """

    small: Sizes
    shared: Sizes
    wide: Sizes
    shared_memory: int
    expand_from: int
    max_expanded: int
    processors: int = PROCESSORS
    gluon: GluonTiles | None = None

    @property
    def tiles(self) -> tuple[FoldedTile, ...]:
        """All of them."""
        return tuple(dict.fromkeys(tile for _, tile in (*self.small, *self.shared, *self.wide)))

    def tile_for(self, rows: int, columns: Sequence[int], channels: int) -> FoldedTile:
        """The tile for M = rows and all columns together: a wide one if that still is work for all processors.

        Where all are shared they have another form, see `shared`.
        """
        if rows > self.small[-1][1].BLOCK_M:
            tile = next(tile for most, tile in self.wide if rows <= most)
            fills = sum(columns) >= tile.BLOCK_N * WIDE_PROGRAMS * self.processors
            if fills or (rows > self.wide[0][0] and channels >= LONG):
                return tile
        tile = next(tile for most, tile in self.small if rows <= most)
        parts = self.parts_for(rows, columns, channels, tile)
        if parts.split > 1 and not parts.whole:
            return next(tile for most, tile in self.shared if rows <= most)
        return tile

    # On an H100, a 75/20/5 split, us of quantizer and product, by `RELEASE` "end", "stores", "start"; behind products
    # that have `RELEASES`, but for "end" of M = 1 and 4. M = 1: N x K of 4096 x 4096 9.8, 10.0, 9.3, of 6144 x 4096
    # 12.5, 12.0, 11.1, of 4096 x 14336 22.3, 21.5, 23.0, of 28672 x 4096 34.7, 34.2 and, an earlier product, 36.5. M =
    # 4, "end" and "stores": 10.5, 9.9, then 12.6, 12.1, then 22.3, 21.5, then 35.0, 34.5. M = 16: 10.2, 10.2, then
    # 12.3, 12.2, then 23.1, 23.4, then 35.2, 35.2. M = 64, "end" and "start": 13.6, 13.2, then 15.8, 15.0, then 29.6,
    # 30.0, then 42.9, 45.3.
    def release_for(self, rows: Any, channels: int, products: Sequence[Sequence[int]] = ()) -> str:
        """`RELEASE` of a quantizer, see `templates.triton.reorder_fold`, of M = rows, which may be symbolic.

        channels: bytes of a folded row. products: the columns of each product that reads it, as far as known.

        A product that starts at the start finds processors taken by the quantizer, and its programs crowd on the
        others. So it does only where the quantizer takes few, or where no more programs fit a processor than it gets in
        any case: three of 64 rows, by the registers of tiles in `MAX_SPLIT` parts.
        """
        some, most = self.small[-2][0], self.small[-1][1].BLOCK_M
        if not isinstance(rows, int) or not 0 < rows <= most:
            return "end"
        if products and channels < LONG and (rows == 1 or rows > some):
            parts = [self.parts_for(rows, n, channels, self.tile_for(rows, n, channels)) for n in products]
            if all(whole == 0 and (rows == 1 or split >= MAX_SPLIT) for whole, split in parts):
                return "start"
        return "stores" if rows <= AHEAD_ROWS else "end"

    def parts_for(self, rows: int, columns: Sequence[int], channels: int, tile: FoldedTile) -> Parts:
        """Few tiles are all shared, for as many programs as run at a time; of many, those that fill no round.

        A round gives each processor a tile. Three programs of the small tiles run on a processor at a time, or more,
        two of the wide, which many tiles leave whole: at M = 256 and N x K of 28672 x 4096 that took 98 us, with 52 of
        448 in two parts 105. At M = 16 and N x K of 28672 x 4096, 448 tiles, all whole took 37.3 us, 396 whole and the
        others in two parts 34.9 (an earlier product, an H100).
        """
        tiles = tiles_of(rows, columns, tile)
        is_wide = any(tile == wide for _, wide in self.wide)
        programs = (WIDE_PROGRAMS if is_wide else PROGRAMS) * self.processors
        whole, split = tiles // self.processors * self.processors, 2
        if tiles <= programs:
            most = MAX_LONG_SPLIT if channels >= LONG else MAX_SPLIT
            whole, split = 0, min(programs // max(tiles, 1), channels // (2 * tile.BLOCK_K), most)
        elif is_wide:
            whole = tiles
        return Parts(whole, split) if whole < tiles and 1 < split <= channels // tile.BLOCK_K else Parts(tiles, 1)

    def gluon_plan(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan | None:
        """How the persistent kernel computes a product of M = rows; None for what it does not take."""
        return None if self.gluon is None else self.gluon.plan_for(rows, weights, out_dtype)

    @property
    def all_expand_from(self) -> int:
        """Rows from which on every product that the library fits goes through expanded weights."""
        return self.expand_from if self.gluon is None else max(self.expand_from, self.gluon.most_rows + 1)

    def library_from(self, *, is_expanded: bool) -> int:
        """Rows from which on every product that it fits is the library's. is_expanded: as of `uses_library`."""
        return self.expand_from if is_expanded else self.all_expand_from

    def last_packed(self, split: Split) -> tuple[int, str]:
        """The most rows of a bfloat16 product that reads weights of this split packed, and its kernels' names."""
        if self.gluon is None or not self.gluon.takes(split):
            return self.expand_from - 1, "folded_mm"
        return self.all_expand_from - 1, "folded_mm and folded_mm_rows"

    def uses_library(
        self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype, *, is_expanded: bool = False
    ) -> bool:
        """Whether a product of M = rows goes through expanded weights. is_expanded: whether they are there already."""
        if rows < self.expand_from or not self.fits_library(weights, out_dtype):
            return False
        return is_expanded or self.gluon_plan(rows, weights, out_dtype) is None

    def fits_library(self, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> bool:
        """Whether the library takes such weights, expanded: it wants bfloat16 and whole groups of 16 columns."""
        is_narrow = all(weight.bias is None or weight.bias.dtype == torch.bfloat16 for weight in weights)
        return out_dtype == torch.bfloat16 and is_narrow and all(n % 16 == 0 for n in columns_of(weights))

    def expansion_runs(self, columns: Sequence[int], width: int) -> list[slice]:
        """Which weights are expanded together, from left to right. width: bytes of an expanded row."""
        runs: list[slice] = []
        for i, n in enumerate(columns):
            start = runs[-1].start if runs else i
            if runs and (sum(columns[start:i]) + n) * width <= self.max_expanded:
                runs[-1] = slice(start, i + 1)
            else:
                runs.append(slice(i, i + 1))
        return runs


def tiles_of(rows: int, columns: Sequence[int], tile: FoldedTile) -> int:
    """Tiles of all outputs."""
    return sum(-(-n // tile.BLOCK_N) for n in columns) * -(-rows // tile.BLOCK_M)


def partial_size(rows: int, columns: Sequence[int], tile: FoldedTile, parts: Parts) -> int:
    """Sums that the programs of shared tiles leave for each other."""
    if parts.split == 1:
        return 0
    return (tiles_of(rows, columns, tile) - parts.whole) * parts.split * tile.BLOCK_M * tile.BLOCK_N


# Swept on an H200, CUDA-graph replay over rotating weights, a 75/20/5 split, N x K of 28672 x 4096, all tiles whole,
# operands in an earlier order. At M = 16, 33.1 us; with steps of 128 channels 35.9, with four stages, of which three
# programs fit a processor, 41.5. At M = 32, 38.5; with steps of 256 channels 46.2. At M = 64, 53.0; with 128 columns
# and 8 warps 55.1, with a sum for each step, of 256 channels in two stages, 64.0. In today's order, on an H100: 35.0,
# 38.7 and 43.9, and the other sizes slower; since then 34.1 at M = 16 and 41.6 at M = 64.
_SMALL: Final = (
    (16, FoldedTile(16, 64, 256, 4, 3)),
    (32, FoldedTile(32, 64, 128, 4, 3)),
    (_ANY, FoldedTile(64, 64, 128, 4, 3, SUM_STEPS=False)),
)
"""Per largest number of rows."""

# On an H100, us with a sum for each step and without, quantizing included, at M = 1 and 16: N x K of 4096 x 4096 11.4
# and 9.8, 11.5 and 10.6; 6144 x 4096 13.1 and 12.5, 13.1 and 12.6; 4096 x 14336 23.4 and 22.3, 24.1 and 22.6. For 28672
# x 4096, not shared, 34.9 and 34.7, 35.7 and 35.4: precision costs next to nothing there.
#
# Later, with SEGMENT_START 0, 1 and 3, at M = 1 and 16: 4096 x 4096 9.1, 9.1 and 9.2, 10.1, 10.2 and 10.2; 6144 x 4096
# 11.1, 10.6 and 10.9, 12.3, 11.8 and 11.8; 4096 x 14336 20.9, 20.3 and 21.0, 22.4, 22.2 and 22.3. At M = 64 0 is best,
# and for 28672 x 4096, where it moves a part's end by a step: 34.0 and 34.3, 34.8 and 35.1.
_SHARED: Final = tuple((most, replace(tile, SUM_STEPS=False, SEGMENT_START=int(most == 16))) for most, tile in _SMALL)
"""Per largest number of rows, where programs share all tiles: each adds a part of the channels only."""

# On an H100, the same split, us of an earlier product: N x K of 28672 x 4096 at M = 128 72, with 128 columns and 8
# warps 74; at M = 256 98 and 99. Fewer tiles want to be smaller: 4096 x 14336 at M = 128, in four parts, 45, with 64
# rows 39.
_WIDE: Final = (
    (128, FoldedTile(128, 64, 128, 4, 3, SUM_STEPS=False)),
    (_ANY, FoldedTile(256, 64, 128, 4, 3, SUM_STEPS=False)),
)
"""Per largest number of rows, for more than 64 and many columns. A weight is unpacked once for each row of tiles."""

# On an H100 at 256 rows, us packed and expanded (expanding and the library in sum), N x K: 86 and 134 for 28672 x 4096,
# 55 and 76 for 4096 x 14336. Beyond, a second row of tiles would unpack all again. `expand_from` is not a bound of the
# kernel, which takes any M. A wider group than `max_expanded` takes more memory than all else in a layer, and gains
# little: 28672 x 4096 as one and as two, us at M = 1024, 2048 and 8192 on an H100: 247 and 248, 417 and 424, 1407 and
# 1432.
FOLDED_SM_90: Final = FoldedTiles(
    small=_SMALL,
    shared=_SHARED,
    wide=_WIDE,
    shared_memory=232_448,
    expand_from=257,
    max_expanded=64 * 2**20,
)

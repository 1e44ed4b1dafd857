"""Which tile a product with many experts' weights takes, and how many tiles there can be: decided here and only here.

How many rows each expert has is known on the device only. What is known is how many all have, R, and of how many
experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets.folded_tiles import MAX_LONG_SPLIT, PROCESSORS, PROGRAMS, FoldedTile, Sizes
from micromix_compile.targets.gluon_tiles import LINE, GluonTile

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.kernels import FoldedWeight


def rows_to_hold(rows: int, experts: int) -> int:
    """The rows of one expert that its tile should hold: half as many again as the mean, for routers are uneven.

    A further row of tiles unpacks a weight once more, which costs more than rows of a tile that stay empty.
    """
    return -(-3 * rows // (2 * experts))


def most_row_tiles(rows: int, experts: int, block_m: int) -> int:
    """Rows of tiles of `block_m` rows that any distribution of the rows over experts, or over none, may need."""
    groups = min(rows, experts + 1)
    return groups + (rows - groups) // block_m


@dataclass(frozen=True, kw_only=True, slots=True)
class GroupedTiles:
    """What decides for folded products of one kind of GPU.

    whole, shared: tiles by the rows that they should hold; the shared where programs share each tile. many: those of
    the persistent Gluon kernel, by the rows from which on each is taken. processors: of the device.
    """

    whole: Sizes
    shared: Sizes
    many: tuple[tuple[int, GluonTile], ...] = ()
    processors: int = PROCESSORS

    @property
    def tiles(self) -> tuple[FoldedTile, ...]:
        """All of them."""
        return tuple(dict.fromkeys(tile for _, tile in (*self.whole, *self.shared)))

    def kernels(self, split: Split) -> str:
        """The names of those that weights of this split take: the persistent one is for many rows of an expert."""
        is_taken = self.many and sum(split) and block_counts(split)[1] % 2 == 0
        return "grouped_folded_mm and grouped_mm_rows" if is_taken else "grouped_folded_mm"

    def gluon_tile_for(self, rows: int, weight: FoldedWeight, out_dtype: torch.dtype) -> GluonTile | None:
        """The persistent kernel's for R = rows in all, or None where it is not taken."""
        experts, columns = weight.row_scale.shape
        dtypes = (out_dtype, *(part.dtype for part in weight[5:] if part is not None))
        is_odd = columns % LINE or block_counts(weight.split)[1] % 2  # see `gluon_tiles.GluonTiles.refusal`
        if is_odd or not sum(weight.split) or any(dtype != torch.bfloat16 for dtype in dtypes):
            return None
        hold = rows_to_hold(rows, experts)
        return next((tile for least, tile in reversed(self.many) if hold >= least), None)

    def programs_of(self, tile: GluonTile, rows: int, experts: int, columns: int) -> int:
        """Of the persistent kernel: as many as run at a time, or as there can be tiles."""
        tiles = most_row_tiles(rows, experts, tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
        return min(tiles, tile.PER_SM * self.processors)

    def tile_for(self, rows: int, experts: int, columns: int, channels: int) -> tuple[FoldedTile, int]:
        """The tile for R = rows in all, and how many programs share each: more than one only where tiles are few.

        channels: bytes of a folded row. The rows may be fewer experts' than there are, so tiles are counted as if each
        row were another expert's.
        """
        hold = rows_to_hold(rows, experts)
        tile = next(tile for most, tile in self.whole if hold <= most)
        tiles = most_row_tiles(rows, experts, tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
        shared = next((one for most, one in self.shared if hold <= most), None)
        if shared is None:
            return tile, 1
        programs = PROGRAMS * self.processors
        split = min(programs // max(tiles, 1), channels // (2 * shared.BLOCK_K), MAX_LONG_SPLIT)
        return (shared, split) if split > 1 else (tile, 1)


_ANY: Final = 1 << 62

_GLUON_64: Final = GluonTile(64, 128, 5, 3, 32, 96, 40, PER_SM=2)
_GLUON_128: Final = GluonTile(128, 64, 4, 4, 32, 232, 40, PER_SM=2)
_GLUON_256: Final = GluonTile(256, 128, 4, 3, 64, 232, 40, TURNS=True)

# Of `whole` and `shared` the sizes are those of `folded_tiles`, which were swept, for products of one weight. On one
# H200, torch 2.11.0+cu130, Triton 3.6.0, another tile took less time in `down` alone: 32 x 64 x 128 5 % less than 16 x
# 64 x 256 with 1, 16 and 64 tokens of Qwen3-30B's (7 to 54 % more in the others with 1 and 16), and 32 x 64 x 256 12 %
# less than 32 x 64 x 128 with 64 tokens of Mixtral's. Of `many`, us of the products of Qwen3-30B (128 experts, 2048 x
# 768, 75/20/5), gathering included, by rows an expert on average:
#
#                     64 x 128  128 x 64  256 x 128  before
#   gate and up   32       122       164                144
#                256                 378        379     448
#   down          32        92       122                111
#                256                 282        328     337
#
# A tile of 256 rows holds less than half of experts of 256 rows on average. Where it takes over was not measured: it is
# faster for one weight from 512 rows on.
GROUPED_SM_90: Final = GroupedTiles(
    whole=(
        (16, FoldedTile(16, 64, 256, 4, 3)),
        (32, FoldedTile(32, 64, 128, 4, 3)),
        (64, FoldedTile(64, 64, 128, 4, 3, SUM_STEPS=False)),
        (128, FoldedTile(128, 64, 128, 4, 3, SUM_STEPS=False)),
        (_ANY, FoldedTile(256, 64, 128, 4, 3, SUM_STEPS=False)),
    ),
    shared=((16, FoldedTile(16, 64, 256, 4, 3, SUM_STEPS=False, SEGMENT_START=1)),),
    many=((33, _GLUON_64), (65, _GLUON_128), (577, _GLUON_256)),
)

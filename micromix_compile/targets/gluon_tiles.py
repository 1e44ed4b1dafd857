"""Which products the persistent Gluon kernel takes on sm_90, with which tile, shared out how: decided only here.

`GluonTiles` answers for one kind of GPU from one measured table. What it does not take it refuses with a reason, and
today's other ways, a launch that reads packed weights or the library behind an expansion, serve it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets.kernels import columns_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.kernels import FoldedWeight

logger = logging.getLogger(__name__)

CONSUMER_WEIGHTS: Final = 64
"""Rows of a weight that a consumer multiplies."""

REGISTERS: Final = 65536
"""Of a processor."""

LINE: Final = 8
"""Columns that are the 16 bytes of which outputs, stored in whole lines, have a multiple in each row."""


@dataclass(frozen=True, slots=True)
class GluonTile:
    """One program's share of `folded_mm_rows_kernel`, and its room.

    BLOCK_M, BLOCK_N: rows of x and weights of a tile. X_STAGES, P_STAGES: stages of x, a step each, and of packed
    weights, a slot each. CHUNK: rows that are stored at a time. CONSUMER, LOADER: registers of their threads. PER_SM:
    programs that share a processor. TURNS: whether two consumers take turns with the tensor cores. GROUP_M: rows of
    tiles that run together.
    """

    BLOCK_M: int
    BLOCK_N: int
    X_STAGES: int
    P_STAGES: int
    CHUNK: int
    CONSUMER: int
    LOADER: int
    PER_SM: int = 1
    TURNS: bool = False
    GROUP_M: int = 8

    @property
    def consumers(self) -> int:
        """Warp groups that multiply."""
        return self.BLOCK_N // CONSUMER_WEIGHTS

    @property
    def max_registers(self) -> int:
        """Of a thread when the kernel starts: all there are, spread over its warps, of which the loaders count four.

        WGMMA wants its sums and 26 more then, whatever partitions get later (ptxas, C7602).
        """
        return REGISTERS // self.PER_SM // (32 * 4 * (self.consumers + 1)) // 8 * 8

    def count(self, rows: int, columns: Sequence[int]) -> int:
        """Tiles of all outputs."""
        return -(-rows // self.BLOCK_M) * sum(-(-n // self.BLOCK_N) for n in columns)


@dataclass(frozen=True, kw_only=True, slots=True)
class GluonKernel:
    """All that one compilation of a kernel depends on.

    GROUPS: weights with one activation. EXPERTS: whether the one weight is many experts', a kernel of its own.
    """

    tile: GluonTile
    FP6: str
    GROUPS: int
    HAS_BIAS: bool
    EXPERTS: bool = False

    @classmethod
    def of(cls, tile: GluonTile, weights: Sequence[FoldedWeight], fp6: str, *, experts: bool = False) -> GluonKernel:
        """For some weights, or for one that is many experts'. Without MXFP6 its format makes no difference."""
        has_fp6 = weights[0].split[1] > 0
        return cls(
            tile=tile,
            FP6=fp6 if has_fp6 else "e2m3",
            GROUPS=len(weights),
            HAS_BIAS=weights[0].bias is not None,
            EXPERTS=experts,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class TimedTile:
    """A tile and what it was measured to take, in us.

    rows: from which number to which it is considered. columns: from how many on. alone: a step of a program that has a
    processor to itself. crowded: where `PER_SM` share it. start: of a launch, its first loads and its last stores.
    leave, add: steps that could be done while a part's sum is written and waited for, and while another's is read.
    """

    tile: GluonTile
    rows: range
    alone: float
    crowded: float
    start: float
    leave: int
    add: int
    columns: int = 0

    def options(self, tiles: int, steps: int, processors: int) -> Iterator[tuple[float, Plan]]:
        """(us, plan): all tiles whole; each in as many parts; what fills no round spread over all programs."""
        slots = processors * self.tile.PER_SM

        def option(length: float, programs: int, whole: int) -> tuple[float, Plan]:
            us = self.crowded if programs > processors else self.alone
            return self.start + us * length, Plan(self.tile, programs, whole)

        yield option(-(-tiles // slots) * steps, min(tiles, slots), tiles)
        for parts in range(2, min(slots // tiles, MOST_PARTS, steps // 2) + 1):
            yield option(-(-steps // parts) + self.leave + self.add * (parts - 1), tiles * parts, 0)
        rounds, rest = divmod(tiles, slots)
        if rounds and rest * 2 < slots:  # with the round before it, or it would be cut into too many parts
            rounds, rest = rounds - 1, rest + slots
        if rest * 2 > slots:
            yield option((rounds + rest / slots) * steps + 2 * (self.leave + self.add), slots, rounds * slots)


class Plan(NamedTuple):
    """programs: how many run. whole: tiles that are one program's, see `templates.gluon.shares`."""

    tile: GluonTile
    programs: int
    whole: int


MOST_PARTS: Final = 6
"""Of a tile that all are cut into."""


def steps_of(split: Split) -> int:
    """Steps along K of a tile: MXFP4 comes two at a time."""
    blocks4, blocks6, blocks8 = block_counts(split)
    return 2 * -(-blocks4 // 8) + -(-blocks6 // 4) + -(-blocks8 // 4)


class Product(NamedTuple):
    """What is asked of a product of M = rows: its shapes and types. biases: types of those that there are."""

    rows: int
    columns: tuple[int, ...]
    split: Split
    out_dtype: torch.dtype
    biases: tuple[torch.dtype, ...]

    @classmethod
    def of(cls, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Product:
        """With some weights."""
        biases = tuple(weight.bias.dtype for weight in weights if weight.bias is not None)
        return cls(rows, tuple(columns_of(weights)), weights[0].split, out_dtype, biases)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GluonTiles:
    """What decides for one kind of GPU. table: its tiles. processors: of the device."""

    table: tuple[TimedTile, ...]
    processors: int

    @property
    def tiles(self) -> tuple[GluonTile, ...]:
        """All of them."""
        return tuple(one.tile for one in self.table)

    @property
    def most_rows(self) -> int:
        """The most that it takes."""
        return max(one.rows.stop for one in self.table) - 1

    def considered(self, product: Product) -> list[TimedTile]:
        """Tiles for so many rows and columns."""
        columns = sum(product.columns)
        return [one for one in self.table if product.rows in one.rows and columns >= one.columns]

    def refusal(self, product: Product) -> str | None:
        """Why the kernel doesn't take a product, or None if it does.

        Odd numbers of MXFP6 blocks, two rows as one to TMA, and numbers of columns that are no multiple of 4, factors
        as one line to it, were tried and taken out: on an H200 such products ended in "an illegal instruction", which
        is probably TMA's answer to places in rows that are not whole 16 bytes.
        """
        blocks6, dtypes = block_counts(product.split)[1], (product.out_dtype, *product.biases)
        if not self.considered(product):
            return f"other kernels are faster for {product.rows} rows of {sum(product.columns)} columns"
        if any(dtype != torch.bfloat16 for dtype in dtypes):
            return f"outputs and biases must be bfloat16, got {', '.join(map(str, dtypes))}"
        if blocks6 % 2:
            return f"TMA wants places in rows that are whole 16 bytes, {blocks6} blocks of MXFP6 are an odd number of 8"
        if any(n % LINE for n in product.columns):
            return f"columns must be a multiple of {LINE}, for lines of whole 16 bytes, got {product.columns}"
        return None if sum(product.split) and all(product.columns) else "there is nothing to multiply"

    def takes(self, split: Split) -> bool:
        """Whether it takes weights of this split at all, in bfloat16 and with whole eights of columns."""
        return self.refusal(Product(self.most_rows, (LINE,), split, torch.bfloat16, ())) is None

    def plan_for(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan | None:
        """How the kernel computes a product of M = rows; None for what it does not take, which is logged once."""
        return _plan(self, Product.of(rows, weights, out_dtype))


@lru_cache(maxsize=4096)
def _plan(tiles: GluonTiles, product: Product) -> Plan | None:
    """The one that should take the least time."""
    reason = tiles.refusal(product)
    if reason is not None:
        logger.debug("%s: not by the persistent kernel, %s", product, reason)
        return None
    steps = steps_of(product.split)
    options = [
        option
        for one in tiles.considered(product)
        for option in one.options(one.tile.count(product.rows, product.columns), steps, tiles.processors)
    ]
    return min(options, key=lambda option: option[0])[1]


def gluon_sm_90(processors: int) -> GluonTiles:
    """For an sm_90 GPU with so many processors."""
    return GluonTiles(table=TABLE, processors=processors)


# One H200, torch 2.11.0+cu130, Triton 3.6.0, CUDA-graph replay over rotating weights, a 75/20/5 split, products alone,
# us of the kernel by tile (BLOCK_M x BLOCK_N) with the best shares, of what served before, of the library's FP8:
#
#              rows    64 x 128  128 x 64  256 x 128  before   FP8
#   28672 x 4096  64       34.9      65.1                36.4  40.0
#                128                 42.4                64.5  35.7
#                256                 73.3       59.5     87.2  52.6
#                512                146.8      106.9    158.8  85.2
#               1024                           203.4    230.5 173.8
#    6144 x 4096  64       15.7      18.2                13.5  14.1
#                128                 16.0                18.9  14.2
#                256                 21.9       22.7     29.4  14.7
#                512                 35.4       31.3     35.8  24.1
#               1024                            51.4     51.6  38.0
#    4096 x 4096  64       12.9      14.4                11.3  14.0
#                128                 12.4                14.2  14.1
#                256                 15.3       19.4     21.7  14.0
#                512                 21.4       23.0     22.7  14.7
#               1024                            31.2     33.3  25.2
#   4096 x 14336  64       23.1      35.6                23.0  43.6
#                128                 26.1                33.9  37.6
#                256                 37.4       35.0     53.5  38.3
#                512                 64.9       51.9     66.5  43.0
#               1024                            94.7    109.9  80.6
#
# 64 x 64, 128 x 128 and 128 x 256 were never more than 2 % faster. From 2,048 rows on the library is (an earlier form).
# Shares, us for 4096 x 14336 at 256 rows with 256 x 128: whole 85.2, in 2, 3 and 4 parts 49.5, 39.4, 35.0.
TABLE: Final = (
    TimedTile(
        tile=GluonTile(64, 128, 5, 3, 32, 96, 40, PER_SM=2),
        rows=range(64, 65), columns=16_384, alone=0.9, crowded=0.95, start=3.0, leave=4, add=2,
    ),
    TimedTile(
        tile=GluonTile(128, 64, 4, 4, 32, 232, 40, PER_SM=2),
        rows=range(65, 1025), alone=0.41, crowded=0.55, start=3.0, leave=4, add=2,
    ),
    TimedTile(
        tile=GluonTile(256, 128, 4, 3, 64, 232, 40, TURNS=True),
        rows=range(129, 1025), alone=0.77, crowded=0.77, start=3.0, leave=5, add=3,
    ),
)  # fmt: skip
"""Times of a step come from these figures, and reproduce which is fastest in all of them but two, within 2 %."""

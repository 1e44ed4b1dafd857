"""Tiles of the folded product, swept: for the constants in targets/folded_tiles.py (sm_90).

    python bench/bench_folded_tiles.py --rows 256 [--linear gate_up ...] [--tile 256x128x128-8w3s ...] [--split-k 4 ...]
    python bench/bench_folded_tiles.py --rows 16 --gluon [--gluon-tile 16x128-4x3s-72r3 ...]

Times are of the product alone for Llama-3.1-8B's linears at 75/20/5, as in bench_gpu_linear.py, beside what is chosen
now, by way of the library where many rows go there. A tile is rows x columns x channels a step, warps and stages, and
"+" where each step has a sum of its own. --split-k shares all tiles, or those beyond whole rounds of processors, among
so many programs. --gluon sweeps the persistent kernel's tiles in all ways that they can be shared: rows x weights,
stages of x and of weights, registers of consumers, programs a processor. A product that is off by more than 2 % of the
norm of the chosen one ends the run.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from folded_linears import folded_weight
from gpu_timing import copies, measure, size
from linear_cases import BF16, CUDA, FP6, MODELS, SPLITS, split_of
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import OutOfResources

from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.targets import gluon
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, PROCESSORS, FoldedTile, Parts, tiles_of
from micromix_compile.targets.gluon_tiles import (
    CONSUMER_WEIGHTS,
    REGISTERS,
    GluonTile,
    Plan,
    TimedTile,
    gluon_sm_90,
    steps_of,
)
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.layout import Split

CANDIDATES = tuple(
    FoldedTile(*sizes, SUM_STEPS=False)
    for sizes in ((64, 64, 256, 4, 3), (64, 128, 128, 8, 3), (128, 128, 128, 8, 3), (256, 128, 128, 8, 3))
)
"""Not in the tables."""
TILES = (
    *FOLDED_SM_90.tiles,
    *CANDIDATES,
)
LINEARS = MODELS["llama-8b"]
TOLERANCE = 0.02


def tile_argument(text: str) -> FoldedTile:
    """A tile from the command line."""
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)-(\d+)w(\d+)s(\+?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"a tile is written like 256x128x128-8w3s or 16x64x256-4w3s+, got {text!r}")
    m, n, k, warps, stages = map(int, found.groups()[:5])
    return FoldedTile(m, n, k, warps, stages, SUM_STEPS=bool(found[6]))


def tile_name(tile: FoldedTile) -> str:
    """What `tile_argument` reads."""
    sums = "+" if tile.SUM_STEPS else ""
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}-{tile.num_warps}w{tile.num_stages}s{sums}"


def folded_kernels() -> TritonFolded:
    """Those of this GPU."""
    kernels = target_of(CUDA).folded
    if not isinstance(kernels, TritonFolded):
        raise SystemExit("bench_folded_tiles.py needs a GPU of sm_90")
    return kernels


def ways_of(tiles: int, splits: list[int]) -> dict[str, Parts]:
    """How so many tiles may be shared out."""
    ways = {"whole": Parts(tiles, 1)}
    processors = folded_kernels().tiles.processors
    rounds = tiles // processors * processors
    for split in splits:
        ways[f"all in {split}"] = Parts(0, split)
        if 0 < rounds < tiles:
            ways[f"{tiles - rounds} in {split}"] = Parts(rounds, split)
    return ways


@dataclass(frozen=True)
class OnePlan:
    """Says that the persistent kernel takes all products, in one way."""

    plan: Plan
    most_rows: int = 1 << 30

    def plan_for(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan:
        """See `gluon.Planner`."""
        return self.plan


def gluon_tile_argument(text: str) -> GluonTile:
    """A tile of the persistent kernel from the command line."""
    found = re.fullmatch(r"(\d+)x(\d+)-(\d+)x(\d+)s-(\d+)r(\d+)(t?)", text)
    if found is None:
        raise argparse.ArgumentTypeError(f"a tile is written like 16x128-4x3s-72r3, with t for turns, got {text!r}")
    m, n, x_stages, p_stages, registers, per_sm = map(int, found.groups()[:6])
    loader = (REGISTERS // per_sm - n // CONSUMER_WEIGHTS * 128 * registers) // 128 // 8 * 8
    chunk = 64 if m > 128 else 32 if m >= 64 else 16
    return GluonTile(m, n, x_stages, p_stages, chunk, registers, min(loader, 40), PER_SM=per_sm, TURNS=bool(found[7]))


def gluon_tile_name(tile: GluonTile) -> str:
    """What `gluon_tile_argument` reads."""
    stages = f"{tile.X_STAGES}x{tile.P_STAGES}s"
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}-{stages}-{tile.CONSUMER}r{tile.PER_SM}{'t' * tile.TURNS}"


def plans_of(tile: GluonTile, rows: int, columns: Sequence[int], split: Split) -> dict[str, Plan]:
    """All ways to share a tile's tiles."""
    timed = TimedTile(tile=tile, rows=range(1, 1 << 30), alone=1, crowded=1, start=0, leave=0, add=0)
    options = timed.options(tile.count(rows, columns), steps_of(split), folded_kernels().tiles.processors)
    return {f"{plan.programs} programs, {plan.whole} whole": plan for _, plan in options}


def sweep(name: str, rows: int, tiles: list[FoldedTile | GluonTile], splits: list[int], table: Table) -> None:
    """One linear at one number of rows."""
    columns, channels = LINEARS[name]
    split = split_of(channels, SPLITS[0])
    first = [folded_weight(n, split) for n in columns]
    count = copies(sum(size(*weight) for weight in first))
    groups = [[FoldedWeight(*(part.clone() for part in w)) for w in first] for _ in range(count)]  # type: ignore[union-attr]
    perm = torch.randperm(channels, device=CUDA).to(torch.int16)
    values = torch.randn(rows, channels, device=CUDA, dtype=BF16)
    x = folded_kernels().quantize("none", values, None, 0.0, perm, split, FP6, "rceil", w_fp4=False)

    def multiply(group: list[FoldedWeight], tile: FoldedTile | None, parts: Parts | Plan | None) -> list[torch.Tensor]:
        if isinstance(parts, Plan):
            return gluon.multiply(x, group, FP6, BF16, OnePlan(parts)) or []
        return folded_kernels().multiply(x, group, fp6=FP6, out_dtype=BF16, tile=tile, parts=parts)

    def product(tile: FoldedTile | None, parts: Parts | Plan | None) -> torch.Tensor:
        return torch.cat(multiply(groups[0], tile, parts), 1).double()

    def time(tile: FoldedTile | None, parts: Parts | Plan | None) -> str:
        return f"{measure([lambda g=group: multiply(g, tile, parts) for group in groups]).us:.1f}"

    chosen = product(None, None)
    table.add_row(name, str(rows), "chosen now", "", time(None, None))
    for tile in tiles:
        is_gluon = isinstance(tile, GluonTile)
        text = gluon_tile_name(tile) if is_gluon else tile_name(tile)
        ways = plans_of(tile, rows, columns, split) if is_gluon else ways_of(tiles_of(rows, columns, tile), splits)
        for way, parts in ways.items():
            try:
                error = ((product(tile, parts) - chosen).norm() / chosen.norm()).item()
                if not error <= TOLERANCE:
                    raise SystemExit(f"{name}, {rows} rows, {text}, {way}: off by {error:.3g} of its norm")
                us = time(tile, parts)
            except (OutOfResources, ValueError) as reason:  # shared memory, locks
                us = str(reason)[:40]
            table.add_row(name, str(rows), text, way, us)
            print(name, rows, text, way, us, file=sys.stderr, flush=True)


def main() -> None:
    """Sweep and print; every row goes to standard error as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--linear", choices=LINEARS, action="append", help="may be repeated, as the others; default all"
    )
    parser.add_argument("--rows", type=int, action="append", metavar="M")
    parser.add_argument("--tile", type=tile_argument, action="append")
    parser.add_argument("--gluon", action="store_true", help="the persistent kernel's tiles")
    parser.add_argument("--gluon-tile", type=gluon_tile_argument, action="append")
    parser.add_argument("--split-k", type=int, action="append", metavar="PARTS")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_folded_tiles.py needs a GPU")
    tiles = arguments.tile or list(TILES)
    if arguments.gluon or arguments.gluon_tile:
        tiles = arguments.gluon_tile or list(gluon_sm_90(PROCESSORS).tiles)
    table = Table("linear", "M", "tile", "shared out", "us", title=str({**hardware(), **versions()}))
    with torch.inference_mode():
        for name in arguments.linear or LINEARS:
            for rows in arguments.rows or (64, 128, 256):
                sweep(name, rows, tiles, arguments.split_k or [2, 4], table)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

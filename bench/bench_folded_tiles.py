"""Tiles of the folded product, swept: for the constants in targets/folded_tiles.py (sm_90).

    python bench/bench_folded_tiles.py --rows 256 [--linear gate_up ...] [--tile 256x128x128-8w3s ...] [--split-k 4 ...]

Times are of the product alone for Llama-3.1-8B's linears at 75/20/5, as in bench_gpu_linear.py, beside what is chosen
now, by way of the library where many rows go there. A tile is rows x columns x channels a step, warps and stages, and
"+" where each step has a sum of its own. --split-k shares all tiles, or those beyond whole rounds of processors, among
so many programs. A product that is off by more than 2 % of the norm of the chosen one ends the run.
"""

from __future__ import annotations

import argparse
import re
import sys

import torch
from folded_linears import folded_weight
from gpu_timing import copies, measure, size
from linear_cases import BF16, CUDA, FP6, MODELS, SPLITS, split_of
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import OutOfResources

from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile, Parts, tiles_of
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of

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


def sweep(name: str, rows: int, tiles: list[FoldedTile], splits: list[int], table: Table) -> None:
    """One linear at one number of rows."""
    columns, channels = LINEARS[name]
    split = split_of(channels, SPLITS[0])
    first = [folded_weight(n, split) for n in columns]
    count = copies(sum(size(*weight) for weight in first))
    groups = [[FoldedWeight(*(part.clone() for part in w)) for w in first] for _ in range(count)]  # type: ignore[union-attr]
    perm = torch.randperm(channels, device=CUDA).to(torch.int16)
    values = torch.randn(rows, channels, device=CUDA, dtype=BF16)
    x = folded_kernels().quantize("none", values, None, 0.0, perm, split, FP6, "rceil", w_fp4=False)

    def multiply(group: list[FoldedWeight], tile: FoldedTile | None, parts: Parts | None) -> list[torch.Tensor]:
        return folded_kernels().multiply(x, group, fp6=FP6, out_dtype=BF16, tile=tile, parts=parts)

    def product(tile: FoldedTile | None, parts: Parts | None) -> torch.Tensor:
        return torch.cat(multiply(groups[0], tile, parts), 1).double()

    def time(tile: FoldedTile | None, parts: Parts | None) -> str:
        return f"{measure([lambda g=group: multiply(g, tile, parts) for group in groups]).us:.1f}"

    chosen = product(None, None)
    table.add_row(name, str(rows), "chosen now", "", time(None, None))
    for tile in tiles:
        for way, parts in ways_of(tiles_of(rows, columns, tile), splits).items():
            try:
                error = ((product(tile, parts) - chosen).norm() / chosen.norm()).item()
                if not error <= TOLERANCE:
                    raise SystemExit(f"{name}, {rows} rows, {tile_name(tile)}, {way}: off by {error:.3g} of its norm")
                us = time(tile, parts)
            except (OutOfResources, ValueError) as reason:  # shared memory, locks
                us = str(reason)[:40]
            table.add_row(name, str(rows), tile_name(tile), way, us)
            print(name, rows, tile_name(tile), way, us, file=sys.stderr, flush=True)


def main() -> None:
    """Sweep and print; every row goes to standard error as it comes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--linear", choices=LINEARS, action="append", help="may be repeated, as the others; default all"
    )
    parser.add_argument("--rows", type=int, action="append", metavar="M")
    parser.add_argument("--tile", type=tile_argument, action="append")
    parser.add_argument("--split-k", type=int, action="append", metavar="PARTS")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("bench_folded_tiles.py needs a GPU")
    table = Table("linear", "M", "tile", "shared out", "us", title=str({**hardware(), **versions()}))
    with torch.inference_mode():
        for name in arguments.linear or LINEARS:
            for rows in arguments.rows or (64, 128, 256):
                sweep(name, rows, arguments.tile or list(TILES), arguments.split_k or [2, 4], table)
    Console(width=100).print(table)


if __name__ == "__main__":
    main()

"""What the compiled kernels promise on Blackwell, where nothing of this was run: instructions, room, and time floors.

    python bench/bench_blackwell_static.py [--csv FOLDER]

Two tables for an RTX 5090 (sm_120) and a B200 (sm_100). The first holds what Triton and ptxas made of each tile of
the mixed matmul; an mma.sync is one warp's, a tcgen05.mma the whole program's. The second holds, for the linears of
Llama-3.1-8B with 75 % MXFP4, 20 % MXFP6 and 5 % MXFP8 channels, the least time that the vendor's peak rates allow: the
longer of moving each byte once and issuing each matrix instruction of the default tile, padding included. Both have
rows for each format of activations; "fp8" and "mxfp6" have one product. A kernel that the compiler emulates ends the
run.
"""

from __future__ import annotations

import argparse
import csv
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rich.console import Console
from rich.table import Table

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.targets import offline
from micromix_compile.targets.tiles import MIXED_TILES, Tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.targets.ptx import Compiled

NOT_RUN: Final = "compiled only: nothing here ran on Blackwell"
ROWS: Final = (1, 16, 256, 2048)
SHARES: Final = (0.75, 0.20, 0.05)

# Llama-3.1-8B, (N, K), with q/k/v and gate/up as one matmul each.
SHAPES: Final = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}

# Bits of one element, by the format of its weight: activations keep FP6 codes in whole bytes, weights pack them.
X_BITS: Final = {
    "same": {"MXFP4": 4, "MXFP6": 8, "MXFP8": 8},
    "fp8": {"MXFP4": 8, "MXFP6": 8, "MXFP8": 8},
}
LABELS: Final = {"same": "same", "fp8": "fp8, mxfp6"}
W_BITS: Final = {"MXFP4": 4, "MXFP6": 6, "MXFP8": 8}


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """Dense peak rates in operations a second and memory bandwidth in bytes a second, as the vendor states them."""

    capability: int
    kind: str
    fp4: float
    fp8: float
    bandwidth: float


# Dense rates, without structured sparsity. FP6 channels run as FP8 here, so FP6 has no rate of its own.
# RTX 5090: "NVIDIA RTX Blackwell GPU Architecture" whitepaper, appendix A: 1,676 TFLOPS FP4 with FP32 accumulation,
# 838 FP8 with FP16 and 419 with FP32 accumulation, 1,792 GB/s. It names no rate of block-scaled FP8, which accumulates
# in FP32; the floor takes 838, so that it is one either way.
# B200: "NVIDIA Blackwell Architecture Technical Brief", HGX B200, per GPU: 9 PFLOPS FP4, 4.5 FP8 and FP6, 8 TB/s.
GPUS: Final = {
    "RTX 5090": Gpu(capability=120, kind="sm_120", fp4=1676e12, fp8=838e12, bandwidth=1792e9),
    "B200": Gpu(capability=100, kind="sm_100", fp4=9e15, fp8=4.5e15, bandwidth=8e12),
}


def split_of(channels: int) -> tuple[int, int, int]:
    """SHARES of K in whole blocks of 128, the last format rounded up as the paper does, the first takes the rest."""
    k6, k8 = (128 * -(-round(channels * share) // 128) for share in SHARES[1:])
    return channels - k6 - k8, k6, k8


def stored_bytes(rows: int, split: Sequence[int], bits: dict[str, int]) -> int:
    """Bytes of an operand with its scales."""
    return sum(rows * k * width // 8 for k, width in zip(split, bits.values(), strict=True)) + (
        rows * sum(split) // BLOCK_SIZE
    )


def describe(tile: Tile) -> str:
    """A tile in one word: 128x256x128, warps, stages, and s where the operands are swapped."""
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K} {tile.num_warps}w{tile.num_stages}{'s' * tile.SWAP}"


def tile_rows(name: str, gpu: Gpu) -> list[dict[str, Any]]:
    """A row for each tile and format of activations: the compiler's part, bytes and operations of a step along K."""
    kind = MIXED_TILES[gpu.kind]
    tiles = list(dict.fromkeys(tile for _, tiles in kind.tiles for tile in tiles))
    cases = [(activations, tile) for activations in X_BITS for tile in tiles]
    kernels = [offline.mixed_mx_mm(gpu.capability, tile, kind, activations=activations) for activations, tile in cases]
    rows = []
    for (activations, tile), result in zip(cases, offline.compile_all(kernels), strict=True):
        if isinstance(result, offline.NotSupported):
            raise SystemExit(f"cannot compile for {name}: {result.reason}")
        if result.emulated or result.trap:
            raise SystemExit(f"{describe(tile)} is not what it should be on {name}: {result}")
        rows.append(tile_row(name, activations, tile, result))
    return rows


def tile_row(name: str, activations: str, tile: Tile, result: Compiled) -> dict[str, Any]:
    """A row of the first table."""
    row: dict[str, Any] = {"gpu": name, "target": result.target, "activations": LABELS[activations]}
    row["tile"] = describe(tile)
    row["mma_per_step"] = ", ".join(f"{count} {kind}" for kind, count in sorted(dict(result.mma_blocks).items()))
    row |= {"registers": result.registers, "spilled_bytes": result.spilled_bytes}
    row |= {"shared_bytes": result.shared_bytes, "tensor_columns": result.tensor_columns}
    for index, name_of_format in enumerate(W_BITS):
        split = [tile.BLOCK_K if i == index else 0 for i in range(3)]
        row[f"step_bytes_{name_of_format}"] = stored_bytes(tile.BLOCK_M, split, X_BITS[activations]) + stored_bytes(
            tile.BLOCK_N, split, W_BITS
        )
    row["step_flops"] = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K
    return row


def floor_row(name: str, gpu: Gpu, activations: str, layer: str, rows: int) -> dict[str, Any]:
    """A row of the second table, times in microseconds: the floor of the matmul with the default tile."""
    n, k = SHAPES[layer]
    tile = MIXED_TILES[gpu.kind].tiles_for(rows)[0]
    split = split_of(k)
    moved = stored_bytes(rows, split, X_BITS[activations]) + stored_bytes(n, split, W_BITS) + 2 * rows * n
    padded = -(-rows // tile.BLOCK_M) * tile.BLOCK_M * (-(-n // tile.BLOCK_N) * tile.BLOCK_N)
    memory = 1e6 * moved / gpu.bandwidth
    fp4 = split[0] if activations == "same" else 0  # channels that both sides have in MXFP4
    tensor = 1e6 * 2 * padded * (fp4 / gpu.fp4 + (k - fp4) / gpu.fp8)
    return {
        "gpu": name,
        "activations": LABELS[activations],
        "layer": layer,
        "N": n,
        "K": k,
        "split": "/".join(map(str, split)),
        "M": rows,
        "tile": describe(tile),
        "bytes": moved,
        "flops": 2 * rows * n * k,
        "memory_us": memory,
        "tensor_us": tensor,
        "floor_us": max(memory, tensor),
    }


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows as a table."""
    table = Table(title=f"{title} ({NOT_RUN})")
    for column in rows[0]:
        justify = "right" if isinstance(rows[0][column], int | float) else "left"
        table.add_column(column.replace("_", " "), justify=justify)
    for row in rows:
        table.add_row(*(f"{value:.2f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def save(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as CSV; every row says that it was not measured."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, [*rows[0], NOT_RUN])
        writer.writeheader()
        writer.writerows({**row, NOT_RUN: "static"} for row in rows)


def main() -> None:
    """Compile, compute and print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--csv", type=Path, help="write tiles.csv and floors.csv into this folder")
    arguments = parser.parse_args()

    tiles = [row for name, gpu in GPUS.items() for row in tile_rows(name, gpu)]
    cases = product(GPUS.items(), X_BITS, SHAPES, ROWS)
    floors = [floor_row(name, gpu, activations, layer, m) for (name, gpu), activations, layer, m in cases]
    show("Tiles of the mixed matmul, whole kernel and one step along K", tiles)
    show("Least time of Llama-3.1-8B's linears by the vendor's peak rates", floors)
    if arguments.csv:
        arguments.csv.mkdir(parents=True, exist_ok=True)
        save(arguments.csv / "tiles.csv", tiles)
        save(arguments.csv / "floors.csv", floors)


if __name__ == "__main__":
    main()

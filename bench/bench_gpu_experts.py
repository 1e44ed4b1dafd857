"""Layers of experts on sm_90 beside torch's grouped products in BF16 and FP8: times, ratios, bytes of the weights.

    python bench/bench_gpu_experts.py [--quick] [--model qwen3-30b-a3b ...] [--tokens 1 ...] [--split 75/20/5]
                                      [--parts] [--sweep] [--json FILE]

A layer is quantize, gate and up, SiLU times up and quantize, down, and the weighted sum, which in BF16's and FP8's is
Inductor's; the router, the same for all, is left out. FP8 is E4M3 with a scale a row on both sides, its quantizers and
gathers compiled by Inductor. A time is that of a CUDA graph of runs with other routings, each with other tokens, so
that L2 does not serve the weights: median and 20/80 % of replays per run. Before anything is timed, a small layer with
other weights in each expert must be near the same in BF16, and so must each layer that is timed.

--parts: the steps one by one, too. --sweep: our products alone with tiles of the table and others.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from expert_layers import SHAPES, SMALL, Bf16Layer, Fp8Layer, Layer, OurLayer, Routing, Shape, random_routing
from gpu_timing import Times, measure
from linear_cases import BF16, CUDA, FP6, SPLITS, split_argument
from rich.console import Console
from rich.table import Table
from triton.runtime.errors import OutOfResources

from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.lowering.torch_private.dynamo import dynamo_settings
from micromix_compile.targets.folded_tiles import PROCESSORS, FoldedTile
from micromix_compile.targets.gluon_tiles import gluon_sm_90
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90, rows_to_hold

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

TOKENS = (1, 16, 64, 512, 4096)
TOLERANCE = {"ours": 0.3, "fp8": 0.1}
"""Of the norm of BF16's result. MXFP4 costs random weights 0.2 in both products, another expert's weights 1.4."""

CANDIDATES = (
    *(FoldedTile(*sizes, SUM_STEPS=False) for sizes in ((128, 128, 128, 8, 3), (256, 128, 128, 8, 3))),
    *(FoldedTile(*sizes, SUM_STEPS=False) for sizes in ((16, 64, 256, 4, 4), (32, 64, 256, 4, 3), (64, 64, 256, 4, 3))),
)
"""Not in the tables."""

GLUON_CANDIDATES = dict.fromkeys((*(tile for _, tile in GROUPED_SM_90.many), *gluon_sm_90(PROCESSORS).tiles))
"""Of the persistent kernel."""


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement, of a layer or of a step of one. error: of the norm of BF16's result."""

    model: str
    tokens: int
    what: str
    us: float
    p20: float
    p80: float
    bytes: int
    error: float | None = None


def random_weights(shape: Shape, *, alike: bool) -> tuple[Tensor, Tensor]:
    """Gate and up, and down. alike: one expert's for all, which takes less time to make."""
    drawn = 1 if alike else shape.experts
    extents = (2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)
    gate_up, down = (torch.randn(drawn, n, k, device=CUDA, dtype=BF16) / k**0.5 for n, k in extents)
    return gate_up.repeat(shape.experts // drawn, 1, 1), down.repeat(shape.experts // drawn, 1, 1)


def layers_of(shape: Shape, split: str, *, alike: bool) -> dict[str, Layer]:
    """The same layer three times."""
    gate_up, down = random_weights(shape, alike=alike)
    return {
        "bf16": Bf16Layer(gate_up, down), "fp8": Fp8Layer(gate_up, down), "ours": OurLayer(gate_up, down, split)
    }  # fmt: skip


def errors(layers: dict[str, Layer], x: Tensor, routing: Routing) -> dict[str, float]:
    """How far each is from BF16's. Ends the run where that is too far."""
    want = layers["bf16"](x, routing).double()
    found = {}
    for name, most in TOLERANCE.items():
        found[name] = ((layers[name](x, routing).double() - want).norm() / want.norm()).item()
        if not found[name] <= most:
            raise SystemExit(f"{name} with {len(x)} tokens is off by {found[name]:.3g} of the norm, at most {most}")
    return found


def run_count(shape: Shape, tokens: int) -> int:
    """Routings in a graph: so many that their experts' weights are more than L2 holds."""
    return 2 if tokens * shape.active >= shape.experts else 8


def time_layers(name: str, layers: dict[str, Layer], arguments: argparse.Namespace) -> list[Row]:
    """All numbers of tokens."""
    shape, rows = SHAPES[name], []
    for tokens in arguments.tokens or TOKENS:
        inputs = [
            (torch.randn(tokens, shape.hidden, device=CUDA, dtype=BF16), random_routing(shape, tokens))
            for _ in range(run_count(shape, tokens))
        ]
        off = errors(layers, *inputs[0])
        for what, layer in layers.items():
            times = measure([lambda one=one, layer=layer: layer(*one) for one in inputs], seconds=arguments.seconds)
            rows.append(row_of(name, tokens, what, times, layer.bytes, off.get(what)))
            if arguments.parts:
                rows += time_parts(name, tokens, what, layer, inputs, arguments.seconds)
    return rows


def time_parts(
    name: str, tokens: int, what: str, layer: Layer, inputs: Sequence[tuple[Tensor, Routing]], seconds: float
) -> list[Row]:
    """The steps of a layer."""
    each = [layer.parts(*one) for one in inputs]
    return [
        row_of(name, tokens, f"{what}: {part}", measure([one[part] for one in each], seconds=seconds), 0)
        for part in each[0]
    ]


def row_of(name: str, tokens: int, what: str, times: Times, num_bytes: int, error: float | None = None) -> Row:
    """A measurement; it goes to standard error at once."""
    row = Row(name, tokens, what, times.us, times.p20, times.p80, num_bytes, error)
    print(json.dumps(asdict(row)), file=sys.stderr, flush=True)
    return row


def tile_name(tile: FoldedTile, split: int) -> str:
    """Rows x columns x channels a step, warps and stages, "+" with a sum a step, programs that share one."""
    text = f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}-{tile.num_warps}w{tile.num_stages}s{'+' * tile.SUM_STEPS}"
    return f"{text} in {split}"


def ways_of(layer: OurLayer, which: int, shape: Shape, tokens: int) -> dict[str, Callable[[Routing], object]]:
    """Tiles that hold the rows of an expert or half of them, or up to four times as many; by way of the library."""
    count = tokens if which == 0 else tokens * shape.active
    values = torch.randn(count, shape.hidden if which == 0 else shape.inner, device=CUDA, dtype=BF16)
    x, hold = layer.fold("none", values, None, which), rows_to_hold(tokens * shape.active, shape.experts)

    def arguments(one: Routing) -> tuple[Tensor, Tensor]:
        return one.rows if which == 0 else one.own, one.offs

    def way(tile: FoldedTile, split: int) -> Callable[[Routing], object]:
        return lambda one: layer.kernels.multiply_folded(
            x.q, x.row_scale, *arguments(one), layer.weights[which], FP6, BF16, tile=tile, split=split
        )

    tiles = [(tile, 1) for tile in (*(tile for _, tile in GROUPED_SM_90.whole), *CANDIDATES)]
    tiles += [(tile, split) for _, tile in GROUPED_SM_90.shared for split in (2, 3, 4) if tokens == 1]
    low, high = min(hold / 2, 128), max(4 * hold, 32)
    ways = {tile_name(*one): way(*one) for one in tiles if low <= one[0].BLOCK_M <= high}
    for one in GLUON_CANDIDATES:
        if low <= one.BLOCK_M <= high:
            ways[f"gluon {one.BLOCK_M}x{one.BLOCK_N}"] = lambda routing, one=one: layer.kernels.multiply_many(
                x.q, x.row_scale, *arguments(routing), layer.weights[which], FP6, one
            )
    if hold > 64:
        ways["expanded"] = lambda one: layer.multiply_expanded(x, *arguments(one), which)
    return ways


def sweep(name: str, layer: Layer, arguments: argparse.Namespace) -> list[Row]:
    """Our products with each tile."""
    assert isinstance(layer, OurLayer)
    shape, rows = SHAPES[name], []
    for tokens, (which, part) in product(arguments.tokens or TOKENS, enumerate(("gate_up", "down"))):
        routings = [random_routing(shape, tokens) for _ in range(run_count(shape, tokens))]
        for text, way in ways_of(layer, which, shape, tokens).items():
            runs = [lambda one=one, way=way: way(one) for one in routings]
            try:
                rows.append(row_of(name, tokens, f"{part} {text}", measure(runs, seconds=arguments.seconds), 0))
            except OutOfResources as reason:
                print(name, tokens, part, text, reason, file=sys.stderr)
    return rows


def check_small(split: str) -> None:
    """Each expert has weights of its own here."""
    layers = layers_of(SMALL, split, alike=False)
    for tokens in (1, 7, 300):
        errors(layers, torch.randn(tokens, SMALL.hidden, device=CUDA, dtype=BF16), random_routing(SMALL, tokens))


def print_table(rows: Sequence[Row]) -> None:
    """Times, and how many times as fast ours is."""
    table = Table("model", "tokens", "what", "us", "20 %", "80 %", "MB", "error", "× FP8", "× BF16")
    layers = {(row.model, row.tokens, row.what): row.us for row in rows}
    for row in rows:
        ratios = [
            f"{layers[row.model, row.tokens, other] / row.us:.2f}" if row.what == "ours" else ""
            for other in ("fp8", "bf16")
        ]
        error = "" if row.error is None else f"{row.error:.3f}"
        table.add_row(
            row.model, str(row.tokens), row.what, f"{row.us:.1f}", f"{row.p20:.1f}", f"{row.p80:.1f}",
            f"{row.bytes / 1e6:.0f}" if row.bytes else "", error, *ratios,
        )  # fmt: skip
    Console(width=120).print(table)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", choices=SHAPES, action="append", help="may be repeated; default all")
    parser.add_argument("--tokens", type=int, action="append", metavar="T", help="may be repeated")
    parser.add_argument("--split", type=split_argument, default=SPLITS[0], help="MXFP4/MXFP6/MXFP8, percent")
    parser.add_argument("--parts", action="store_true", help="the steps of each layer, too")
    parser.add_argument("--sweep", action="store_true", help="our products with each tile, too")
    parser.add_argument("--quick", action="store_true", help="a quarter of the replays")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.seconds = 0.01 if arguments.quick else 0.04
    return arguments


def main() -> None:
    """Check, measure, print."""
    arguments = parse()
    if not torch.cuda.is_available():
        raise SystemExit("bench_gpu_experts.py needs a GPU")
    rows: list[Row] = []
    with torch.inference_mode(), dynamo_settings(recompile_limit=256, automatic_dynamic_shapes=False):
        check_small(arguments.split)
        for name in arguments.model or SHAPES:
            layers = layers_of(SHAPES[name], arguments.split, alike=True)
            rows += time_layers(name, layers, arguments)
            if arguments.sweep:
                rows += sweep(name, layers["ours"], arguments)
            del layers
    print_table(rows)
    if arguments.json:
        found = {"machine": {**hardware(), **versions()}, "rows": [asdict(row) for row in rows]}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()

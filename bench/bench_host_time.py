"""Host time of a call of the folded product that the persistent kernel computes, by its parts.

    python bench/bench_host_time.py [--rows 256]

A call's operands were met before, as in every step of a model but the first. With a GPU of sm_90 all is as there;
elsewhere the CUDA driver is a stand-in that does nothing, and the figures are those of Python alone. Times are of the
thread, so that a machine that does other things, too, measures the same; the least of many runs.
"""

from __future__ import annotations

import argparse
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table

from micromix_compile import ops
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.numerics import folding, packing, reference
from micromix_compile.ops import folded
from micromix_compile.targets import cuda_driver, gluon
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, PROCESSORS
from micromix_compile.targets.gluon_tiles import gluon_sm_90
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import Row, Target, register_target, target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

SPLIT, COLUMNS, FP6 = (96, 64, 32), 64, "e2m3"
"""Small: none of it is looked at."""

CALLS, RUNS = 100, 100
GROUPS = ((1, False), (3, False), (3, True))


@contextmanager
def without_gpu() -> Iterator[None]:
    """A driver that takes everything and does nothing, and the CPU as a device that has the kernel."""
    driver = SimpleNamespace(cuTensorMapEncodeTiled=lambda *_: 0, cuLaunchKernelEx=lambda *_: 0)
    tiles = replace(FOLDED_SM_90, gluon=gluon_sm_90(PROCESSORS))
    target = Target(name="a stand-in", folded=TritonFolded(tiles))
    with ExitStack() as stack:
        for owner, name, value in (
            (cuda_driver, "driver", lambda: driver), (cuda_driver, "ensure_context", lambda _: None),
            (gluon, "_load", lambda *_: gluon.Loaded(1, 128, 1)), (gluon, "raw_stream", lambda _: 1),
            (gluon, "current_device", lambda: -1),
        ):  # fmt: skip
            stack.enter_context(mock.patch.object(owner, name, value))
        stack.callback(register_target(Row(serves=lambda device: device.type == "cpu", target=lambda _: target)))
        yield


def least_us(run: Callable[[], object], device: torch.device) -> float:
    """Of a call, on this thread; what it launches is waited for outside."""
    times = []
    for _ in range(RUNS):
        start = time.thread_time()
        for _ in range(CALLS):
            run()
        times.append((time.thread_time() - start) / CALLS)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return 1e6 * min(times)


def operands(rows: int, weights: int, device: torch.device, *, bias: bool) -> list[Any]:
    """Of `ops.folded_mm`."""
    x, k = torch.randn(rows, sum(SPLIT), device=device), sum(SPLIT)
    order = torch.arange(k, device=device)
    activation = folding.fold_activation(
        reference.reorder_quantize(x, order, SPLIT, fp6=FP6), x.abs().amax(1), w_fp4=False
    )
    group = []
    for _ in range(weights):
        w = reference.reorder_quantize(torch.randn(COLUMNS, k, device=device), order, SPLIT, fp6=FP6)
        packed = (w.q4, packing.pack_fp6(w.q6, FP6), w.q8)
        row_scale = folding.weight_row_scale(*packed, w.scale, FP6)
        factor = folding.weight_factor(*packed, w.scale, row_scale)
        group.append((*packed, factor, row_scale))
    biases = [torch.randn(COLUMNS, device=device).bfloat16() for _ in range(weights)] if bias else []
    return [*activation, *map(list, zip(*group, strict=True)), biases, [], FP6, torch.bfloat16]


def measure(rows: int, weights: int, device: torch.device, *, bias: bool) -> dict[str, float]:
    """us by part."""
    given = operands(rows, weights, device, bias=bias)
    x, lists = folding.FoldedActivation(*given[:3]), [*given[3:8], given[8] or [None] * weights]
    kernels = target_of(device).folded
    assert isinstance(kernels, TritonFolded), "sm_90 has them, and so has the stand-in"
    planner = kernels.tiles.gluon
    if planner is None:
        raise SystemExit("this machine's Triton does not compile the persistent kernel")
    gluon._groups.clear()
    met = gluon.multiply(x, [*map(FoldedWeight, *lists)], FP6, torch.bfloat16, planner)
    assert met is not None, "the kernel takes it"
    ready = next(ready for group in gluon._groups.values() for ready in group.by_shape.values())
    assert ready is not None, "it has been launched"
    whole = least_us(lambda: ops.folded_mm(*given), device)
    python = least_us(lambda: folded._folded_mm(*given), device)
    memory = least_us(lambda: allocations(x, met, ready.partial), device)
    return {
        "a call": whole,
        "torch's dispatcher": whole - python,
        "torch's memory for outputs and sums of parts": memory,
        "ours, the driver's launch included": python - memory,
    }


def allocations(x: folding.FoldedActivation, like: list[Tensor], partial: int) -> list[Tensor]:
    """What a launch asks torch for."""
    sums = [x.row_scale.new_empty(partial)] if partial else []
    return sums + [x.q.new_empty(one.shape, dtype=torch.bfloat16) for one in like]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=256)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(width=120)
    console.print("  ".join(f"{name} {value}" for name, value in {**hardware(), **versions()}.items()))
    with ExitStack() as stack, torch.inference_mode():
        if device.type == "cpu":
            console.print("no GPU: the driver is a stand-in that does nothing")
            stack.enter_context(without_gpu())
        found = [measure(arguments.rows, weights, device, bias=bias) for weights, bias in GROUPS]
    table = Table("us", *(f"{weights} weight{'s' * (weights > 1)}{', biases' * bias}" for weights, bias in GROUPS))
    for part in found[0]:
        table.add_row(part, *(f"{one[part]:.1f}" for one in found))
    console.print(table)


if __name__ == "__main__":
    main()

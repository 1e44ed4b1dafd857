"""Launches of the persistent Gluon kernel, which take some microseconds of the host's time: all of them is kept ready.

A launch of a group of weights is 13 descriptors at most and some numbers. Those of the weights are made once and kept
by where the weights lie, as is which plan serves which number of rows. The descriptor of the activation is kept by
where it lies, too, which torch's allocator repeats. Nothing is read of what the memory holds, so nothing here can be
out of date.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, field
from operator import attrgetter
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.tensors import current_device, raw_stream
from micromix_compile.numerics.folding import LOCKS
from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets import cuda_driver
from micromix_compile.targets.cuda_driver import MAP_BYTES
from micromix_compile.targets.gluon_kernels import NUMBERS, boxes_of
from micromix_compile.targets.gluon_launch import (
    MOST_KEPT,
    TMA_ALIGNMENT,
    Room,
    keep,
    load,
    map_of,
    maps_of_weight,
    room_for,
)
from micromix_compile.targets.gluon_tiles import GluonKernel
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.kernels import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.gluon_launch import Loaded
    from micromix_compile.targets.gluon_tiles import GluonTile, Plan
    from micromix_compile.targets.kernels import FoldedWeight

logger = logging.getLogger(__name__)

MOST_SHAPES: Final = 256
"""Of activations, that are kept with a group."""

_dtype: Final = attrgetter("dtype")
_shape: Final = attrgetter("shape")


class Planner(Protocol):
    """Who says which products the kernel takes: `GluonTiles`."""

    @property
    def most_rows(self) -> int:
        """The most that it takes."""

    def plan_for(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan | None:
        """How the kernel computes a product of M = rows; None for what it does not take."""


class Ready(NamedTuple):
    """How a product of some rows with a group is launched. partial: sums that programs leave for each other."""

    launch: Launch
    programs: int
    whole: int
    partial: int


@dataclass(slots=True)
class Group:
    """Weights where they lie: what serves activations of which shapes, None for what goes another way, and launches."""

    is_aligned: bool
    by_shape: dict[tuple[Any, ...], Ready | None] = field(default_factory=dict)
    launches: dict[GluonTile, Launch] = field(default_factory=dict)


_groups: dict[tuple[Any, ...], Group] = {}


def multiply_again(
    x: FoldedActivation, parts: Sequence[Tensor], fp6: str, out_dtype: torch.dtype, planner: Planner
) -> list[Tensor] | None:
    """What `multiply` returns of operands of shapes and places that it met before; None of all others.

    parts: of all weights, `parts_of`. Nothing of them need have been checked.
    """
    if x.q.shape[0] > planner.most_rows:
        return None
    group = _groups.get(_key_of(parts, fp6, out_dtype, planner))
    if group is None or not (x.q.is_contiguous() and x.row_scale.is_contiguous()):
        return None
    ready = group.by_shape.get((x.q.shape, x.row_scale.shape))
    return None if ready is None else _run(x, ready)


def multiply(
    x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, out_dtype: torch.dtype, planner: Planner
) -> list[Tensor] | None:
    """The products, (M, N) bfloat16 of each weight.

    None for what `planner` does not take, and where memory begins at no multiple of `TMA_ALIGNMENT`. All tensors are
    contiguous, fit each other, and are on one GPU.
    """
    rows, device = x.q.shape[0], x.q.get_device()
    if rows > planner.most_rows:
        return None
    if current_device() != device:
        with torch.cuda.device(device):
            return multiply(x, weights, fp6, out_dtype, planner)
    parts, shape = parts_of(weights), (x.q.shape, x.row_scale.shape)
    key = _key_of(parts, fp6, out_dtype, planner)
    group = _groups.get(key)  # other threads may let go of what is kept
    if group is None:
        group = Group(not any(part.data_ptr() % TMA_ALIGNMENT for part in parts))
        keep(_groups, key, group, MOST_KEPT)
    ready = group.by_shape.get(shape)
    if ready is None and shape not in group.by_shape:
        plan = planner.plan_for(rows, weights, out_dtype)
        ready = None if plan is None else _make_ready(group, rows, weights, fp6, plan, device)
        keep(group.by_shape, shape, ready, MOST_SHAPES)
    return None if ready is None else _run(x, ready)


def parts_of(weights: Sequence[FoldedWeight]) -> list[Tensor]:
    """All w4, then all w6, and so on; biases, if there are any."""
    return [part for same in zip(*weights, strict=True) for part in same if part is not None]


def _key_of(parts: Sequence[Tensor], fp6: str, out_dtype: torch.dtype, planner: Planner) -> tuple[Any, ...]:
    """What a launch depends on but for the activation. Memory that was freed may be given out again for others."""
    where = map(Tensor.data_ptr, parts)
    kinds = map(_dtype, parts[-MAX_GROUP:])  # biases, if there are any, may be of several
    return (planner, fp6, out_dtype, all(map(Tensor.is_contiguous, parts)), *where, *map(_shape, parts), *kinds)


def _make_ready(
    group: Group, rows: int, weights: Sequence[FoldedWeight], fp6: str, plan: Plan, device: int
) -> Ready | None:
    """What a launch takes, on the current device, which is `device`; None if TMA does not take the weights' memory."""
    if not group.is_aligned:
        logger.info("a weight begins at no multiple of %d bytes: another kernel multiplies with it", TMA_ALIGNMENT)
        return None
    tile = plan.tile
    if tile not in group.launches:
        cuda_driver.ensure_context(device)
        kernel = GluonKernel.of(tile, weights, fp6)
        group.launches[tile] = Launch.of(kernel, weights, load(kernel, device))
    is_shared = plan.whole < tile.count(rows, columns_of(weights))
    assert not is_shared or plan.programs * tile.consumers <= LOCKS, f"no GPU runs {plan.programs} programs"
    partial = plan.programs * tile.BLOCK_M * tile.BLOCK_N if is_shared else 0
    return Ready(group.launches[tile], plan.programs, plan.whole, partial)


def _run(x: FoldedActivation, ready: Ready) -> list[Tensor] | None:
    """Launch on the current stream of the device; None where x begins where TMA does not take it."""
    q, row_scale, locks = map(Tensor.data_ptr, x)
    if (q | row_scale | locks) % TMA_ALIGNMENT:
        return None
    device = x.q.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            return _run(x, ready)
    cuda_driver.ensure_context(device)
    return ready.launch.run(x, (q, row_scale, locks), ready, device)


@dataclass(slots=True)
class Launch:
    """The kernel with a group of weights, ready but for activation and outputs."""

    columns: list[int]
    x_box: Box
    room: Room
    config: Any
    grid: Any
    launch: Any
    function: int
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, kernel: GluonKernel, weights: Sequence[FoldedWeight], loaded: Loaded) -> Launch:
        """Encode the descriptors of the weights and place all arguments."""
        config = cuda_driver.launch_config(loaded.threads, loaded.shared_bytes)
        pointers = ("x_row_scale", "partial", "locks", *(f"out_{i}" for i in range(kernel.GROUPS)))
        room = room_for(kernel, _values_of(kernel, weights), pointers, ("M", "whole"))
        launch = cuda_driver.driver().cuLaunchKernelEx
        return cls(columns_of(weights), boxes_of(kernel)["x"], room, config, config.grid, launch, loaded.function)

    def run(self, x: FoldedActivation, where: tuple[int, int, int], ready: Ready, device: int) -> list[Tensor]:
        """Launch on the current stream of the current device, which is `device`. where: its parts lie."""
        (q, row_scale, locks), rows = where, x.q.shape[0]
        x_map = map_of(x.q, q, self.x_box)
        new_empty = x.q.new_empty
        outs = [new_empty((rows, n), dtype=torch.bfloat16) for n in self.columns]
        partial = x.row_scale.new_empty(ready.partial) if ready.partial else None
        shared = row_scale if partial is None else partial.data_ptr()
        memory, pointers, scalars = self.room
        with self.lock:
            memory[:MAP_BYTES] = x_map
            scalars.pack_into(
                memory, MAP_BYTES, row_scale, shared, locks, *map(Tensor.data_ptr, outs), rows, ready.whole
            )
            self.grid[0] = ready.programs
            self.config.stream = raw_stream(device)
            code = self.launch(self.config, self.function, pointers, None)
        if code:
            cuda_driver.check(code, "launching a product")
        return outs


def _values_of(kernel: GluonKernel, weights: Sequence[FoldedWeight]) -> dict[str, bytes]:
    """What each argument that is the same at each call holds, by name."""
    columns, blocks = columns_of(weights), block_counts(weights[0].split)
    per_tile = [-(-n // kernel.tile.BLOCK_N) for n in columns]
    numbers = dict.fromkeys(NUMBERS, 0) | {f"N{i}": n for i, n in enumerate(columns)}
    numbers |= {"tiles0": per_tile[0], "tiles1": sum(per_tile[:2]), "column_tiles": sum(per_tile)}
    numbers |= dict(zip(("blocks4", "blocks6", "blocks8"), blocks, strict=True))
    values = {name: struct.pack("i", number) for name, number in numbers.items()}
    for i, weight in enumerate(weights):
        values |= {f"{name}_{i}": made for name, made in maps_of_weight(weight, kernel).items()}
        values[f"w_row_scale_{i}"] = struct.pack("Q", weight.row_scale.data_ptr())
        if weight.bias is not None:
            values[f"bias_{i}"] = struct.pack("Q", weight.bias.data_ptr())
    return values

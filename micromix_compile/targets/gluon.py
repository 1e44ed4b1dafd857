"""Launches of the persistent Gluon kernel, which take some microseconds of the host's time: all of them is kept ready.

A launch of a group of weights is 13 descriptors at most and some numbers. Those of the weights are made once and kept
by where the weights lie, as is which plan serves which number of rows. The descriptor of the activation is kept by
where it lies, too, which torch's allocator repeats. Nothing is read of what the memory holds, so nothing here can be
out of date.
"""

from __future__ import annotations

import ctypes
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
from micromix_compile.targets.gluon_kernels import NUMBERS, boxes_of, compile_kernel, parameters_of
from micromix_compile.targets.gluon_tiles import GluonKernel
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.kernels import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.gluon_tiles import GluonTile, Plan
    from micromix_compile.targets.kernels import FoldedWeight

logger = logging.getLogger(__name__)

MOST_KEPT: Final = 4096
"""Groups of weights, and descriptors of activations. A model of 80 layers has 320 groups."""

MOST_SHAPES: Final = 256
"""Of activations, that are kept with a group."""

_dtype: Final = attrgetter("dtype")
_shape: Final = attrgetter("shape")

TMA_ALIGNMENT: Final = 16
"""Bytes at a multiple of which all memory must begin that a descriptor is of."""

_WARP: Final = 32
_LINE: Final = 64


class Planner(Protocol):
    """Who says which products the kernel takes: `GluonTiles`."""

    @property
    def most_rows(self) -> int:
        """The most that it takes."""

    def plan_for(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan | None:
        """How the kernel computes a product of M = rows; None for what it does not take."""


class Loaded(NamedTuple):
    """A compiled kernel on a device: the driver's handle, threads and bytes of shared memory of a program."""

    function: int
    threads: int
    shared_bytes: int


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


_loaded: dict[tuple[GluonKernel, int], Loaded] = {}
_groups: dict[tuple[Any, ...], Group] = {}
_maps: dict[tuple[int, ...], bytes] = {}


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
        _keep(_groups, key, group, MOST_KEPT)
    ready = group.by_shape.get(shape)
    if ready is None and shape not in group.by_shape:
        plan = planner.plan_for(rows, weights, out_dtype)
        ready = None if plan is None else _make_ready(group, rows, weights, fp6, plan, device)
        _keep(group.by_shape, shape, ready, MOST_SHAPES)
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
        group.launches[tile] = Launch.of(kernel, weights, _load(kernel, device))
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


def _keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    if len(kept) >= most:
        kept.clear()
    kept[key] = value


def _load(kernel: GluonKernel, device: int) -> Loaded:
    """The compiled kernel on the current device, which is `device`."""
    if (kernel, device) not in _loaded:
        compiled = compile_kernel(kernel)
        metadata = compiled.metadata
        function = cuda_driver.load_function(compiled.asm["cubin"], metadata.name, metadata.shared)
        _loaded[kernel, device] = Loaded(function, metadata.num_warps * _WARP, metadata.shared)
    return _loaded[kernel, device]


def _per_call(groups: int) -> tuple[tuple[str, ...], struct.Struct]:
    """Names of what each call has of its own beside the descriptor of x, and how it lies: pointers, then numbers."""
    pointers = ("x_row_scale", "partial", "locks", *(f"out_{i}" for i in range(groups)))
    return (*pointers, "M", "whole"), struct.Struct("Q" * len(pointers) + "ii")


class Room(NamedTuple):
    """The arguments of a launch in memory, and pointers to each in the kernel's order.

    memory: bytes, which begin with what each call has of its own: the descriptor of x, then `scalars`.
    """

    memory: memoryview
    pointers: Any
    scalars: struct.Struct


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
        room = _room(kernel, _values_of(kernel, weights))
        launch = cuda_driver.driver().cuLaunchKernelEx
        return cls(columns_of(weights), boxes_of(kernel)["x"], room, config, config.grid, launch, loaded.function)

    def run(self, x: FoldedActivation, where: tuple[int, int, int], ready: Ready, device: int) -> list[Tensor]:
        """Launch on the current stream of the current device, which is `device`. where: its parts lie."""
        (q, row_scale, locks), (rows, width) = where, x.q.shape
        x_map = _maps.get((q, rows, width, self.x_box.rows)) or self._new_map(x.q)
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

    def _new_map(self, q: Tensor) -> bytes:
        """The descriptor of an activation, which is kept."""
        rows, width = q.shape
        made = _encode(q, (rows, width), self.x_box)
        _keep(_maps, (q.data_ptr(), rows, width, self.x_box.rows), made, MOST_KEPT)
        return made


def _encode(tensor: Tensor, shape: tuple[int, int], box: Box) -> bytes:
    """The descriptor of a contiguous matrix, of a shape in elements of the box's type."""
    return cuda_driver.encode_map(
        tensor.data_ptr(), cuda_driver.DATA_TYPES[box.dtype], shape, shape[1] * box.bits // 8, (box.rows, box.columns),
        cuda_driver.SWIZZLES[box.swizzle],
    )  # fmt: skip


def _values_of(kernel: GluonKernel, weights: Sequence[FoldedWeight]) -> dict[str, bytes]:
    """What each argument that is the same at each call holds, by name.

    A segment without channels is never loaded; its descriptor, which must be valid, is that of the factors' words.
    """
    columns, boxes = columns_of(weights), boxes_of(kernel)
    blocks = block_counts(weights[0].split)
    per_tile = [-(-n // kernel.tile.BLOCK_N) for n in columns]
    numbers = dict.fromkeys(NUMBERS, 0) | {f"N{i}": n for i, n in enumerate(columns)}
    numbers |= {"tiles0": per_tile[0], "tiles1": sum(per_tile[:2]), "column_tiles": sum(per_tile)}
    numbers |= dict(zip(("blocks4", "blocks6", "blocks8"), blocks, strict=True))
    values = {name: struct.pack("i", number) for name, number in numbers.items()}
    for i, (weight, n) in enumerate(zip(weights, columns, strict=True)):
        words = (weight.factor.shape[0], n)
        shapes = {"w4": (n, 4 * blocks[0]), "w6": (3 * n, 2 * blocks[1]), "w8": (n, 8 * blocks[2])}
        for name, part in zip(shapes, (weight.w4, weight.w6, weight.w8), strict=True):
            tensor, shape = (part, shapes[name]) if shapes[name][1] else (weight.factor, words)
            values[f"{name}_{i}"] = _encode(tensor, shape, boxes[name])
        values[f"w_factor_{i}"] = _encode(weight.factor, words, boxes["w_factor"])
        values[f"w_row_scale_{i}"] = struct.pack("Q", weight.row_scale.data_ptr())
        if weight.bias is not None:
            values[f"bias_{i}"] = struct.pack("Q", weight.bias.data_ptr())
    return values


def _room(kernel: GluonKernel, values: dict[str, bytes]) -> Room:
    """Memory for all arguments: what each call has of its own side by side, zeros, then the rest.

    Behind a descriptor Triton passes its shape and strides, two numbers of four and two of eight bytes, which the
    kernel does not read, and behind all arguments two pointers to scratch memory, of which it has none: zeros.
    """
    names, scalars = _per_call(kernel.GROUPS)
    offsets = [8 * i for i in range(len(names) - 1)]
    offsets.append(offsets[-1] + 4)
    places = {"x": 0} | {name: MAP_BYTES + offset for name, offset in zip(names, offsets, strict=True)}
    zeros = MAP_BYTES + _LINE
    for name in values.keys() - places.keys():
        places[name] = zeros + MAP_BYTES * len(places)
    memory = cuda_driver.aligned_memory(max(places.values()) + MAP_BYTES)
    view = memoryview(memory).cast("B")
    for name in values.keys() - set(names):
        view[places[name] : places[name] + len(values[name])] = values[name]
    address, pointers = ctypes.addressof(memory), []
    for name, kind in parameters_of(kernel).items():
        pointers += [address + places[name]] + [address + zeros] * (4 if kind.startswith("tensordesc") else 0)
    pointers += [address + zeros] * 2
    return Room(view, (ctypes.c_void_p * len(pointers))(*pointers), scalars)

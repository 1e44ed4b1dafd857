"""Launches of the persistent Gluon kernel, which take some microseconds of the host's time: all of them is kept ready.

A launch of a group of weights is 13 descriptors at most and some numbers. Those of the weights are made once and kept
by where the weights lie. That of the activation is kept by where it lies, too, which torch's allocator repeats. Nothing
is read of what the memory holds, so nothing here can be out of date.
"""

from __future__ import annotations

import ctypes
import logging
import struct
from dataclasses import dataclass
from threading import Lock
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from micromix_compile.lowering.torch_private.tensors import raw_stream
from micromix_compile.numerics.folding import LOCKS
from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets import cuda_driver
from micromix_compile.targets.cuda_driver import MAP_BYTES
from micromix_compile.targets.gluon_kernels import NUMBERS, TMA_ALIGNMENT, boxes_of, compile_kernel, parameters_of
from micromix_compile.targets.gluon_tiles import GluonKernel
from micromix_compile.targets.kernels import columns_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.gluon_tiles import GluonTile, Plan
    from micromix_compile.targets.kernels import FoldedWeight

logger = logging.getLogger(__name__)

MOST_KEPT: Final = 4096
"""Launches, and descriptors of activations. A model of 80 layers has 320 groups of weights."""

_WARP: Final = 32
_LINE: Final = 64


def _per_call(groups: int) -> tuple[tuple[str, ...], struct.Struct]:
    """Names of what each call has of its own beside the descriptor of x, and how it lies: pointers, then numbers."""
    pointers = ("x_row_scale", "partial", "locks", *(f"out_{i}" for i in range(groups)))
    return (*pointers, "M", "whole"), struct.Struct("Q" * len(pointers) + "ii")


class Loaded(NamedTuple):
    """A compiled kernel on a device: the driver's handle, threads and bytes of shared memory of a program."""

    function: int
    threads: int
    shared_bytes: int


_loaded: dict[tuple[GluonKernel, int], Loaded] = {}
_launches: dict[tuple[Any, ...], tuple[Launch | None]] = {}
_maps: dict[tuple[Any, ...], bytes] = {}


def multiply(x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, plan: Plan) -> list[Tensor] | None:
    """The products in bfloat16, (M, N) of each weight; None if memory begins where TMA does not take it.

    plan: of `GluonTiles.plan_for`. All tensors are contiguous and on one GPU.
    """
    device = x.q.get_device()
    if torch.cuda.current_device() != device:  # to ask takes half a microsecond, to set one three
        with torch.cuda.device(device):
            return multiply(x, weights, fp6, plan)
    cuda_driver.ensure_context(device)
    launch = _launch_of(weights, fp6, plan.tile, device)
    if launch is None or any(part.data_ptr() % TMA_ALIGNMENT for part in x):
        return None
    outs = [x.q.new_empty((x.q.shape[0], n), dtype=torch.bfloat16) for n in launch.columns]
    launch.run(x, outs, plan)
    return outs


def _launch_of(weights: Sequence[FoldedWeight], fp6: str, tile: GluonTile, device: int) -> Launch | None:
    """What is ready for such weights where they lie, or made so now; None if TMA does not take their memory."""
    where = [part.data_ptr() for weight in weights for part in weight if part is not None]
    shapes = [part.shape for weight in weights for part in weight[:3]]
    key = (tile, fp6, device, *shapes, *where)
    found = _launches.get(key)
    if found is not None:
        return found[0]
    launch = None
    if all(address % TMA_ALIGNMENT == 0 for address in where):
        kernel = GluonKernel.of(tile, weights, fp6)
        launch = Launch.of(kernel, weights, _load(kernel, device))
    else:
        logger.info("a weight begins at no multiple of %d bytes: another kernel multiplies with it", TMA_ALIGNMENT)
    _keep(_launches, key, (launch,))
    return launch


def _keep(kept: dict[tuple[Any, ...], Any], key: tuple[Any, ...], value: Any) -> None:
    if len(kept) >= MOST_KEPT:
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
    function: int
    lock: Lock

    @classmethod
    def of(cls, kernel: GluonKernel, weights: Sequence[FoldedWeight], loaded: Loaded) -> Launch:
        """Encode the descriptors of the weights and place all arguments."""
        config = cuda_driver.launch_config(loaded.threads, loaded.shared_bytes)
        room = _room(kernel, _values_of(kernel, weights))
        return cls(columns_of(weights), boxes_of(kernel)["x"], room, config, loaded.function, Lock())

    def run(self, x: FoldedActivation, outs: Sequence[Tensor], plan: Plan) -> None:
        """Launch on the current stream of the current device."""
        (rows, width), tile = x.q.shape, plan.tile
        is_shared = plan.whole < tile.count(rows, self.columns)
        assert not is_shared or plan.programs * tile.consumers <= LOCKS, f"no GPU runs {plan.programs} programs"
        partial = x.row_scale.new_empty(plan.programs * tile.BLOCK_M * tile.BLOCK_N if is_shared else 0)
        pointers = [one.data_ptr() for one in (x.row_scale, partial, x.locks, *outs)]
        x_map = _map_of(x.q, (rows, width), self.x_box)
        with self.lock:
            self.room.memory[:MAP_BYTES] = x_map
            self.room.scalars.pack_into(self.room.memory, MAP_BYTES, *pointers, rows, plan.whole)
            self.config.grid[0] = plan.programs
            self.config.stream = raw_stream(x.q.get_device())
            code = cuda_driver.driver().cuLaunchKernelEx(self.config, self.function, self.room.pointers, None)
        cuda_driver.check(code, "launching a product")


def _map_of(tensor: Tensor, shape: tuple[int, int], box: Box) -> bytes:
    """The descriptor of a contiguous matrix, of a shape in elements of the box's type."""
    key = (tensor.data_ptr(), shape, box)
    found = _maps.get(key)
    if found is None:
        found = _encode(tensor, shape, box)
        _keep(_maps, key, found)
    return found


def _encode(tensor: Tensor, shape: tuple[int, int], box: Box) -> bytes:
    row_bytes = shape[1] * box.bits // 8
    if shape[0] == 1:  # any will do, but TMA wants a multiple
        row_bytes = -(-row_bytes // TMA_ALIGNMENT) * TMA_ALIGNMENT
    return cuda_driver.encode_map(
        tensor.data_ptr(), cuda_driver.DATA_TYPES[box.dtype], shape, row_bytes, (box.rows, box.columns),
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
        words = (weight.factor.shape[0], n) if boxes["w_factor"].rows > 1 else (1, weight.factor.shape[0] * n)
        pair = 2 if kernel.ODD_FP6 else 1  # rows that are one to TMA
        shapes = {"w4": (n, 4 * blocks[0]), "w6": (3 * n // pair, 2 * blocks[1] * pair), "w8": (n, 8 * blocks[2])}
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

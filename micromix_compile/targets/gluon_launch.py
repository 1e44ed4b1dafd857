"""What launches of the persistent Gluon kernels are made of: loaded kernels, descriptors, arguments in memory."""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets import cuda_driver
from micromix_compile.targets.cuda_driver import MAP_BYTES
from micromix_compile.targets.gluon_kernels import boxes_of, compile_kernel, parameters_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.gluon_tiles import GluonKernel
    from micromix_compile.targets.kernels import FoldedWeight

MOST_KEPT: Final = 4096
"""Groups of weights, and descriptors of activations. A model of 80 layers has 320 groups."""

TMA_ALIGNMENT: Final = 16
"""Bytes at a multiple of which all memory must begin that a descriptor is of."""

_WARP: Final = 32
_LINE: Final = 64


class Loaded(NamedTuple):
    """A compiled kernel on a device: the driver's handle, threads and bytes of shared memory of a program."""

    function: int
    threads: int
    shared_bytes: int


class Room(NamedTuple):
    """The arguments of a launch in memory, and pointers to each in the kernel's order.

    memory: bytes, which begin with what each call has of its own: the descriptor of x, then `scalars`.
    """

    memory: memoryview
    pointers: Any
    scalars: struct.Struct


_loaded: dict[tuple[GluonKernel, int], Loaded] = {}
_maps: dict[tuple[int, ...], bytes] = {}


def keep(kept: dict[Any, Any], key: Any, value: Any, most: int) -> None:
    """Put into what is kept, which is let go of when it is full."""
    if len(kept) >= most:
        kept.clear()
    kept[key] = value


def load(kernel: GluonKernel, device: int) -> Loaded:
    """The compiled kernel on the current device, which is `device`."""
    if (kernel, device) not in _loaded:
        compiled = compile_kernel(kernel)
        metadata = compiled.metadata
        function = cuda_driver.load_function(compiled.asm["cubin"], metadata.name, metadata.shared)
        _loaded[kernel, device] = Loaded(function, metadata.num_warps * _WARP, metadata.shared)
    return _loaded[kernel, device]


def map_of(q: Tensor, where: int, box: Box) -> bytes:
    """The descriptor of an activation that begins at `where`, which is kept by that."""
    rows, width = q.shape
    made = _maps.get((where, rows, width, box.rows))
    if made is None:
        made = _encode(q, (rows, width), box)
        keep(_maps, (where, rows, width, box.rows), made, MOST_KEPT)
    return made


def maps_of_weight(weight: FoldedWeight, kernel: GluonKernel) -> dict[str, bytes]:
    """Descriptors of a weight, or of one with a leading dimension of experts, whose rows then lie below each other.

    A segment without channels is never loaded; its descriptor, which must be valid, is that of the factors' words.
    """
    boxes, blocks, n = boxes_of(kernel), block_counts(weight.split), weight.row_scale.shape[-1]
    rows, words = weight.row_scale.numel(), (weight.factor.numel() // (4 * n), n)
    shapes = {"w4": (rows, 4 * blocks[0]), "w6": (3 * rows, 2 * blocks[1]), "w8": (rows, 8 * blocks[2])}
    maps = {"w_factor": _encode(weight.factor, words, boxes["w_factor"])}
    for name, part in zip(shapes, (weight.w4, weight.w6, weight.w8), strict=True):
        tensor, shape = (part, shapes[name]) if shapes[name][1] else (weight.factor, words)
        maps[name] = _encode(tensor, shape, boxes[name])
    return maps


def _encode(tensor: Tensor, shape: tuple[int, int], box: Box) -> bytes:
    """The descriptor of a contiguous matrix, of a shape in elements of the box's type."""
    return cuda_driver.encode_map(
        tensor.data_ptr(), cuda_driver.DATA_TYPES[box.dtype], shape, shape[1] * box.bits // 8, (box.rows, box.columns),
        cuda_driver.SWIZZLES[box.swizzle],
    )  # fmt: skip


def room_for(kernel: GluonKernel, values: dict[str, bytes], pointers: Sequence[str], numbers: Sequence[str]) -> Room:
    """Memory for all arguments: what each call has of its own side by side, zeros, then the rest.

    pointers, numbers: names of what each call has of its own beside the descriptor of x.

    Behind a descriptor Triton passes its shape and strides, two numbers of four and two of eight bytes, which the
    kernel does not read, and behind all arguments two pointers to scratch memory, of which it has none: zeros.
    """
    scalars = struct.Struct("Q" * len(pointers) + "i" * len(numbers))
    places = {"x": 0} | {name: MAP_BYTES + 8 * i for i, name in enumerate(pointers)}
    places |= {name: MAP_BYTES + 8 * len(pointers) + 4 * i for i, name in enumerate(numbers)}
    zeros = MAP_BYTES + _LINE
    assert MAP_BYTES + scalars.size <= zeros
    for name in values.keys() - places.keys():
        places[name] = zeros + MAP_BYTES * len(places)
    memory = cuda_driver.aligned_memory(max(places.values()) + MAP_BYTES)
    view = memoryview(memory).cast("B")
    for name in values.keys() - {*pointers, *numbers}:
        view[places[name] : places[name] + len(values[name])] = values[name]
    address, in_order = ctypes.addressof(memory), []
    for name, kind in parameters_of(kernel).items():
        in_order += [address + places[name]] + [address + zeros] * (4 if kind.startswith("tensordesc") else 0)
    in_order += [address + zeros] * 2
    return Room(view, (ctypes.c_void_p * len(in_order))(*in_order), scalars)

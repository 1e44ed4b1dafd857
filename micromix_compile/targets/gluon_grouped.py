"""Launches of the persistent Gluon kernel of experts: rows gathered in one launch, multiplied in another.

What is kept between calls, and why it can't be out of date, is as in `gluon`.
"""

from __future__ import annotations

import logging
import struct
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.tensors import current_device, raw_stream
from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets import cuda_driver
from micromix_compile.targets.cuda_driver import MAP_BYTES
from micromix_compile.targets.gluon_kernels import EXPERT_NUMBERS, boxes_of
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
from micromix_compile.targets.launch import KernelCall

if TYPE_CHECKING:
    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.gluon_launch import Loaded
    from micromix_compile.targets.gluon_tiles import GluonTile
    from micromix_compile.targets.kernels import FoldedWeight

logger = logging.getLogger(__name__)

GATHERED_WORDS = 512
"""Of four bytes, that a program of `gather_rows_kernel` copies at a time: 16 bytes a thread."""


@dataclass(slots=True)
class Launch:
    """The kernel with the weights of experts, ready but for activation, routing and output."""

    x_box: Box
    room: Room
    config: Any
    function: int
    lock: Lock = field(default_factory=Lock)

    @classmethod
    def of(cls, kernel: GluonKernel, weight: FoldedWeight, loaded: Loaded) -> Launch:
        """Encode the descriptors of the weights and place all arguments."""
        config = cuda_driver.launch_config(loaded.threads, loaded.shared_bytes)
        room = room_for(kernel, _values_of(kernel, weight), ("x_row_scale", "offs", "out"), ("R",))
        return cls(boxes_of(kernel)["x"], room, config, loaded.function)

    def run(self, q: Tensor, row_scale: Tensor, offs: Tensor, out: Tensor, programs: int) -> None:
        """Launch on the current stream of the current device, where all is."""
        memory, pointers, scalars = self.room
        where = q.data_ptr()
        x_map = map_of(q, where, self.x_box)
        with self.lock:
            memory[:MAP_BYTES] = x_map
            addresses = (row_scale.data_ptr(), offs.data_ptr(), out.data_ptr())
            scalars.pack_into(memory, MAP_BYTES, *addresses, out.shape[0])
            self.config.grid[0] = programs
            self.config.stream = raw_stream(q.get_device())
            code = cuda_driver.driver().cuLaunchKernelEx(self.config, self.function, pointers, None)
        cuda_driver.check(code, "launching a product of experts")


_launches: dict[tuple[Any, ...], Launch] = {}


def multiply(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, weight: FoldedWeight, fp6: str, tile: GluonTile,
    programs: int,
) -> Tensor | None:  # fmt: skip
    """(R, N) bfloat16, see `ops.grouped`; None where memory begins at no multiple of `TMA_ALIGNMENT`.

    All tensors are contiguous, fit each other, and are on one GPU. programs: that run.
    """
    device = q.get_device()
    if current_device() != device:
        with torch.cuda.device(device):
            return multiply(q, row_scale, rows, offs, weight, fp6, tile, programs)
    parts = [part for part in weight if part is not None]
    if any(part.data_ptr() % TMA_ALIGNMENT for part in parts):
        logger.info("a weight begins at no multiple of %d bytes: another kernel multiplies with it", TMA_ALIGNMENT)
        return None
    cuda_driver.ensure_context(device)
    kernel = GluonKernel.of(tile, [weight], fp6, experts=True)
    key = (kernel, device, *(part.data_ptr() for part in parts), *(part.shape for part in parts))
    launch = _launches.get(key)  # other threads may let go of what is kept
    if launch is None:
        launch = Launch.of(kernel, weight, load(kernel, device))
        keep(_launches, key, launch, MOST_KEPT)
    count = rows.shape[0]
    out = q.new_empty((count, weight.row_scale.shape[1]), dtype=torch.bfloat16)
    room = q.new_empty((count, q.shape[1])), row_scale.new_empty(count)
    gather_call(q, row_scale, rows, offs, *room).launch()
    launch.run(*room, offs, out, programs)
    return out


def gather_call(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, out: Tensor, out_row_scale: Tensor
) -> KernelCall:
    """The launch that fills out: (R, `folding.fold_width`) uint8, and out_row_scale: (R,) float32."""
    from micromix_compile.templates.triton.gather_rows import gather_rows_kernel

    return KernelCall(
        kernel=gather_rows_kernel,
        grid=(rows.shape[0],),
        args={
            "x": q.view(torch.int32),
            "x_row_scale": row_scale,
            "rows": rows,
            "offs": offs,
            "out": out.view(torch.int32),
            "out_row_scale": out_row_scale,
            "E": offs.shape[0],
            "quads": q.shape[1] // 16,
        },
        constexprs={"BLOCK": GATHERED_WORDS, "LAUNCH_PDL": True},
        num_warps=4,
    )


def _values_of(kernel: GluonKernel, weight: FoldedWeight) -> dict[str, bytes]:
    """What each argument that is the same at each call holds, by name."""
    experts, columns = weight.row_scale.shape
    numbers = dict.fromkeys(EXPERT_NUMBERS, 0) | {"N": columns, "E": experts}
    numbers |= {"column_tiles": -(-columns // kernel.tile.BLOCK_N), "words": weight.factor.shape[1]}
    numbers |= dict(zip(("blocks4", "blocks6", "blocks8"), block_counts(weight.split), strict=True))
    values = maps_of_weight(weight, kernel) | {name: struct.pack("i", number) for name, number in numbers.items()}
    values["w_row_scale"] = struct.pack("Q", weight.row_scale.data_ptr())
    if weight.bias is not None:
        values["bias"] = struct.pack("Q", weight.bias.data_ptr())
    return values

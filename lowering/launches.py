"""Launches of Triton kernels, described by `targets`, as a part of the graph that Inductor lowers.

A `TritonTemplate` has one output. A user-defined kernel has as many as it writes, so lowerings allocate them and hand
Inductor the launch as if a model had written it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile.lowering.torch_private.lowerings import ir, lowerings
from micromix_compile.lowering.torch_private.user_kernels import lower_kernel_launch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.targets.launch import KernelCall


@dataclass(frozen=True, slots=True)
class Operand:
    """What a description of a launch reads of a tensor, of a node of Inductor's IR instead."""

    node: Any

    @property
    def shape(self) -> list[Any]:
        """Extents; a symbolic one stays an expression."""
        return [_plain(size) for size in self.node.get_size()]

    @property
    def dtype(self) -> torch.dtype:
        """Of an element."""
        dtype: torch.dtype = self.node.get_dtype()
        return dtype

    def stride(self, dim: int) -> Any:
        """Elements from one to the next along `dim`."""
        return _plain(self.node.get_stride()[dim])

    def element_size(self) -> int:
        """Bytes."""
        return int(self.node.get_dtype().itemsize)


def _plain(size: Any) -> Any:
    return int(size) if getattr(size, "is_Integer", True) else size


def empty(size: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    """An output for a launch to fill."""
    return lowerings[torch.ops.aten.empty.memory_format](list(size), dtype=dtype, device=device)


def launch(call: KernelCall) -> None:
    """Add a launch whose tensors are `Operand`s to the graph."""
    assert call.fuses, "Inductor takes no option for it"
    args = {name: value.node if isinstance(value, Operand) else value for name, value in call.args.items()}
    kernel = _tuned(call.kernel, call.num_warps, call.num_stages)
    lower_kernel_launch(kernel, call.grid, args, call.constexprs)


@cache
def _tuned(kernel: Any, num_warps: int, num_stages: int) -> Any:
    """The kernel with its launch options, in the one form that Inductor takes them in."""
    import triton

    options = {"num_warps": num_warps} | ({"num_stages": num_stages} if num_stages else {})
    return triton.autotune([triton.Config({}, **options)], key=[])(kernel)


def in_memory(node: Any) -> Any:
    """A tensor of a kernel's: contiguous, or rows of a wider matrix, for the kernel takes the distance between rows.

    Only a fixed layout is taken as it is: Inductor may still change the strides of another.
    """
    view = ir.ExternKernel.realize_input(node)
    layout = view.get_layout()
    if isinstance(layout, ir.FixedLayout) and len(layout.size) == 2 and layout.stride[1] == 1:
        return ir.TensorBox(view)
    return contiguous(node)


def contiguous(node: Any) -> Any:
    """A tensor of a kernel's, row after row."""
    node.realize()
    return ir.ExternKernel.require_contiguous(node)

"""Inductor's lowerings of the quantizers: one launch of a Triton kernel, or the op itself elsewhere.

A `TritonTemplate` has one output. A user-defined kernel has as many as it writes, so the lowering allocates them and
hands Inductor the launch that `gpu` describes, as if a model had written it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor import ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering

from micromix_compile import gpu, ops, target
from micromix_compile.formats import BLOCK_SIZE
from micromix_compile.lowering import inductor, torch_compat
from micromix_compile.reference import QuantizedActivation

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.recipe import Split

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class _Operand:
    """What `gpu` reads of a tensor, of a node of Inductor's IR instead."""

    node: Any

    @property
    def shape(self) -> list[Any]:
        return [_plain(size) for size in self.node.get_size()]

    def stride(self, dim: int) -> Any:
        return _plain(self.node.get_stride()[dim])

    def element_size(self) -> int:
        return int(self.node.get_dtype().itemsize)


def _plain(size: Any) -> Any:
    """A static extent as an int; a symbolic one stays an expression."""
    return int(size) if getattr(size, "is_Integer", True) else size


def _launch(
    producer: str, x: Any, other: Any, eps: float, channel_perm: Any, split: Split, fp6: str, scale_rounding: str
) -> tuple[Any, ...]:
    """Outputs of one launch, in memory."""
    source, partner, order = (None if node is None else _Operand(_in_memory(node)) for node in (x, other, channel_perm))
    widths = (split[0] // 2, split[1], split[2], sum(split) // BLOCK_SIZE)
    rows, device = x.get_size()[0], x.get_device()
    empty = lowerings[aten.empty.memory_format]
    outputs = tuple(empty([rows, width], dtype=torch.uint8, device=device) for width in widths)
    filled: Any = QuantizedActivation(*map(_Operand, outputs))  # type: ignore[arg-type]
    describe: Any = gpu.reorder_quantize_call  # of tensors, or of what looks like them
    call = describe(producer, source, partner, eps, order, filled, fp6=fp6, scale_rounding=scale_rounding)
    args = {name: value.node if isinstance(value, _Operand) else value for name, value in call.args.items()}
    torch_compat.lower_kernel_launch(_tuned(call.kernel, call.num_warps), call.grid, args, call.constexprs)
    return outputs


def _in_memory(node: Any) -> Any:
    """A tensor of the kernel's: contiguous, or rows of a wider matrix, for the kernel takes the distance between rows.

    Only a fixed layout is taken as it is: Inductor may still change the strides of another.
    """
    view = ir.ExternKernel.realize_input(node)
    layout = view.get_layout()
    if isinstance(layout, ir.FixedLayout) and len(layout.size) == 2 and layout.stride[1] == 1:
        return ir.TensorBox(view)
    node.realize()
    return ir.ExternKernel.require_contiguous(node)


@cache
def _tuned(kernel: Any, num_warps: int) -> Any:
    """The kernel with its launch options, in the one form that Inductor takes them in."""
    import triton

    return triton.autotune([triton.Config({}, num_warps=num_warps)], key=[])(kernel)


def _register(op: Any, arguments: Callable[..., tuple[Any, ...]]) -> None:
    """Lower `op`, whose arguments `arguments` maps to those of `_launch`."""
    call_op = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(x: Any, *rest: Any) -> Any:
        family = target.target_of(x.get_device()).family if inductor.compiles_for_us() else None
        if family is None or 0 in x.get_size():
            return call_op(x, *rest)
        return _launch(*arguments(x, *rest))


_register(ops.reorder_quantize, lambda x, perm, k4, k6, k8, *names: ("none", x, None, 0.0, perm, (k4, k6, k8), *names))
_register(
    ops.rms_norm_reorder_quantize,
    lambda x, weight, eps, perm, k4, k6, k8, *names: ("rms_norm", x, weight, eps, perm, (k4, k6, k8), *names),
)
_register(
    ops.silu_mul_reorder_quantize,
    lambda gate, up, perm, k4, k6, k8, *names: ("silu_mul", gate, up, 0.0, perm, (k4, k6, k8), *names),
)

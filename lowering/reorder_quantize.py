"""Inductor's lowerings of the quantizers: one launch of a Triton kernel, or the op itself elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.lowering import inductor
from micromix_compile.lowering.launches import Operand, empty, in_memory, launch
from micromix_compile.lowering.torch_private.lowerings import fallback_handler, register_lowering
from micromix_compile.numerics.layout import RowLayout, activation_shapes, activation_split
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.quantizers import reorder_quantize_call

if TYPE_CHECKING:
    from collections.abc import Callable


def _launch(producer: str, x: Any, other: Any, eps: float, channel_perm: Any, layout: RowLayout) -> tuple[Any, ...]:
    """Outputs of one launch, in memory."""
    source, partner, order = (None if node is None else Operand(in_memory(node)) for node in (x, other, channel_perm))
    shapes = activation_shapes(x.get_size()[0], activation_split(layout.split, layout.activations))
    outputs = tuple(empty(shape, torch.uint8, x.get_device()) for shape in shapes)
    filled: Any = QuantizedActivation(*map(Operand, outputs))  # type: ignore[arg-type]
    describe: Any = reorder_quantize_call  # of tensors, or of what looks like them
    launch(describe(producer, source, partner, eps, order, filled, layout))
    return outputs


def _register(op: Any, arguments: Callable[..., tuple[Any, ...]]) -> None:
    """Lower `op`, whose arguments `arguments` maps to those of `_launch`."""
    call_op = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(x: Any, *rest: Any) -> Any:
        target = inductor.target_for_us(x)
        if target is None or target.exact.tiles is None or 0 in x.get_size():
            return call_op(x, *rest)
        return _launch(*arguments(x, *rest))


_register(ops.reorder_quantize, lambda x, perm, *layout: ("none", x, None, 0.0, perm, RowLayout(*layout)))
_register(
    ops.rms_norm_reorder_quantize,
    lambda x, weight, eps, perm, *layout: ("rms_norm", x, weight, eps, perm, RowLayout(*layout)),
)
_register(
    ops.silu_mul_reorder_quantize,
    lambda gate, up, perm, *layout: ("silu_mul", gate, up, 0.0, perm, RowLayout(*layout)),
)

"""Inductor's lowering of the sum of what experts made of each token: one launch, or the op itself elsewhere."""

from __future__ import annotations

from typing import Any

from micromix_compile import ops
from micromix_compile.lowering import inductor
from micromix_compile.lowering.launches import Operand, contiguous, empty, in_memory, launch
from micromix_compile.lowering.torch_private.lowerings import fallback_handler, register_lowering
from micromix_compile.targets.grouped import TritonGrouped, weighted_sum_call

_call_op = fallback_handler(ops.weighted_sum, add_to_fallback_set=False)


@register_lowering(ops.weighted_sum, type_promotion_kind=None)
def _lower(rows: Any, weights: Any, place: Any, out_dtype: Any) -> Any:
    target = inductor.target_for_us(rows)
    if target is None or not isinstance(target.grouped, TritonGrouped) or 0 in (*rows.get_size(), *place.get_size()):
        return _call_op(rows, weights, place, out_dtype)
    out = empty((place.get_size()[0], rows.get_size()[1]), out_dtype, rows.get_device())
    nodes = (in_memory(rows), contiguous(weights), contiguous(place), out)
    describe: Any = weighted_sum_call  # of tensors, or of what looks like them
    launch(describe(*map(Operand, nodes)))
    return out

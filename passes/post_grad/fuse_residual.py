"""Post-grad, where folded kernels run: the sum before an RMSNorm that is part of a quantizer becomes part of it, too.

The sum is the residual stream, so others read it: the quantizer writes it beside its own results. Products that are not
folded are templates of Inductor's, which add in their epilogue.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import statically_known_true

from micromix_compile import ops
from micromix_compile.passes.post_grad.producers import same_shape
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten

VIEWS: Final = (aten.view.default, aten.reshape.default)


def fuse_residual(graph: fx.Graph) -> int:
    """Rewrite add -> rms_norm_reorder_fold to add_rms_norm_reorder_fold. Returns how many were rewritten."""
    fused = 0
    for quantize in [node for node in graph.nodes if node.target is ops.rms_norm_reorder_fold]:
        rows = quantize.args[0]
        total = rows.args[0] if rows.target in VIEWS else rows
        place = _place(graph, quantize, total) if _is_sum(total, rows) else None
        if place is not None:
            _rewrite(graph, quantize, rows, total, place)
            fused += 1
    if fused:
        graph.eliminate_dead_code()
    return fused


def _is_sum(total: Node, rows: Node) -> bool:
    """Whether a kernel can add: a + b of one shape and dtype, nothing scaled, in plain memory, rows its own."""
    if total.target is not aten.add.Tensor or total.kwargs or not all(isinstance(arg, Node) for arg in total.args):
        return False
    value = total.meta["val"]
    parts = [arg.meta["val"] for arg in total.args if isinstance(arg, Node)]
    same = all(isinstance(part, torch.Tensor) and part.dtype == value.dtype for part in parts)
    if (
        not same
        or not same_shape(value, *parts)
        or not value.is_contiguous()
        or not target_of(value.device).wants("fuse_residual")
    ):
        return False
    return value.dim() > 0 and statically_known_true(value.shape[-1] == rows.meta["val"].shape[-1])


def _place(graph: fx.Graph, quantize: Node, total: Node) -> Node | None:
    """The first reader of the sum, before which both are to be made, or None if an argument is not there by then."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(total.users, key=order.__getitem__)
    others = [arg for arg in quantize.args[1:] if isinstance(arg, Node)]
    return first if all(arg is not total and order[arg] < order[first] for arg in others) else None


def _rewrite(graph: fx.Graph, quantize: Node, rows: Node, total: Node, place: Node) -> None:
    def call(function: Any, args: tuple[Any, ...], value: Any) -> Node:
        node = graph.call_function(function, args)
        node.meta["val"] = value
        return node

    value, matrix = total.meta["val"], rows.meta["val"]
    with graph.inserting_before(place):
        addends, sizes = total.args, []
        if rows is not total:
            sizes = [
                size if isinstance(size, int) else call(aten.sym_size.int, (total.args[0], dim), size)
                for dim, size in enumerate(value.shape)
            ]
            addends = tuple(call(aten.reshape.default, (arg, [-1, sizes[-1]]), matrix) for arg in total.args)
        results = (matrix, *quantize.meta["val"])
        fused = call(ops.add_rms_norm_reorder_fold, (*addends, *quantize.args[1:]), results)
        parts = [call(operator.getitem, (fused, i), result) for i, result in enumerate(results)]
        summed = parts[0] if rows is total else call(aten.reshape.default, (parts[0], sizes), value)
    for part in list(quantize.users):
        part.replace_all_uses_with(parts[1 + part.args[1]])  # type: ignore[operator, index]
        graph.erase_node(part)
    graph.erase_node(quantize)
    total.replace_all_uses_with(summed)

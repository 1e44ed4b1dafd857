"""Post-grad, where folded kernels run: the sum before an RMSNorm that is part of a quantizer becomes part of it, too.

The sum is the residual stream, so others read it: the quantizer writes it beside its own results. Products that are not
folded are templates of Inductor's, which add in their epilogue.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Node

from micromix_compile import ops
from micromix_compile.lowering.torch_private.operators import arguments_of
from micromix_compile.lowering.torch_private.tracing import statically_known_true
from micromix_compile.passes.graph import call
from micromix_compile.passes.post_grad.producers import same_shape

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten

VIEWS: Final = (aten.view.default, aten.reshape.default)


def fuse_residual(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite add -> rms_norm_reorder_fold to add_rms_norm_reorder_fold. Returns how many were rewritten."""
    fused = 0
    for quantize in [node for node in graph.nodes if node.target is ops.rms_norm_reorder_fold]:
        rows = arguments_of(quantize)["x"]
        total = arguments_of(rows)["self"] if rows.target in VIEWS else rows
        place = _place(graph, quantize, total) if _is_sum(total, rows) else None
        if place is not None and context.target_of(total.meta["val"].device).wants("fuse_residual"):
            _rewrite(graph, quantize, rows, total, place)
            fused += 1
    return fused


def _is_sum(total: Node, rows: Node) -> bool:
    """Whether a kernel can add: a + b of one shape and dtype, nothing scaled, in plain memory, rows its own."""
    addends = _addends(total)
    if not addends:
        return False
    value = total.meta["val"]
    parts = [addend.meta["val"] for addend in addends]
    same = all(isinstance(part, torch.Tensor) and part.dtype == value.dtype for part in parts)
    if not same or not same_shape(value, *parts) or not value.is_contiguous():
        return False
    return value.dim() > 0 and statically_known_true(value.shape[-1] == rows.meta["val"].shape[-1])


def _addends(total: Node) -> list[Node]:
    """The two nodes that `total` adds as they are; none if it is another operation or adds a number."""
    if total.target is not aten.add.Tensor:
        return []
    given = arguments_of(total)
    addends = [given["self"], given["other"]]
    return addends if given["alpha"] == 1 and all(isinstance(one, Node) for one in addends) else []


def _place(graph: fx.Graph, quantize: Node, total: Node) -> Node | None:
    """The first reader of the sum, before which both are to be made, or None if an argument is not there by then."""
    order = {node: i for i, node in enumerate(graph.nodes)}
    first = min(total.users, key=order.__getitem__)
    others = [value for name, value in arguments_of(quantize).items() if name != "x" and isinstance(value, Node)]
    return first if all(other is not total and order[other] < order[first] for other in others) else None


def _rewrite(graph: fx.Graph, quantize: Node, rows: Node, total: Node, place: Node) -> None:
    def add(function: Any, args: tuple[Any, ...], value: Any) -> Node:
        return _with_value(graph.call_function(function, args), value)

    value, matrix = total.meta["val"], rows.meta["val"]
    first, second = _addends(total)
    with graph.inserting_before(place):
        sizes = []
        if rows is not total:
            sizes = [
                size if isinstance(size, int) else add(aten.sym_size.int, (first, dim), size)
                for dim, size in enumerate(value.shape)
            ]
            first, second = (add(aten.reshape.default, (one, [-1, sizes[-1]]), matrix) for one in (first, second))
        results = (matrix, *quantize.meta["val"])
        given = {**arguments_of(quantize), "x": first, "residual": second}
        fused = _with_value(call(graph, ops.add_rms_norm_reorder_fold, **given), results)
        parts = [add(operator.getitem, (fused, i), result) for i, result in enumerate(results)]
        summed = parts[0] if rows is total else add(aten.reshape.default, (parts[0], sizes), value)
    for part in list(quantize.users):
        part.replace_all_uses_with(parts[1 + part.args[1]])  # type: ignore[operator, index]
        graph.erase_node(part)
    graph.erase_node(quantize)
    total.replace_all_uses_with(summed)


def _with_value(node: Node, value: Any) -> Node:
    node.meta["val"] = value
    return node

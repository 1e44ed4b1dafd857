"""Post-grad, on a GPU: the sum of what experts made of each token, by the router's weights, becomes one operation.

Models multiply the experts' rows by their weights, take them in the order of the tokens, and sum those of each.
Inductor makes one kernel of it, which looks up the place of a row anew for each number in it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.fx import Node

from micromix_compile import ops
from micromix_compile.lowering.torch_private.operators import arguments_of
from micromix_compile.lowering.torch_private.tracing import statically_known_true
from micromix_compile.passes.graph import call

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten
prims = torch.ops.prims

VIEWS: Final = (aten.view.default, aten.reshape.default)
PRODUCTS: Final = (ops.grouped_mx_mm, ops.grouped_folded_mm)


class _Sum(NamedTuple):
    """sum_j (rows * weights)[place[t, j]]: rows (R, N), weights (R,), place (T * top_k,), top_k an int."""

    rows: Node
    weights: Node
    place: Node
    top_k: int


def sum_experts(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite multiply -> index -> sum of a grouped product's rows to weighted_sum. Returns how many were rewritten."""
    rewritten = 0
    for node in [node for node in graph.nodes if node.target is aten.sum.dim_IntList]:
        found = _match(node)
        if found is not None and context.target_of(found.rows.meta["val"].device).wants("sum_experts"):
            _rewrite(graph, node, found)
            rewritten += 1
    return rewritten


def _match(node: Node) -> _Sum | None:
    """What a sum is of, if it is one of weighted rows of a grouped product."""
    viewed = _only_reader(node, *VIEWS)
    indexed = viewed and _only_reader(viewed, aten.index.Tensor)
    product = indexed and _only_reader(indexed, aten.mul.Tensor)
    if not viewed or not indexed or not product or not _sums_second(node) or node.meta["val"].dim() != 2:
        return None
    factors, places = arguments_of(product), arguments_of(indexed)["indices"]
    rows, weights = _by_kind(factors["self"], factors["other"])
    if rows is None or weights is None or len(places) != 1 or not isinstance(places[0], Node):
        return None
    value, place, shape = rows.meta["val"], places[0].meta["val"], viewed.meta["val"].shape
    is_list = place.dim() == 1 and place.dtype in {torch.int32, torch.int64}
    whole = len(shape) == 3 and isinstance(shape[1], int) and statically_known_true(shape[2] == value.shape[1])
    return _Sum(rows, weights, places[0], shape[1]) if is_list and whole else None


def _only_reader(node: Node, *operators: Any) -> Node | None:
    """What `node` reads first, if that calls one of these operators and nobody else reads it."""
    read = node.args[0]
    return read if isinstance(read, Node) and read.target in operators and len(read.users) == 1 else None


def _sums_second(node: Node) -> bool:
    """Whether it sums over the second of three dimensions, and makes a float of floats."""
    given = arguments_of(node)
    dims = [dim % 3 for dim in given["dim"] or ()]
    return dims == [1] and node.meta["val"].dtype.is_floating_point


def _by_kind(*factors: Any) -> tuple[Node | None, Node | None]:
    """Rows of a grouped product, and one weight for each; None for what is not there."""
    nodes = [factor for factor in factors if isinstance(factor, Node)]
    rows = next((node for node in nodes if node.target in PRODUCTS), None)
    weights = next((node for node in nodes if node is not rows and rows is not None and _is_column(node, rows)), None)
    return rows, weights


def _is_column(node: Node, rows: Node) -> bool:
    """Whether it is (R, 1) float, one number for each of the rows."""
    value = node.meta["val"]
    if value.dim() != 2 or not value.dtype.is_floating_point:
        return False
    return statically_known_true(value.shape[0] == rows.meta["val"].shape[0]) and statically_known_true(
        value.shape[1] == 1
    )


def _rewrite(graph: fx.Graph, node: Node, found: _Sum) -> None:
    """A cast behind the sum becomes part of it, where it takes what the sum has not rounded."""
    last = node
    if node.meta["val"].dtype is torch.float32 and len(node.users) == 1:
        (reader,) = node.users
        is_cast = reader.target is prims.convert_element_type.default and reader.meta["val"].dtype.is_floating_point
        last = reader if is_cast else node
    with graph.inserting_before(node):
        weights = _reshaped(graph, found.weights, [-1])
        place = _reshaped(graph, found.place, [-1, found.top_k])
        fused = call(
            graph, ops.weighted_sum, rows=found.rows, weights=weights, place=place, out_dtype=last.meta["val"].dtype
        )
    fused.meta["val"] = last.meta["val"]
    last.replace_all_uses_with(fused)


def _reshaped(graph: fx.Graph, node: Node, shape: list[int]) -> Node:
    reshaped = graph.call_function(aten.reshape.default, (node, shape))
    reshaped.meta["val"] = node.meta["val"].reshape(shape)
    return reshaped

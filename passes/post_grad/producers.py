"""What the post-grad fusions of a producer into a quantize share: how the quantize looks, and how it is replaced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx import Node

from micromix_compile import ops
from micromix_compile.lowering.torch_private.operators import argument_names, arguments_of
from micromix_compile.lowering.torch_private.patterns import MULTIPLE, CallFunction, KeywordArg, Match, PatternExpr
from micromix_compile.lowering.torch_private.tracing import statically_known_true
from micromix_compile.passes.graph import call

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten

ROWS: Final = "x"
"""What quantizers call the matrix that they quantize."""
QUANTIZERS: Final = (ops.reorder_quantize, ops.reorder_fold)


def devices_with(name: str, graph: fx.Graph, context: PassContext) -> frozenset[torch.device]:
    """The devices on which rows are quantized in `graph` and whose targets have the pass `name`."""
    quantizers = [node for node in graph.nodes if node.target in QUANTIZERS]
    devices = {arguments_of(node)[ROWS].meta["val"].device for node in quantizers}
    return frozenset(device for device in devices if context.target_of(device).wants(name))


def quantized(rows: PatternExpr) -> list[PatternExpr]:
    """A quantize of `rows`: through a view, or of rows that are a matrix already."""
    viewed = CallFunction([aten.view.default, aten.reshape.default], rows, KeywordArg("row_shape"))
    return [
        CallFunction(
            op, *(matrix if name == ROWS else KeywordArg(name) for name in argument_names(op)), _users=MULTIPLE
        )
        for op in QUANTIZERS
        for matrix in (viewed, rows)
    ]


def same_shape(*tensors: torch.Tensor) -> bool:
    """Whether shapes are equal for all that is known; `==` would make symbolic sizes equal from then on."""
    first, *others = (tensor.shape for tensor in tensors)
    return all(
        len(shape) == len(first) and all(statically_known_true(a == b) for a, b in zip(shape, first, strict=True))
        for shape in others
    )


def quantizes_rows_of(match: Match, x: torch.Tensor) -> bool:
    """Whether the rows of `x` are the rows that are quantized, and nothing was matched that patterns don't look at.

    They don't look at keywords: alpha=2 of an addition makes another function of it.
    """
    return not any(node.kwargs for node in match.nodes) and _rows(match).meta["val"].shape[-1] == x.shape[-1]


def replace_quantize(match: Match, fused_ops: Mapping[Any, Any], rows: Mapping[str, Node], **others: Any) -> None:
    """Put fused_ops[quantize](rows as matrices, others, its layout) in the place of producer and quantize."""
    quantize, graph, found = match.output_node(), match.graph, match.kwargs
    shape = _rows(match).meta["val"].shape
    with graph.inserting_before(quantize):
        matrices = {}
        for name, node in rows.items():
            matrix = node
            if "row_shape" in found:
                matrix = graph.call_function(aten.reshape.default, (node, found["row_shape"]))
                matrix.meta["val"] = node.meta["val"].reshape(shape)
            matrices[name] = matrix
        layout = {name: value for name, value in arguments_of(quantize).items() if name != ROWS}
        fused = call(graph, fused_ops[quantize.target], **matrices, **others, **layout)
        fused.meta["val"] = quantize.meta["val"]
    quantize.replace_all_uses_with(fused)
    graph.erase_node(quantize)


def _rows(match: Match) -> Node:
    rows = arguments_of(match.output_node())[ROWS]
    assert isinstance(rows, Node), "a quantize reads a tensor"
    return rows

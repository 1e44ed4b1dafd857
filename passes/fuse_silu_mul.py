"""Post-grad, on a GPU: SiLU(gate) * up before a quantize becomes part of it, so that the product stays on chip."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)
from torch.fx import Node

from micromix_compile import ops, target

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

LAYOUT = ("channel_perm", "k4", "k6", "k8", "fp6", "scale_rounding")


def fuse_silu_mul(graph: fx.Graph) -> int:
    """Rewrite SiLU * up -> reorder_quantize to micromix::silu_mul_reorder_quantize. Returns how many were rewritten."""
    matched = _patterns().apply(graph)
    if matched:
        graph.eliminate_dead_code()
    return int(matched)


@cache
def _patterns() -> PatternMatcherPass:
    patterns = PatternMatcherPass(pass_name="micromix_fuse_silu_mul")
    gate, up = KeywordArg("gate"), KeywordArg("up")
    widened = CallFunction(prims.convert_element_type.default, gate, torch.float32, _users=2)
    rounded = CallFunction(prims.convert_element_type.default, _silu(widened), KeywordArg("rounded_to"))
    for silu, check in ((_silu(gate), _is_float32_product), (rounded, _is_rounded_product)):
        for factors in ((silu, up), (up, silu)):
            for pattern in _quantized(CallFunction(aten.mul.Tensor, *factors)):
                register_graph_pattern(pattern, pass_dict=patterns, extra_check=check)(_replace)
    return patterns


def _silu(x: PatternExpr) -> PatternExpr:
    """X / (1 + exp(-x)), as Inductor decomposes it."""
    exp = CallFunction(aten.exp.default, CallFunction(aten.neg.default, x))
    return CallFunction(aten.div.Tensor, x, CallFunction(aten.add.Tensor, exp, 1))


def _quantized(product: PatternExpr) -> list[PatternExpr]:
    """A quantize of the product's rows: through a view, or of a product that is a matrix already."""
    viewed = CallFunction([aten.view.default, aten.reshape.default], product, KeywordArg("row_shape"))
    layout = [KeywordArg(name) for name in LAYOUT]
    return [CallFunction(ops.reorder_quantize, rows, *layout, _users=MULTIPLE) for rows in (viewed, product)]


def _is_float32_product(match: Match) -> bool:
    return _is_row_product(match) and match.kwargs["gate"].meta["val"].dtype is torch.float32


def _is_rounded_product(match: Match) -> bool:
    return _is_row_product(match) and match.kwargs["rounded_to"] is match.kwargs["gate"].meta["val"].dtype


def _is_row_product(match: Match) -> bool:
    """Whether the rows that are multiplied are the rows that are quantized, on a device with the fused kernel.

    No node may have keywords, which patterns don't look at: alpha=2 of an addition makes another function of it.
    """
    if any(node.kwargs for node in match.nodes):
        return False
    gate, up = (match.kwargs[name].meta["val"] for name in ("gate", "up"))
    rows = match.output_node().args[0]
    assert isinstance(rows, Node), "a quantize reads a tensor"
    same_rows = gate.shape == up.shape and rows.meta["val"].shape[-1] == gate.shape[-1]
    return bool(target.triton_family(gate) and gate.dtype == up.dtype and same_rows)


def _replace(match: Match, **found: Any) -> None:
    quantize = match.output_node()
    product_rows = quantize.args[0]
    assert isinstance(product_rows, Node), "a quantize reads a tensor"
    graph = match.graph
    with graph.inserting_before(quantize):
        operands = []
        for name in ("gate", "up"):
            rows = found[name]
            if "row_shape" in found:
                rows = graph.call_function(aten.reshape.default, (rows, found["row_shape"]))
                rows.meta["val"] = found[name].meta["val"].reshape(product_rows.meta["val"].shape)
            operands.append(rows)
        arguments = (*operands, *(found[name] for name in LAYOUT))
        fused = graph.call_function(ops.silu_mul_reorder_quantize, arguments)
        fused.meta["val"] = quantize.meta["val"]
    quantize.replace_all_uses_with(fused)
    graph.erase_node(quantize)

"""Post-grad: RMSNorm before a quantize becomes part of it, so that the normalized rows never reach memory."""

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

from micromix_compile import ops

if TYPE_CHECKING:
    from torch import fx

aten = torch.ops.aten
prims = torch.ops.prims

LAYOUT = ("channel_perm", "k4", "k6", "k8", "fp6", "scale_rounding")


def fuse_rms_norm(graph: fx.Graph) -> int:
    """Rewrite RMSNorm -> reorder_quantize to micromix::rms_norm_reorder_quantize. Returns how many were rewritten."""
    matched = _patterns().apply(graph)
    if matched:
        graph.eliminate_dead_code()
    return int(matched)


@cache
def _patterns() -> PatternMatcherPass:
    patterns = PatternMatcherPass(pass_name="micromix_fuse_rms_norm")
    x = KeywordArg("x")
    widened = CallFunction(prims.convert_element_type.default, x, torch.float32, _users=MULTIPLE)
    rounded = CallFunction(prims.convert_element_type.default, _normalized(widened), KeywordArg("rounded_to"))
    for normalized, check in ((_normalized(x), _is_float32_norm), (rounded, _is_rounded_norm)):
        for pattern in _quantized(normalized):
            register_graph_pattern(pattern, pass_dict=patterns, extra_check=check)(_replace)
    return patterns


def _normalized(x: PatternExpr) -> PatternExpr:
    """X * rsqrt(mean(x ** 2) + eps) over the last dimension."""
    square = CallFunction(aten.pow.Tensor_Scalar, x, 2)
    mean = CallFunction(aten.mean.dim, square, [-1], True)
    rsqrt = CallFunction(aten.rsqrt.default, CallFunction(aten.add.Tensor, mean, KeywordArg("eps")))
    return CallFunction(aten.mul.Tensor, x, rsqrt)


def _quantized(normalized: PatternExpr) -> list[PatternExpr]:
    """A quantize of the weighted rows: through a view, or of rows that are a matrix already."""
    weighted = CallFunction(aten.mul.Tensor, KeywordArg("weight"), normalized)
    viewed = CallFunction([aten.view.default, aten.reshape.default], weighted, KeywordArg("row_shape"))
    layout = [KeywordArg(name) for name in LAYOUT]
    return [CallFunction(ops.reorder_quantize, rows, *layout, _users=MULTIPLE) for rows in (viewed, weighted)]


def _is_float32_norm(match: Match) -> bool:
    return _is_row_norm(match) and match.kwargs["x"].meta["val"].dtype is torch.float32


def _is_rounded_norm(match: Match) -> bool:
    return _is_row_norm(match) and match.kwargs["rounded_to"] is match.kwargs["x"].meta["val"].dtype


def _is_row_norm(match: Match) -> bool:
    """Whether the rows that are normalized are the rows that are quantized, as the op computes them.

    No node may have keywords, which patterns don't look at: alpha=2 of an addition makes another function of it.
    """
    if any(node.kwargs for node in match.nodes):
        return False
    x, weight = (match.kwargs[name].meta["val"] for name in ("x", "weight"))
    rows = match.output_node().args[0]
    assert isinstance(rows, Node), "a quantize reads a tensor"
    same_rows = rows.meta["val"].shape[-1] == x.shape[-1]
    same_type = weight.dim() == 1 and weight.shape[0] == x.shape[-1] and weight.dtype == x.dtype
    return bool(same_rows and same_type and isinstance(match.kwargs["eps"], float | int))


def _replace(match: Match, **found: Any) -> None:
    quantize = match.output_node()
    normalized_rows = quantize.args[0]
    assert isinstance(normalized_rows, Node), "a quantize reads a tensor"
    graph, x = match.graph, found["x"]
    with graph.inserting_before(quantize):
        rows = x
        if "row_shape" in found:
            rows = graph.call_function(aten.reshape.default, (x, found["row_shape"]))
            rows.meta["val"] = x.meta["val"].reshape(normalized_rows.meta["val"].shape)
        arguments = (rows, found["weight"], found["eps"], *(found[name] for name in LAYOUT))
        fused = graph.call_function(ops.rms_norm_reorder_quantize, arguments)
        fused.meta["val"] = quantize.meta["val"]
    quantize.replace_all_uses_with(fused)
    graph.erase_node(quantize)

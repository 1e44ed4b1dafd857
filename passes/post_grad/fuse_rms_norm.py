"""Post-grad: RMSNorm before a quantize becomes part of it, so that the normalized rows never reach memory."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

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

from micromix_compile import ops
from micromix_compile.passes.post_grad.producers import quantized, quantizes_rows_of, replace_quantize
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from torch import fx
    from torch.fx import Node

aten = torch.ops.aten
prims = torch.ops.prims

FUSED = {
    ops.reorder_quantize: ops.rms_norm_reorder_quantize,
    ops.reorder_fold: ops.rms_norm_reorder_fold,
}


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
        for pattern in quantized(CallFunction(aten.mul.Tensor, KeywordArg("weight"), normalized)):
            register_graph_pattern(pattern, pass_dict=patterns, extra_check=check)(_replace)
    return patterns


def _normalized(x: PatternExpr) -> PatternExpr:
    """X * rsqrt(mean(x ** 2) + eps) over the last dimension."""
    square = CallFunction(aten.pow.Tensor_Scalar, x, 2)
    mean = CallFunction(aten.mean.dim, square, [-1], True)
    rsqrt = CallFunction(aten.rsqrt.default, CallFunction(aten.add.Tensor, mean, KeywordArg("eps")))
    return CallFunction(aten.mul.Tensor, x, rsqrt)


def _is_float32_norm(match: Match) -> bool:
    return _is_row_norm(match) and match.kwargs["x"].meta["val"].dtype is torch.float32


def _is_rounded_norm(match: Match) -> bool:
    return _is_row_norm(match) and match.kwargs["rounded_to"] is match.kwargs["x"].meta["val"].dtype


def _is_row_norm(match: Match) -> bool:
    """Whether the rows that are normalized are the rows that are quantized, as the op computes them."""
    x, weight = (match.kwargs[name].meta["val"] for name in ("x", "weight"))
    same_type = weight.dim() == 1 and weight.shape[0] == x.shape[-1] and weight.dtype == x.dtype
    wanted = target_of(x.device).wants("fuse_rms_norm")
    return bool(wanted and same_type and isinstance(match.kwargs["eps"], float | int) and quantizes_rows_of(match, x))


def _replace(match: Match, x: Node, weight: Node, eps: float, **_: object) -> None:
    replace_quantize(match, FUSED, (x,), weight, eps)

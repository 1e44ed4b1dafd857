"""Post-grad: RMSNorm before a quantize becomes part of it, so that the normalized rows never reach memory."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from micromix_compile import ops
from micromix_compile.lowering.torch_private.patterns import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)
from micromix_compile.passes.post_grad.producers import devices_with, quantized, quantizes_rows_of, replace_quantize

if TYPE_CHECKING:
    from torch import fx
    from torch.fx import Node

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten
prims = torch.ops.prims

FUSED = {
    ops.reorder_quantize: ops.rms_norm_reorder_quantize,
    ops.reorder_fold: ops.rms_norm_reorder_fold,
}


def fuse_rms_norm(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite RMSNorm -> reorder_quantize to micromix::rms_norm_reorder_quantize. Returns how many were rewritten."""
    return int(_patterns(devices_with("fuse_rms_norm", graph, context)).apply(graph))


@cache
def _patterns(devices: frozenset[torch.device]) -> PatternMatcherPass:
    """What is matched where rows are on one of `devices`."""
    patterns = PatternMatcherPass(pass_name="micromix_fuse_rms_norm")
    x = KeywordArg("x")
    widened = CallFunction(prims.convert_element_type.default, x, torch.float32, _users=MULTIPLE)
    rounded = CallFunction(prims.convert_element_type.default, _normalized(widened), KeywordArg("rounded_to"))
    for normalized, check in ((_normalized(x), _is_float32_norm), (rounded, _is_rounded_norm)):
        for pattern in quantized(CallFunction(aten.mul.Tensor, KeywordArg("weight"), normalized)):
            register_graph_pattern(pattern, pass_dict=patterns, extra_check=partial(check, devices))(_replace)
    return patterns


def _normalized(x: PatternExpr) -> PatternExpr:
    """X * rsqrt(mean(x ** 2) + eps) over the last dimension."""
    square = CallFunction(aten.pow.Tensor_Scalar, x, 2)
    mean = CallFunction(aten.mean.dim, square, [-1], True)
    rsqrt = CallFunction(aten.rsqrt.default, CallFunction(aten.add.Tensor, mean, KeywordArg("eps")))
    return CallFunction(aten.mul.Tensor, x, rsqrt)


def _is_float32_norm(devices: frozenset[torch.device], match: Match) -> bool:
    return _is_row_norm(devices, match) and match.kwargs["x"].meta["val"].dtype is torch.float32


def _is_rounded_norm(devices: frozenset[torch.device], match: Match) -> bool:
    return _is_row_norm(devices, match) and match.kwargs["rounded_to"] is match.kwargs["x"].meta["val"].dtype


def _is_row_norm(devices: frozenset[torch.device], match: Match) -> bool:
    """Whether the normalized rows are those that are quantized, on one of `devices`, as the op computes them."""
    x, weight = (match.kwargs[name].meta["val"] for name in ("x", "weight"))
    same_type = weight.dim() == 1 and weight.shape[0] == x.shape[-1] and weight.dtype == x.dtype
    return bool(
        x.device in devices
        and same_type
        and isinstance(match.kwargs["eps"], float | int)
        and quantizes_rows_of(match, x)
    )


def _replace(match: Match, x: Node, weight: Node, eps: float, **_: object) -> None:
    replace_quantize(match, FUSED, {"x": x}, weight=weight, eps=eps)

"""Post-grad, on a GPU: SiLU(gate) * up before a quantize becomes part of it, so that the product stays on chip."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING

import torch

from micromix_compile import ops
from micromix_compile.lowering.torch_private.patterns import (
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)
from micromix_compile.passes.post_grad.producers import (
    devices_with,
    quantized,
    quantizes_rows_of,
    replace_quantize,
    same_shape,
)

if TYPE_CHECKING:
    from torch import fx
    from torch.fx import Node

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten
prims = torch.ops.prims

FUSED = {
    ops.reorder_quantize: ops.silu_mul_reorder_quantize,
    ops.reorder_fold: ops.silu_mul_reorder_fold,
}


def fuse_silu_mul(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite SiLU * up -> reorder_quantize to micromix::silu_mul_reorder_quantize. Returns how many were rewritten."""
    return int(_patterns(devices_with("fuse_silu_mul", graph, context)).apply(graph))


@cache
def _patterns(devices: frozenset[torch.device]) -> PatternMatcherPass:
    """What is matched where rows are on one of `devices`."""
    patterns = PatternMatcherPass(pass_name="micromix_fuse_silu_mul")
    gate, up = KeywordArg("gate"), KeywordArg("up")
    widened = CallFunction(prims.convert_element_type.default, gate, torch.float32, _users=2)
    rounded = CallFunction(prims.convert_element_type.default, _silu(widened), KeywordArg("rounded_to"))
    for silu, check in ((_silu(gate), _is_float32_product), (rounded, _is_rounded_product)):
        for factors in ((silu, up), (up, silu)):
            for pattern in quantized(CallFunction(aten.mul.Tensor, *factors)):
                register_graph_pattern(pattern, pass_dict=patterns, extra_check=partial(check, devices))(_replace)
    return patterns


def _silu(x: PatternExpr) -> PatternExpr:
    """X / (1 + exp(-x)), as Inductor decomposes it."""
    exp = CallFunction(aten.exp.default, CallFunction(aten.neg.default, x))
    return CallFunction(aten.div.Tensor, x, CallFunction(aten.add.Tensor, exp, 1))


def _is_float32_product(devices: frozenset[torch.device], match: Match) -> bool:
    return _is_row_product(devices, match) and match.kwargs["gate"].meta["val"].dtype is torch.float32


def _is_rounded_product(devices: frozenset[torch.device], match: Match) -> bool:
    return _is_row_product(devices, match) and match.kwargs["rounded_to"] is match.kwargs["gate"].meta["val"].dtype


def _is_row_product(devices: frozenset[torch.device], match: Match) -> bool:
    """Whether the rows that are multiplied are the rows that are quantized, on one of `devices`."""
    gate, up = (match.kwargs[name].meta["val"] for name in ("gate", "up"))
    same = same_shape(gate, up) and gate.dtype == up.dtype
    return bool(gate.device in devices and same and quantizes_rows_of(match, gate))


def _replace(match: Match, gate: Node, up: Node, **_: object) -> None:
    replace_quantize(match, FUSED, {"gate": gate, "up": up})

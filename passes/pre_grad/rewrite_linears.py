"""Pass 3 (converting): linear -> micromix::reorder_quantize + micromix::mixed_mx_mm, or grouped_mx_mm of experts.

Packed weights become inputs of the graph that are looked up for every call: one graph may serve many layers, so a
constant would be silently wrong.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final

import torch

from micromix_compile import ops
from micromix_compile.passes.graph import call, copy_meta
from micromix_compile.passes.pre_grad.shapes import Shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import fx

    from micromix_compile.passes.context import LinearPlan, LinearSite, PassContext
    from micromix_compile.recipe.parts import Part

aten = torch.ops.aten

ACTIVATION: Final = ("x4", "x6", "x8", "x_scale")
WEIGHT: Final = ("w4", "w6", "w8", "w_scale")
"""What a product reads of either side, in the order of a quantizer's results."""


def rewrite_linears(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite every site that has a plan; fills `context.inputs`. Returns how many were rewritten."""
    perms: dict[int, fx.Node] = {}
    weights: dict[tuple[fx.Node, Part | None], list[fx.Node]] = {}
    shapes = Shapes(graph, sort=False)
    replaced: dict[fx.Node, fx.Node] = {}  # a linear may read another one's output, as its input or bias
    for site in context.sites:
        plan = context.owner.plan(site.parameter, transposed=site.transposed, part=site.part)
        if plan is None:
            continue
        if plan.group not in perms:
            perms[plan.group] = _lift(graph, context, site, plan, 0)
        weight = site.weight, site.part
        if weight not in weights:
            weights[weight] = [_lift(graph, context, site, plan, i) for i in range(1, len(plan.tensors))]
        replaced[site.node] = _replace(shapes, site, replaced, plan, perms[plan.group], weights[weight])
    return len(replaced)


def _lift(graph: fx.Graph, context: PassContext, site: LinearSite, plan: LinearPlan, index: int) -> fx.Node:
    node = context.owner.add_input(graph, f"micromix_{len(context.inputs)}", plan.tensors[index])
    context.inputs.append((site.weight, site.part, index))
    return node


def _replace(
    shapes: Shapes,
    site: LinearSite,
    replaced: Mapping[fx.Node, fx.Node],
    plan: LinearPlan,
    perm: fx.Node,
    weights: list[fx.Node],
) -> fx.Node:
    node, graph = site.node, site.node.graph
    x, bias = replaced.get(site.x, site.x), site.bias
    example, given = node.meta["example_value"], site.x.meta.get("example_value")
    with graph.inserting_before(node):

        def add(target: object, *args: object, **named: object) -> fx.Node:
            return copy_meta(node, graph.call_function(target, args, named))  # type: ignore[arg-type]

        if isinstance(given, torch.Tensor) and given.dtype != example.dtype:  # autocast: as packed modules, cast first
            x = add(aten.to.dtype, x, example.dtype)
        entered = shapes.enter(site, x)
        x, routing = entered.x, entered.routing
        rows = add(aten.reshape.default, x, [-1, site.in_features])
        quantized = copy_meta(node, _quantize(graph, rows, perm, plan))
        parts = [add(operator.getitem, quantized, i) for i in range(4)]
        operands: dict[str, Any] = dict(zip((*ACTIVATION, *WEIGHT), (*parts, *weights), strict=True))
        operands |= {
            "bias": None if bias is None else replaced.get(bias, bias),
            "fp6": plan.layout.fp6,
            "out_dtype": example.dtype,
        }
        if routing is None:
            product = copy_meta(node, call(graph, ops.mixed_mx_mm, **operands))
            leading = [add(aten.sym_size.int, x, d) for d in range(example.dim() - 1)]
            out = add(aten.reshape.default, product, [*leading, site.out_features])
        else:
            own = routing.rows or add(aten.arange.default, add(aten.sym_size.int, rows, 0), device=example.device)
            rows, offs = (add(aten.to.dtype, index, torch.int32) for index in (own, routing.offs))
            out = copy_meta(node, call(graph, ops.grouped_mx_mm, **operands, rows=rows, offs=offs))
        out = shapes.leave(site, entered, out)
    node.replace_all_uses_with(out)
    graph.erase_node(node)
    return out


def _quantize(graph: fx.Graph, rows: fx.Node, perm: fx.Node, plan: LinearPlan) -> fx.Node:
    return call(graph, ops.reorder_quantize, x=rows, channel_perm=perm, **plan.layout._asdict())

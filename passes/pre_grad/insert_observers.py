"""Pass 2 (calibrating): put an observer before every group of linears that read the same activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Node

from micromix_compile.passes.graph import copy_meta
from micromix_compile.passes.mutations import mutation_epochs
from micromix_compile.passes.pre_grad.shapes import Shapes

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.context import LinearSite, PassContext
    from micromix_compile.passes.pre_grad.shapes import Entered

FLATTENERS = ("view", "reshape", "flatten", torch.reshape, torch.flatten)


def insert_observers(graph: fx.Graph, context: PassContext) -> int:
    """Insert owner.observe(x, weights, ...) once per distinct value of x, and owner.observe_output after each linear.

    Each product reads what was observed, or a view of that, so that gradients come there.
    What `observe` returned goes to `observe_output`: another call may have come between a linear and its input.
    The observer learns at run time, from the weights it is given, which linears it sees: one graph may serve many
    layers.
    """
    groups: dict[tuple[Any, ...], list[tuple[LinearSite, Entered]]] = {}
    watches: list[tuple[LinearSite, Entered, fx.Node]] = []
    epochs, shapes = mutation_epochs(graph), Shapes(graph, sort=True)
    for site in context.sites:
        entered = shapes.enter(site, site.x)
        key = site.x, site.turned, entered.routing and entered.routing.offs, epochs[site.node]
        groups.setdefault(key, []).append((site, entered))
    for members in groups.values():
        first, x = members[0][0], members[0][1].x
        with graph.inserting_before(first.node):
            distinct = {(one.weight, one.part): (one, entered) for one, entered in reversed(members)}.values()
            rows = [(one.weight, one.transposed, _tensors(routed), one.part) for one, routed in reversed(distinct)]
            weights, transposed, routings, parts = map(list, zip(*rows, strict=True))
            source = _flattened_from(x)
            if first.batch is not None:
                x = graph.call_function(torch.ops.aten.reshape.default, (x, [-1, first.in_features]))
            seen = (x, weights, transposed, source, routings, parts)
            watched = copy_meta(first.node, graph.call_function(context.owner.observe, seen))
        for site, entered in members:
            shapes.feed(site, entered, x)
            watches.append((site, entered, watched))
    for site, entered, watched in watches:  # changes what the inputs of other sites are called
        _watch_output(shapes, site, entered, watched, context)
    return len(groups)


def _watch_output(shapes: Shapes, site: LinearSite, entered: Entered, watched: fx.Node, context: PassContext) -> None:
    """Have the observer see what comes out of `site`. Whoever reads it gets what was seen, and so its gradient."""
    graph, readers = site.node.graph, list(site.node.users)
    with graph.inserting_before(site.node.next):
        out = shapes.flatten(site, entered)
        seen = (out, site.weight, watched, site.part)
        copy_meta(site.node, graph.call_function(context.owner.observe_output, seen))
        left = shapes.leave(site, entered, out)
    for reader in readers:
        if left is not site.node:
            reader.replace_input_with(site.node, left)


def _tensors(entered: Entered) -> list[fx.Node | None] | None:
    return None if entered.routing is None else list(entered.routing)


def _flattened_from(x: fx.Node) -> fx.Node | None:
    """The activation (..., C) of three or more dimensions whose rows x (M, C) are, in order, if x was flattened."""
    node = x
    while _rank(node) == 2 and node.target in FLATTENERS and isinstance(node.args[0], Node):
        node = node.args[0]
        if node.meta["example_value"].shape[-1] != x.meta["example_value"].shape[-1]:
            return None
    return node if _rank(node) > 2 else None


def _rank(node: fx.Node) -> int:
    example = node.meta.get("example_value")
    return example.dim() if isinstance(example, Tensor) else 0

"""Pass 2 (calibrating): put an observer before every group of linears that read the same activation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from micromix_compile.passes.graph import copy_meta
from micromix_compile.passes.mutations import mutation_epochs

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.context import LinearSite, PassContext

FLATTENERS = ("view", "reshape", "flatten", torch.reshape, torch.flatten)


def insert_observers(graph: fx.Graph, context: PassContext) -> int:
    """Insert owner.observe(x, weights, ...) once per distinct value of x, and owner.observe_output after each linear.

    The observer learns at run time, from the weights it is given, which linears it sees: one graph may serve many
    layers.
    """
    groups: dict[tuple[fx.Node, int], list[LinearSite]] = {}
    epochs = mutation_epochs(graph)
    for site in context.sites:
        groups.setdefault((site.x, epochs[site.node]), []).append(site)
    for (x, _), sites in groups.items():
        first = sites[0].node
        with graph.inserting_before(first):
            distinct = list({site.weight: site for site in reversed(sites)}.values())[::-1]
            columns = zip(*((site.weight, site.transposed, _routing(site)) for site in distinct), strict=True)
            weights, transposed, routings = map(list, columns)
            seen = (x, weights, transposed, _flattened_from(x), routings)
            copy_meta(first, graph.call_function(context.owner.observe, seen))
        for site in sites:
            with graph.inserting_after(site.node):
                watched = graph.call_function(context.owner.observe_output, (site.node, site.weight, _routing(site)))
                copy_meta(site.node, watched)
    return len(groups)


def _routing(site: LinearSite) -> list[fx.Node | None] | None:
    return None if site.routing is None else list(site.routing)


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

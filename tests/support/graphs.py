"""Dynamo graphs opened for passes, passes run alone, and an owner for graphs made by hand."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from micromix_compile.config import MicroMixConfig
from micromix_compile.passes import PassContext, run_passes
from micromix_compile.session.graph import open_graph
from micromix_compile.session.session import Session

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from micromix_compile.passes import Pass


def trace(
    model: Callable[..., Any], *inputs: Tensor, session: Session, dynamic: bool | None = None
) -> tuple[fx.GraphModule, PassContext, Counter[str]]:
    """The Dynamo graph of `model`, opened for passes while Dynamo's context is there; runs the given passes on it."""
    found: list[tuple[fx.GraphModule, PassContext]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(open_graph(session, gm, example_inputs))
        copy, context = found[-1]
        for graph_pass in session.passes:  # type: ignore[attr-defined]
            graph_pass(copy.graph, context)
        copy.graph.lint()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (gm, context) = found[0]
    return gm, context, Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def session_with(
    *passes: Pass, model: nn.Module | None = None, recipe: Any = None, skip: tuple[str, ...] = ()
) -> Session:
    config = recipe.config if recipe is not None else MicroMixConfig(skip=skip)
    session = Session(config, recipe)
    session.passes = passes  # type: ignore[attr-defined]
    if model is not None:
        session.prepare(model)
    return session


class Inputs:
    """An owner that can add inputs, and no more."""

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
        node.meta["example_value"] = example
        return node


def context_with(**fields: Any) -> PassContext:
    """A context for a graph made by hand, whose owner can add inputs, and no more."""
    return PassContext(owner=Inputs(), example_inputs=(), **fields)  # type: ignore[arg-type]


def run_post_grad(graph_pass: Pass, graph: fx.Graph) -> int:
    """How many places one pass matched in a graph of Inductor's kind, which is cleaned up after it."""
    (matches,) = run_passes(graph, [graph_pass], context_with(), functional=True).values()
    return matches

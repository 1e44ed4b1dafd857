"""Dynamo's graphs: where their inputs come from, guards, copies, further inputs; its errors and settings."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

import torch
import torch._dynamo
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._guards import TracingContext

from micromix_compile.lowering.torch_private.tensors import is_fake

if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from torch._guards import Source

WITHOUT_DDP_OPTIMIZER: Final = "torch._dynamo.config.optimize_ddp=False"
"""What a user sets to have a graph under DistributedDataParallel compiled as one."""


def mark_static_address(tensor: Tensor) -> None:
    """Promise that it stays where it is, so that CUDA graphs write to it in place. Not while Dynamo traces."""
    torch._dynamo.mark_static_address(tensor)


def source_of(placeholder: fx.Node) -> Source | None:
    """Where Dynamo found a graph input, or None for inputs of another origin."""
    grapharg = placeholder.meta.get("grapharg")
    return None if grapharg is None else grapharg.source


def source_name(placeholder: fx.Node) -> str:
    """Python expression of a graph input, relative to the frame that was compiled."""
    source = source_of(placeholder)
    if source is None:
        return placeholder.name
    return text_of(source)


def text_of(source: Source) -> str:
    """The Python expression that a source stands for."""
    name = source.name  # a method up to 2.11, a property since
    return str(name() if callable(name) else name)


def parameter_name(placeholder: fx.Node) -> str:
    """The name of a weight as far as its frame knows it: "layers.0.fc" of L['self'].layers[0].fc.weight."""
    parts = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", source_name(placeholder))
    return ".".join(parts).removesuffix(".weight") or placeholder.name


def is_resumed(source_names: Iterable[str]) -> bool:
    """Whether a graph with inputs of these names follows a graph break and gets what was on the stack there."""
    return any("___stack" in name for name in source_names)


def guard_attribute(placeholder: fx.Node, *path: str) -> None:
    """Make Dynamo compile anew when the attribute at `path` of the tensor behind a graph input changes its value."""
    source = source_of(placeholder)
    assert source is not None, f"{placeholder.name} has no Dynamo source to guard"
    for attribute in path:
        source = AttrSource(source, attribute)
    TracingContext.get().guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.EQUALS_MATCH))


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may get more inputs: Dynamo reads its own graph's placeholders again after the backend returns."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    output = graph.output(result)
    output.meta = dict(gm.graph.output_node().meta)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def add_static_input(graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
    """Append a graph input of example's shape whose address stays the same between calls (no CUDA-graph copies).

    example: a tensor, or a fake one of this graph.
    """
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None, "Dynamo compiles under a fake tensor mode"
    node.meta["example_value"] = example if is_fake(example) else fake_mode.from_tensor(example, static_shapes=True)
    return node


def cause_of(error: Exception) -> Exception:
    """What a backend raised, of the error that Dynamo makes of it; any other error is its own cause."""
    return error.inner_exception if isinstance(error, BackendCompilerFailed) else error


def limit_text() -> str:
    """Dynamo's recompile limit as a user sets it, and its value."""
    return f"torch._dynamo.config.recompile_limit={torch._dynamo.config.recompile_limit}"


def dynamo_settings(**values: Any) -> AbstractContextManager[None]:
    """Within it settings of Dynamo's have these values."""
    patched: AbstractContextManager[None] = torch._dynamo.config.patch(**values)
    return patched

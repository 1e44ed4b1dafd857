"""What several passes do to graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from micromix_compile.lowering.torch_private.operators import argument_names, schema_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import fx


def calls(node: fx.Node, *operators: Callable[..., Any]) -> bool:
    """Whether `node` calls one of these operators, by overload or, where it is the only one, without."""
    packets = [packet for one in operators if schema_of(packet := getattr(one, "overloadpacket", one)) is not None]
    return node.op == "call_function" and node.target in (*operators, *packets)


def call(graph: fx.Graph, operator: Callable[..., Any], /, **arguments: Any) -> fx.Node:
    """A call of an operator, with all its arguments by the names of its schema; in the graph they are positional."""
    names = argument_names(operator)
    assert set(names) == set(arguments), f"{operator} takes {', '.join(names)}, got {', '.join(arguments)}"
    return graph.call_function(operator, tuple(arguments[name] for name in names))


def copy_meta(source: fx.Node, target: fx.Node) -> fx.Node:
    """Give `target` where `source` comes from: its stack trace and module stack."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
    return target


def input_devices(nodes: Iterable[fx.Node]) -> list[torch.device]:
    """The distinct devices of the graph's inputs, such as packed weights, that `nodes` read."""
    inputs = (node for reader in nodes for node in reader.all_input_nodes if node.op == "placeholder")
    examples = (node.meta.get("example_value") for node in inputs)
    return list(dict.fromkeys(example.device for example in examples if isinstance(example, torch.Tensor)))


def clean_up(graph: fx.Graph, *, functional: bool) -> None:
    """What ends a pass: no dead code, a sound graph, a module that runs it.

    functional: whether what nobody uses is dead. In a Dynamo graph it may be an in-place method.
    """
    if functional:
        graph.eliminate_dead_code()
    graph.lint()
    if graph.owning_module is not None:
        graph.owning_module.recompile()

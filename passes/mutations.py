"""What the nodes of a Dynamo graph, which is not functional, may write to."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any, Final

import torch
from torch import fx

from micromix_compile.lowering.torch_private.operators import is_higher_order, overloads_of, schema_of
from micromix_compile.lowering.torch_private.tensors import memory_id

IN_PLACE_OPERATORS: Final = frozenset(
    {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor"}
    | {"ilshift", "irshift", "imatmul"}
)
KNOWN_MODULES: Final = ("torch", "micromix_compile", "_operator", "operator", "builtins", "math")
"""Whose functions say by their names or arguments that they write; any other function may."""


def mutation_epochs(graph: fx.Graph) -> dict[fx.Node, int]:
    """Per node, how many nodes before it may write to a tensor.

    The same node is the same value only within one epoch.
    """
    epochs: dict[fx.Node, int] = {}
    epoch = 0
    for node in graph.nodes:
        epochs[node] = epoch
        epoch += bool(written_by(node))
    return epochs


def written_memory(graph: fx.Graph) -> frozenset[int]:
    """Identities of the memory that nodes of the graph may write to, see `memory_of`."""
    return frozenset(memory for node in graph.nodes for one in written_by(node) if (memory := memory_of(one)))


def memory_of(node: fx.Node) -> int | None:
    """An identity that nodes share whose tensors share memory; None for what is no tensor."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.layout is not torch.strided or example.is_nested:
        return None
    return memory_id(example)


def written_by(node: fx.Node) -> list[fx.Node]:
    """The operands that `node` may write to: all of them where that is not known."""
    if node.op == "call_module":
        return node.all_input_nodes
    if node.op not in ("call_function", "call_method"):
        return []
    out = node.kwargs.get("out")
    written = [out] if isinstance(out, fx.Node) else list(out) if isinstance(out, list | tuple) else []
    first = [node.args[0]] if node.args else list(node.kwargs.values())[:1]
    if isinstance(node.target, str):
        return [*written, *first] if _is_in_place_name(node.target) else written  # type: ignore[list-item]
    schema = schema_of(node.target)
    if schema is not None:
        return [*written, *_written_by_schema(node, schema)]
    if not _is_known(node.target):
        return node.all_input_nodes
    name = getattr(node.target, "__name__", "")
    in_place = node.kwargs.get("inplace") or _inplace_by_position(node) or _is_in_place_name(name)
    operator = getattr(node.target, "__module__", "") == "_operator" and name in IN_PLACE_OPERATORS
    return [*written, *first] if in_place or operator else written  # type: ignore[list-item]


def _is_known(target: Any) -> bool:
    if is_higher_order(target):
        return False
    if overloads := overloads_of(target):
        schemas = [schema_of(overload) for overload in overloads]
        return all(schema.overload_name.endswith("out") for schema in schemas if schema.is_mutable)
    module = getattr(target, "__module__", None)
    return module is None or module.partition(".")[0] in KNOWN_MODULES


def _written_by_schema(node: fx.Node, schema: Any) -> list[fx.Node]:
    written: list[fx.Node] = []
    for place, argument in enumerate(schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            fx.node.map_arg(value, written.append)
    return written


def _is_in_place_name(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


def _inplace_by_position(node: fx.Node) -> bool:
    place = _place_of_inplace(node.target)
    return place is not None and place < len(node.args) and bool(node.args[place])


@cache
def _place_of_inplace(function: Any) -> int | None:
    """Where torch.nn.functional's Python functions take `inplace`."""
    if not inspect.isfunction(function):
        return None
    names = list(inspect.signature(function).parameters)
    return names.index("inplace") if "inplace" in names else None

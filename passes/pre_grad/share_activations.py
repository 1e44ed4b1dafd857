"""Pass 4: one quantize for all linears that read the same activation in the same order and split.

Identical custom ops are not merged by the compiler, and q, k and v would quantize their input three times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.lowering.torch_private.operators import arguments_of
from micromix_compile.passes.graph import calls
from micromix_compile.passes.mutations import mutation_epochs

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.context import PassContext

aten = torch.ops.aten


def share_activations(graph: fx.Graph, context: PassContext) -> int:
    """Merge equal micromix::reorder_quantize calls on one activation. Returns how many calls went away."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    epochs = mutation_epochs(graph)
    merged = 0
    for node in list(graph.nodes):
        if not calls(node, ops.reorder_quantize):
            continue
        layout = arguments_of(node)
        key = (epochs[node], _activation(layout.pop("x")), *layout.values())
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            graph.erase_node(node)
            merged += 1
    return merged


def _activation(x: fx.Node) -> object:
    """The tensor under a reshape to rows, and the dtype if it is cast (under autocast).

    The channel count in the layout tells different row widths apart.
    """
    inner: Any = x
    if x.op == "call_method" and x.target == "reshape":
        inner = x.args[0]
    elif calls(x, aten.reshape.default):
        inner = arguments_of(x)["self"]
    return tuple(arguments_of(inner).values()) if calls(inner, aten.to.dtype) else inner

"""Pass 4: one quantize for all linears that read the same activation in the same order and split.

Identical custom ops are not merged by the compiler, and q, k and v would quantize their input three times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.passes.mutations import mutation_epochs

if TYPE_CHECKING:
    from torch import fx

    from micromix_compile.passes.manager import PassContext


def share_activations(gm: fx.GraphModule, context: PassContext) -> int:
    """Merge equal micromix::reorder_quantize calls on one activation. Returns how many calls went away."""
    seen: dict[tuple[object, ...], fx.Node] = {}
    epochs = mutation_epochs(gm.graph)
    merged = 0
    for node in list(gm.graph.nodes):
        if not is_quantize(node):
            continue
        x, *layout = node.args
        key = (epochs[node], _activation(x), *layout)
        first = seen.setdefault(key, node)
        if first is not node:
            node.replace_all_uses_with(first)
            gm.graph.erase_node(node)
            merged += 1
    return merged


def is_quantize(node: fx.Node) -> bool:
    """Whether `node` calls micromix::reorder_quantize, by overload or by packet."""
    return node.op == "call_function" and node.target in (ops.reorder_quantize, torch.ops.micromix.reorder_quantize)


def _activation(x: object) -> object:
    """The tensor under a reshape to rows, and the dtype if it is cast (under autocast).

    The channel count in `layout` tells different row widths apart.
    """
    is_method = getattr(x, "op", None) == "call_method" and x.target == "reshape"  # type: ignore[attr-defined]
    is_reshape = is_method or getattr(x, "target", None) is torch.ops.aten.reshape.default
    inner: Any = x.args[0] if is_reshape else x  # type: ignore[attr-defined]
    return inner.args if getattr(inner, "target", None) is torch.ops.aten.to.dtype else inner

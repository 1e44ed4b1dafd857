"""Pass 5, where matrix instructions take no block scales but FP8 (sm_90): quantize and products -> their folded twins.

Linears that read one activation become one product with several results: q, k and v; gate and up.
"""

from __future__ import annotations

import operator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.numerics.folding import factor_shape
from micromix_compile.numerics.layout import order_dtype, split_of_weight
from micromix_compile.ops import prepared
from micromix_compile.passes.manager import PassContext, copy_meta
from micromix_compile.passes.pre_grad.share_activations import is_quantize
from micromix_compile.targets.groups import MAX_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

_FP6 = 9  # arguments of mixed_mx_mm: four of x, four of w, bias, fp6, out_dtype
_BIAS = 8


def fold_products(gm: fx.GraphModule, context: PassContext) -> int:
    """Rewrite each quantize all of whose users are bfloat16 products; fills `context.folded`. Returns how many.

    The device of the weights decides for each: a graph may have inputs, or linears, on several.
    """
    folded: dict[fx.Node, tuple[fx.Node, ...]] = {}
    rewritten = 0
    for quantize in [node for node in gm.graph.nodes if is_quantize(node)]:
        products = _products(quantize)
        if products and context.target_of(_example(products[0].args[4]).device).wants("fold_products"):
            _rewrite(gm.graph, context, quantize, products, folded)
            rewritten += 1
    return rewritten


def _products(quantize: fx.Node) -> list[fx.Node]:
    """The products that read all parts of a quantize, in order; none if there is another user or dtype."""
    if any(part.target is not operator.getitem for part in quantize.users):
        return []
    users = {user for part in quantize.users for user in part.users}
    for user in users:
        is_product = user.target in (ops.mixed_mx_mm, torch.ops.micromix.mixed_mx_mm) and not user.kwargs
        if not is_product or user.args[-1] != torch.bfloat16:
            return []
        if [getattr(part, "args", None) for part in user.args[:4]] != [(quantize, i) for i in range(4)]:
            return []
        if any(getattr(part, "op", None) != "placeholder" for part in user.args[4:_BIAS]):
            return []  # factors are made from inputs of the graph
    kinds = {_weights_are_fp4(quantize, user) for user in users}
    return sorted(users) if len(kinds) == 1 else []


def _weights_are_fp4(quantize: fx.Node, product: fx.Node) -> bool:
    """Whether weights are all MXFP4 and activations are not."""
    packed = _example(product.args[4]).shape[1] * 2
    return bool(packed == sum(quantize.args[2:5]) != quantize.args[2])  # type: ignore[arg-type]


def _example(node: Any) -> torch.Tensor:
    example = node.meta["example_value"]
    assert isinstance(example, torch.Tensor), "a graph input has an example"
    return example


def _rewrite(
    graph: fx.Graph, context: PassContext, quantize: fx.Node, products: list[fx.Node],
    folded: dict[fx.Node, tuple[fx.Node, ...]],
) -> None:  # fmt: skip
    x, perm, *layout = quantize.args
    order = _short_order(graph, context, perm, folded)
    with graph.inserting_before(quantize):
        w_fp4 = _weights_are_fp4(quantize, products[0])
        fold = graph.call_function(ops.reorder_fold, (x, order, *layout, w_fp4))
        parts = [graph.call_function(operator.getitem, (copy_meta(quantize, fold), i)) for i in range(3)]
    for group in _groups(products):
        weights = [[*product.args[4:7], *_folded_inputs(graph, context, product, folded)] for product in group]
        biases = [product.args[_BIAS] for product in group if product.args[_BIAS] is not None]
        with graph.inserting_before(group[0]):
            lists = [list(column) for column in zip(*weights, strict=True)]
            joint = graph.call_function(ops.folded_mm, (*parts, *lists, biases, *group[0].args[_FP6:]))
            copy_meta(group[0], joint)
            outputs = [graph.call_function(operator.getitem, (joint, i)) for i in range(len(group))]
        for product, output in zip(group, outputs, strict=True):
            product.replace_all_uses_with(copy_meta(product, output))
            graph.erase_node(product)
    for part in list(quantize.users):
        graph.erase_node(part)
    graph.erase_node(quantize)


def _groups(products: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Products that can be one: of one MXFP6 format, all with biases of one dtype that are graph inputs, or without."""

    def kind(product: fx.Node) -> tuple[object, ...]:
        bias = product.args[_BIAS]
        if bias is None:
            return product.args[_FP6], None, None
        assert isinstance(bias, torch.fx.Node), "a bias is a tensor"
        is_input = bias.op == "placeholder"
        return product.args[_FP6], _example(bias).dtype if is_input else None, None if is_input else product

    for _, run in groupby(products, kind):
        members = list(run)
        yield from (members[i : i + MAX_GROUP] for i in range(0, len(members), MAX_GROUP))


def _short_order(graph: fx.Graph, context: PassContext, perm: Any, folded: dict[fx.Node, tuple[fx.Node, ...]]) -> Any:
    """A graph input with the order in few bytes, or the order itself if it is so already, or is computed."""
    if getattr(perm, "op", None) != "placeholder":
        return perm
    example = _example(perm)
    short = order_dtype(example.shape[0])
    if example.dtype == short:
        return perm
    if perm not in folded:
        name = f"micromix_folded_{len(context.folded)}_order"
        folded[perm] = (context.owner.add_input(graph, name, example.new_empty(example.shape, dtype=short)),)
        context.folded.append(((perm,), prepared.short_order))
    return folded[perm][0]


def _folded_inputs(
    graph: fx.Graph, context: PassContext, product: fx.Node, folded: dict[fx.Node, tuple[fx.Node, ...]]
) -> tuple[fx.Node, ...]:
    """Graph inputs with the factors and the row scales of a product's weight."""
    w4, w6, w8, w_scale = product.args[4:8]
    assert isinstance(w_scale, torch.fx.Node), "scales are a graph input"
    if w_scale not in folded:
        scale = _example(w_scale)
        split = split_of_weight(_example(w4), _example(w6), _example(w8))
        name = f"micromix_folded_{len(context.folded)}"
        folded[w_scale] = (
            context.owner.add_input(graph, f"{name}_factor", scale.new_empty(factor_shape(scale.shape[0], split))),
            context.owner.add_input(graph, f"{name}_row", scale.new_empty(scale.shape[0], dtype=torch.float32)),
        )
        make = partial(prepared.folded_factors, fp6=str(product.args[_FP6]))
        context.folded.append(((w4, w6, w8, w_scale), make))  # type: ignore[arg-type]
    return folded[w_scale]

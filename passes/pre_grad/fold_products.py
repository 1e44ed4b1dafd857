"""Pass 5, where matrix instructions take no block scales but FP8 (sm_90): quantize and products -> their folded twins.

Linears that read one activation become one product with several results: q, k and v; gate and up. Products with a
layer's experts stay apart.
"""

from __future__ import annotations

import operator
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.lowering.torch_private.operators import arguments_of
from micromix_compile.numerics.folding import factor_shape
from micromix_compile.numerics.layout import order_dtype, split_of_weight, weight_split
from micromix_compile.ops import prepared
from micromix_compile.passes.graph import call, calls, copy_meta
from micromix_compile.passes.pre_grad.rewrite_linears import ACTIVATION, WEIGHT
from micromix_compile.targets.groups import MAX_GROUP

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import fx

    from micromix_compile.passes.context import PassContext


def fold_products(graph: fx.Graph, context: PassContext) -> int:
    """Rewrite each quantize all of whose users are bfloat16 products; fills `context.folded`. Returns how many.

    The device of the weights decides for each: a graph may have inputs, or linears, on several.
    """
    folded: dict[fx.Node, tuple[fx.Node, ...]] = {}
    rewritten = 0
    for quantize in [node for node in graph.nodes if calls(node, ops.reorder_quantize)]:
        products = _products(quantize)
        if products and context.target_of(_device(products[0])).wants("fold_products"):
            _rewrite(graph, context, quantize, products, folded)
            rewritten += 1
    return rewritten


def _device(product: fx.Node) -> torch.device:
    return _example(arguments_of(product)["w4"]).device


def _products(quantize: fx.Node) -> list[fx.Node]:
    """The products that read all parts of a quantize, in order; none if there is another user or dtype."""
    if any(part.target is not operator.getitem for part in quantize.users):
        return []
    users = {user for part in quantize.users for user in part.users}
    if not all(calls(user, ops.mixed_mx_mm, ops.grouped_mx_mm) and _can_fold(user, quantize) for user in users):
        return []
    kinds = {_weights_are_fp4(quantize, user) for user in users}
    return sorted(users) if len(kinds) == 1 else []


def _can_fold(product: fx.Node, quantize: fx.Node) -> bool:
    """Whether a product is of just this activation and of inputs of the graph, from which factors are made."""
    given = arguments_of(product)
    reads = [getattr(given[name], "args", None) for name in ACTIVATION] == [(quantize, i) for i in range(4)]
    inputs = all(getattr(given[name], "op", None) == "placeholder" for name in WEIGHT)
    return bool(reads and inputs and given["out_dtype"] == torch.bfloat16)


def _weights_are_fp4(quantize: fx.Node, product: fx.Node) -> bool:
    """Whether weights are all MXFP4 and activations are not."""
    given, layout = arguments_of(product), arguments_of(quantize)
    split = layout["k4"], layout["k6"], layout["k8"]
    w_split = split_of_weight(*(_example(given[name]) for name in WEIGHT[:3]))
    return w_split == weight_split(split, "mxfp4") != split


def _example(node: Any) -> torch.Tensor:
    example = node.meta["example_value"]
    assert isinstance(example, torch.Tensor), "a graph input has an example"
    return example


def _rewrite(
    graph: fx.Graph, context: PassContext, quantize: fx.Node, products: list[fx.Node],
    folded: dict[fx.Node, tuple[fx.Node, ...]],
) -> None:  # fmt: skip
    layout = arguments_of(quantize)
    layout["channel_perm"] = _short_order(graph, context, layout["channel_perm"], folded)
    with graph.inserting_before(quantize):
        fold = call(graph, ops.reorder_fold, **layout, w_fp4=_weights_are_fp4(quantize, products[0]))
        parts = [graph.call_function(operator.getitem, (copy_meta(quantize, fold), i)) for i in range(3)]
    for product in [product for product in products if calls(product, ops.grouped_mx_mm)]:
        product.replace_all_uses_with(_grouped_product(graph, context, parts, product, folded))
        graph.erase_node(product)
    for group in _groups([product for product in products if calls(product, ops.mixed_mx_mm)]):
        joint = _joint_product(graph, context, parts, group, folded)
        with graph.inserting_before(group[0]):
            outputs = [graph.call_function(operator.getitem, (joint, i)) for i in range(len(group))]
        for product, output in zip(group, outputs, strict=True):
            product.replace_all_uses_with(copy_meta(product, output))
            graph.erase_node(product)
    for part in list(quantize.users):
        graph.erase_node(part)
    graph.erase_node(quantize)


def _grouped_product(
    graph: fx.Graph, context: PassContext, parts: list[fx.Node], product: fx.Node,
    folded: dict[fx.Node, tuple[fx.Node, ...]],
) -> fx.Node:  # fmt: skip
    """The folded twin of a product with experts."""
    given = arguments_of(product)
    w_factor, w_row_scale = _folded_inputs(graph, context, given, folded)
    kept = {name: value for name, value in given.items() if name not in (*ACTIVATION, "w_scale")}
    with graph.inserting_before(product):
        made = call(
            graph, ops.grouped_folded_mm, q=parts[0], row_scale=parts[1], w_factor=w_factor, w_row_scale=w_row_scale,
            **kept,
        )  # fmt: skip
    return copy_meta(product, made)


def _joint_product(
    graph: fx.Graph, context: PassContext, parts: list[fx.Node], group: list[fx.Node],
    folded: dict[fx.Node, tuple[fx.Node, ...]],
) -> fx.Node:  # fmt: skip
    """One folded product of an activation's `parts` with the weights of all products of a group."""
    given = [arguments_of(product) for product in group]
    made = [_folded_inputs(graph, context, one, folded) for one in given]
    q, row_scale, locks = parts
    with graph.inserting_before(group[0]):
        joint = call(
            graph, ops.folded_mm, q=q, row_scale=row_scale, locks=locks, w4=[one["w4"] for one in given],
            w6=[one["w6"] for one in given], w8=[one["w8"] for one in given], w_factor=[factor for factor, _ in made],
            w_row_scale=[row for _, row in made], bias=[one["bias"] for one in given if one["bias"] is not None],
            fp6=given[0]["fp6"], out_dtype=given[0]["out_dtype"],
        )  # fmt: skip
    return copy_meta(group[0], joint)


def _groups(products: Sequence[fx.Node]) -> Iterator[list[fx.Node]]:
    """Products that can be one: of one MXFP6 format, all with biases of one dtype that are graph inputs, or without."""

    def kind(product: fx.Node) -> tuple[object, ...]:
        given = arguments_of(product)
        fp6, bias = given["fp6"], given["bias"]
        if bias is None:
            return fp6, None, None
        is_input = bias.op == "placeholder"
        return fp6, _example(bias).dtype if is_input else None, None if is_input else product

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
    graph: fx.Graph, context: PassContext, product: dict[str, Any], folded: dict[fx.Node, tuple[fx.Node, ...]]
) -> tuple[fx.Node, ...]:
    """Graph inputs with the factors and the row scales of the weight of a product with these arguments."""
    w4, w6, w8, w_scale = weight = tuple(product[name] for name in WEIGHT)
    if w_scale not in folded:
        scale = _example(w_scale)
        split = split_of_weight(_example(w4), _example(w6), _example(w8))
        name = f"micromix_folded_{len(context.folded)}"
        experts, rows = scale.shape[:-2], scale.shape[-2]
        factor = scale.new_empty((*experts, *factor_shape(rows, split)))
        folded[w_scale] = (
            context.owner.add_input(graph, f"{name}_factor", factor),
            context.owner.add_input(graph, f"{name}_row", scale.new_empty((*experts, rows), dtype=torch.float32)),
        )
        context.folded.append((weight, partial(prepared.folded_factors, fp6=product["fp6"])))
    return folded[w_scale]

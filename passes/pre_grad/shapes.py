"""Products whose operands have other shapes than a linear's and a grouped product's, and how they become such ones.

A weight may be on the left: weight @ x.mT (`dt_proj` of Mamba and Jamba). What multiplies each matrix of a stack with
rows of its own is a grouped product that has these rows one matrix behind the other (the experts of Llama 4). What
takes a matrix out of the stack for each row is one that has the rows sorted by matrix ("batched_mm" of transformers'
experts, by which its `generate` decodes on a GPU).
"""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import fx, nn

from micromix_compile.passes.context import Batch, Routing
from micromix_compile.passes.graph import copy_meta
from micromix_compile.passes.mutations import memory_of
from micromix_compile.passes.pre_grad.products import Operands, is_transpose

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from micromix_compile.passes.context import LinearSite

aten = torch.ops.aten
INDEX_DTYPES = (torch.int32, torch.int64)


def reshaped(operands: Operands, inputs: Mapping[fx.Node, object], written: frozenset[int]) -> Operands | None:
    """The operands of a product by what it is a linear or a grouped product of; None if it is one, or neither.

    inputs: of the graph. written: memory that the graph writes to; what was taken out of it may differ.
    """
    if operands.offs is not None or operands.bias is not None or not operands.transposed:
        return None
    dims = [_dims(operands.x), _dims(operands.weight)]
    if dims == [3, 3]:
        return _of_a_stack(operands, inputs, written)
    weight, rows, is_transposed = _stack(operands.x)
    is_whole = rows is None and isinstance(inputs.get(weight), nn.Parameter) and _dims(weight) == 2
    if dims[0] != 2 or dims[1] < 2 or not is_whole:
        return None
    if isinstance(inputs.get(_stack(operands.weight)[0]), nn.Parameter):  # of two weights the right one is a linear's
        return None
    return replace(operands, x=operands.weight, weight=weight, transposed=is_transposed, turned=1)


def _of_a_stack(operands: Operands, inputs: Mapping[fx.Node, object], written: frozenset[int]) -> Operands | None:
    for x, factor, turned in ((operands.x, operands.weight, 0), (operands.weight, operands.x, 1)):
        stack, experts, is_transposed = _stack(factor)
        if not isinstance(inputs.get(stack), nn.Parameter) or _dims(stack) != 3:
            continue
        if _example(x).shape[0] != _example(factor).shape[0]:  # torch.matmul broadcasts
            return None
        batch, rows = Batch(experts=experts), x
        if experts is not None:
            if memory_of(experts) in written or _example(x).shape[-1 if turned else -2] != 1:
                return None
            rows, copies = _uncopied(x, written)
            batch = replace(batch, copies=copies)
        elif not turned and _are_tokens_for_each(x):
            batch = replace(batch, is_all_tokens=True)
        transposed = bool(turned) == is_transposed
        return replace(operands, x=rows, weight=stack, transposed=transposed, batch=batch, turned=turned)
    return None


def _stack(node: fx.Node) -> tuple[fx.Node, fx.Node | None, bool]:
    """(what matrices come from, by which index they were taken out or None for all, whether they are transposed)."""
    experts: Any = None
    is_transposed = False
    while node.args and isinstance(node.args[0], fx.Node):
        if is_transpose(node):
            is_transposed = not is_transposed
        elif experts is None and _takes_by_index(node):
            experts = node.args[1]
        else:
            break
        node = node.args[0]
    return node, experts, is_transposed


def _takes_by_index(node: fx.Node) -> bool:
    index = node.args[1] if node.target is operator.getitem else None
    if not isinstance(index, fx.Node) or _dims(index) != 1:
        return False
    return bool(_example(index).dtype in INDEX_DTYPES)


def _uncopied(x: fx.Node, written: frozenset[int]) -> tuple[fx.Node, int | None]:
    """(tokens (T, C), k) where x (T * k, 1, C) or (T * k, C, 1) holds k copies of each, one behind the other."""
    node = x.args[0] if x.target in ("unsqueeze", torch.unsqueeze) else None
    if not isinstance(node, fx.Node) or node.target not in ("repeat_interleave", torch.repeat_interleave):
        return x, None
    tokens, *copies = node.args
    is_rows = node.kwargs.get("dim") == 0 and isinstance(tokens, fx.Node) and _dims(tokens) == 2
    if not is_rows or len(copies) != 1 or not isinstance(copies[0], int):
        return x, None
    assert isinstance(tokens, fx.Node), "its dimensions are known"
    changed = {memory_of(one) for one in (x, node, tokens)} & written
    return (x, None) if changed else (tokens, copies[0])


def _are_tokens_for_each(x: fx.Node) -> bool:
    """Whether x (E, T, C) comes from E copies of T rows, one behind the other."""
    node: Any = x
    copies = _example(x).shape[0]
    while isinstance(node, fx.Node) and node.op != "placeholder":
        if node.target == "repeat" and node.args[1:] == (copies, 1):
            return bool(_example(node.args[0]).shape[0] == _example(x).shape[1])
        node = next(iter(node.all_input_nodes), None)
    return False


class Entered(NamedTuple):
    """A linear as a grouped product gets it.

    x: (..., C), its rows. routing: None of what is no grouped product. order: of a product by index, which of its
    results each grouped one is.
    """

    x: fx.Node
    routing: Routing | None
    order: fx.Node | None = None


class Shapes:
    """Puts into a graph, before and behind a site, what makes a linear or a grouped product of it.

    sort: have rows that are no tokens of their own sorted by expert, and not only say where they are.
    """

    def __init__(self, graph: fx.Graph, *, sort: bool) -> None:
        self._graph = graph
        self._sort = sort
        self._all: dict[tuple[fx.Node, int], Routing] = {}
        self._last: dict[tuple[fx.Node, int], fx.Node] = {}
        self._chosen: dict[tuple[fx.Node, int], tuple[fx.Node, fx.Node]] = {}

    def enter(self, site: LinearSite, x: fx.Node) -> Entered:
        """The rows x of a site and their routing, if it is of experts."""
        with self._graph.inserting_before(site.node):
            if _is_turned(site):
                x = self._channels_last(site, x)
            if site.batch is None:
                return Entered(x, site.routing)
            return self._with_all(site, x) if site.batch.experts is None else self._by_index(site, x)

    def _with_all(self, site: LinearSite, x: fx.Node) -> Entered:
        """Of as many rows for each matrix, in their order."""
        assert site.batch is not None, "it is of a batched product"
        device, experts = site.parameter.device, site.parameter.shape[0]
        key = site.x, site.turned
        if key not in self._all:
            each = self._add(site, aten.sym_size.int, x, 1)
            count = self._add(site, aten.arange.start, 1, experts + 1, dtype=torch.int32, device=device)
            tokens = None
            if site.batch.is_all_tokens:
                own = self._add(site, aten.arange.default, each, device=device)
                tokens = self._add(site, aten.repeat.default, own, [experts])
            self._all[key] = Routing(self._add(site, aten.mul.Tensor, count, each), None, tokens)
        return Entered(x, self._all[key])

    def _by_index(self, site: LinearSite, x: fx.Node) -> Entered:
        """Of a matrix for each row. An index of E or more is of no expert, as in packed ones: the row becomes zero."""
        batch = site.batch
        assert batch is not None, "it is of a batched product"
        assert batch.experts is not None, "by an index"
        count = site.parameter.shape[0]
        if (batch.experts, count) not in self._chosen:
            from_the_end = self._add(site, aten.mul.Scalar, self._add(site, aten.lt.Scalar, batch.experts, 0), count)
            own = self._add(site, aten.add.Tensor, batch.experts, from_the_end)  # int64
            order = self._add(site, aten.argsort.stable, own, stable=True)
            chosen = self._add(site, aten.index.Tensor, own, [order])
            each = self._add(site, aten.arange.default, count, device=site.parameter.device)
            ends = self._add(site, aten.searchsorted.Tensor, chosen, each, right=True, out_int32=True)
            self._chosen[batch.experts, count] = ends, order
        ends, order = self._chosen[batch.experts, count]
        tokens = None if batch.copies is None else self._add(site, aten.floor_divide.default, order, batch.copies)
        if _dims(site.x) == 2:
            return Entered(x, Routing(ends, tokens, tokens), order)
        if not self._sort:
            return Entered(x, Routing(ends, order, tokens), order)
        rows = self._add(site, aten.reshape.default, x, [-1, site.in_features])
        return Entered(self._add(site, aten.index.Tensor, rows, [order]), Routing(ends, None, tokens), order)

    def leave(self, site: LinearSite, entered: Entered, out: fx.Node) -> fx.Node:
        """The results of a site in its own shape, from those of a linear, (..., N), or of a grouped product, (R, N)."""
        out = self._in_own_shape(site, entered, out, site.out_features)
        as_before = site.is_convolution and _example(site.node).is_contiguous()
        return self._add(site, aten.contiguous.default, out) if as_before else out

    def feed(self, site: LinearSite, entered: Entered, rows: fx.Node) -> None:
        """Have the product of a site read `rows`, its input as `enter` made it and flat if batched, in its own shape.

        Gradients at its input are then gradients at `rows`.
        """
        if site.batch is None and not site.turned:
            return
        reads = (one for one in site.node.all_input_nodes if site.x in (one, _uncopied(one, frozenset())[0]))
        with self._graph.inserting_before(site.node):
            if site.batch is not None and site.batch.experts is not None and _dims(site.x) == 2:
                rows = self._add(site, aten.repeat_interleave.self_int, rows, site.batch.copies, 0)
                x = self._add(site, aten.unsqueeze.default, rows, 2 if site.turned else 1)
            else:
                x = self._in_own_shape(site, entered, rows, site.in_features)
        site.node.replace_input_with(next(reads), x)

    def _in_own_shape(self, site: LinearSite, entered: Entered, rows: fx.Node, channels: int) -> fx.Node:
        """What a linear or a grouped product reads or makes, as the site has it."""
        if entered.order is not None:
            back = self._add(site, aten.argsort.default, entered.order)
            rows = self._add(site, aten.index.Tensor, rows, [back])
            return self._add(site, aten.unsqueeze.default, rows, 2 if site.turned else 1)
        if site.batch is not None:
            rows = self._add(site, aten.reshape.default, rows, [site.parameter.shape[0], -1, channels])
        return self._add(site, aten.movedim.int, rows, -1, -1 - site.turned) if site.turned else rows

    def flatten(self, site: LinearSite, entered: Entered) -> fx.Node:
        """The results of a site as a linear or a grouped product has them: what `leave` makes its own of."""
        out = self._add(site, aten.movedim.int, site.node, -1 - site.turned, -1) if site.turned else site.node
        if site.batch is not None:
            out = self._add(site, aten.reshape.default, out, [-1, site.out_features])
        return out if entered.order is None else self._add(site, aten.index.Tensor, out, [entered.order])

    def _channels_last(self, site: LinearSite, x: fx.Node) -> fx.Node:
        """One view of it for all that read it."""
        if (x, site.turned) not in self._last:
            self._last[x, site.turned] = self._add(site, aten.movedim.int, x, -1 - site.turned, -1)
        return self._last[x, site.turned]

    def _add(self, site: LinearSite, target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return copy_meta(site.node, self._graph.call_function(target, args, kwargs))


def _is_turned(site: LinearSite) -> bool:
    """Whether x has channels before rows; tokens that were copied for it are as they were."""
    return bool(site.turned) and not (site.batch is not None and _dims(site.x) == 2)


def _example(node: Any) -> Any:
    return node.meta["example_value"]


def _dims(node: fx.Node) -> int:
    example = node.meta.get("example_value")
    return example.dim() if isinstance(example, torch.Tensor) else 0

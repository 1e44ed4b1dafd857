"""Inductor's lowerings of the folded ops: launches of Triton kernels, calls of the library, or the op itself.

A product of any number of rows that is compiled with many is the library's, and for many only. One that is compiled
with fewer stays a call of the op, which chooses a kernel when it runs; so does one for both, where rows depend on data
or the caller declared their range. So does one of a known number of rows that the persistent Gluon kernel takes, which
Inductor cannot carry: it knows `triton.jit` functions only.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.lowering import inductor
from micromix_compile.lowering.launches import Operand, contiguous, empty, in_memory, launch
from micromix_compile.lowering.torch_private.lowerings import (
    V,
    fallback_handler,
    is_at_least,
    lowerings,
    register_lowering,
)
from micromix_compile.lowering.torch_private.operators import arguments_of, is_overload
from micromix_compile.numerics.folding import LOCKS, FoldedActivation, fold_width
from micromix_compile.targets.expansion import ExpandedWeights, expand_call
from micromix_compile.targets.folded_tiles import partial_size
from micromix_compile.targets.hopper import folded_mm_call, reorder_fold_call
from micromix_compile.targets.kernels import FoldedWeight, Residual, columns_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import fx

    from micromix_compile.targets.folded_tiles import FoldedTiles


def _tiles(node: Any) -> FoldedTiles | None:
    """Of the kernels that are launched from a graph with `node`; None where the ops stay calls, or nothing is to do."""
    target = inductor.target_for_us(node)
    return None if target is None or 0 in node.get_size() else target.folded.tiles


def _products(node: fx.Node) -> list[list[int]]:
    """The columns of each product that reads a quantizer's results."""
    readers = {reader for output in node.users for reader in output.users if reader.target is ops.folded_mm}
    columns = []
    for reader in readers:
        scales = arguments_of(reader)["w_row_scale"]
        columns.append([int(one.meta["val"].shape[0]) for one in scales])
    return columns


def _register(op: Any, arguments: Callable[..., tuple[Any, ...]]) -> None:
    """Lower `op`, whose arguments `arguments` maps to producer, x, other, residual, eps, channel_perm, split, names."""
    call_op = fallback_handler(op, add_to_fallback_set=False)

    @register_lowering(op, type_promotion_kind=None)
    def lower(x: Any, *rest: Any) -> Any:
        tiles = _tiles(x)
        if tiles is None:
            return call_op(x, *rest)
        producer, source, other, residual, eps, perm, split, fp6, scale_rounding, activations, rotated, w_fp4 = (
            arguments(x, *rest)
        )
        rows, device = x.get_size()[0], x.get_device()
        outputs = (
            empty([rows, fold_width(split, w_fp4=w_fp4)], torch.uint8, device),
            empty([rows], torch.float32, device),
            empty([LOCKS], torch.int32, device),
        )
        tensors: list[Any] = [None if node is None else Operand(in_memory(node)) for node in (source, other, perm)]
        filled: Any = FoldedActivation(*map(Operand, outputs))  # type: ignore[arg-type]
        added: Any = None
        if residual is not None:
            added = Residual(Operand(in_memory(residual)), Operand(empty(x.get_size(), x.get_dtype(), device)))  # type: ignore[arg-type]
        call = reorder_fold_call(
            producer, tensors[0], tensors[1], eps, tensors[2], split, filled, fp6=fp6, scale_rounding=scale_rounding,
            w_fp4=w_fp4, residual=added, products=_products(V.graph.current_node), activations=activations,
            rotated=rotated, tiles=tiles,
        )  # fmt: skip
        launch(call)
        return outputs if added is None else (added.total.node, *outputs)


_register(
    ops.reorder_fold,
    lambda x, perm, k4, k6, k8, *names: ("none", x, None, None, 0.0, perm, (k4, k6, k8), *names),
)
_register(
    ops.rms_norm_reorder_fold,
    lambda x, weight, eps, perm, k4, k6, k8, *names: ("rms_norm", x, weight, None, eps, perm, (k4, k6, k8), *names),
)
_register(
    ops.add_rms_norm_reorder_fold,
    lambda x, residual, weight, eps, perm, k4, k6, k8, *names: (
        "rms_norm", x, weight, residual, eps, perm, (k4, k6, k8), *names,
    ),
)  # fmt: skip
_register(
    ops.silu_mul_reorder_fold,
    lambda gate, up, perm, k4, k6, k8, *names: ("silu_mul", gate, up, None, 0.0, perm, (k4, k6, k8), *names),
)

_call_folded_mm = fallback_handler(ops.folded_mm, add_to_fallback_set=False)


@register_lowering(ops.folded_mm, type_promotion_kind=None)
def _lower_folded_mm(
    q: Any, row_scale: Any, locks: Any, w4: Any, w6: Any, w8: Any, w_factor: Any, w_row_scale: Any, bias: Any,
    expanded: Any, fp6: str, out_dtype: torch.dtype,
) -> Any:  # fmt: skip
    tiles, (rows, width) = _tiles(q), Operand(q).shape
    columns = [Operand(node).shape[0] for node in w_row_scale]
    if tiles is None:
        return _call_folded_mm(q, row_scale, locks, w4, w6, w8, w_factor, w_row_scale, bias, expanded, fp6, out_dtype)
    tensors = zip(w4, w6, w8, w_factor, w_row_scale, bias or [None] * len(w4), strict=True)
    weights: Any = [
        FoldedWeight(*(None if node is None else Operand(_operand(node)) for node in one))  # type: ignore[arg-type]
        for one in tensors
    ]
    if _asks_library(tiles, rows, weights, out_dtype, is_expanded=bool(expanded)):
        return _library_mm(tiles, q, row_scale, weights, expanded, fp6, out_dtype)
    if not isinstance(rows, int) or tiles.gluon_plan(rows, weights, out_dtype) is not None:
        return _call_folded_mm(q, row_scale, locks, w4, w6, w8, w_factor, w_row_scale, bias, expanded, fp6, out_dtype)
    x: Any = FoldedActivation(*(Operand(contiguous(node)) for node in (q, row_scale, locks)))  # type: ignore[arg-type]
    outs = [empty([rows, n], out_dtype, q.get_device()) for n in columns]
    tile = tiles.tile_for(rows, columns, width)
    parts = tiles.parts_for(rows, columns, width, tile)
    size = partial_size(rows, columns, tile, parts)
    partial: Any = Operand(empty([size], torch.float32, q.get_device())) if size else x.row_scale
    results: Any = [Operand(out) for out in outs]
    launch(folded_mm_call(x, weights, results, partial, fp6=fp6, tile=tile, parts=parts))
    return outs


def _asks_library(tiles: FoldedTiles, rows: Any, weights: Any, out_dtype: torch.dtype, *, is_expanded: bool) -> bool:
    """`FoldedTiles.uses_library`, for a symbolic number of rows, too, which then is guarded."""
    if isinstance(rows, int):
        return tiles.uses_library(rows, weights, out_dtype, is_expanded=is_expanded)
    least = tiles.library_from(is_expanded=is_expanded)
    return bool(tiles.fits_library(weights, out_dtype) and is_at_least(V.graph.sizevars, rows, least))


_scaled_mm = fallback_handler(torch.ops.aten._scaled_mm.default, add_to_fallback_set=False)


def _library_mm(
    tiles: FoldedTiles, q: Any, row_scale: Any, weights: Any, kept: Any, fp6: str, out_dtype: torch.dtype
) -> list[Any]:
    """Launches that expand the weights and products of the library's, each of as many weights as are expanded together.

    Of a product's columns each weight's are a view; if one must lie in memory as eager has it, each has its own. kept:
    the weights expanded, if they are there already: each has a product of its own then.
    """
    columns, width = columns_of(weights), Operand(q).shape[1]
    separate = any(_needs_own_memory(output) for output in V.graph.current_node.users)
    x = _as_e4m3(contiguous(q)), _call(torch.ops.aten.unsqueeze.default, contiguous(row_scale), 1)
    if kept:
        biases = [None if weight.bias is None else weight.bias.node for weight in weights]
        each = zip(map(contiguous, kept), [weight.row_scale.node for weight in weights], biases, strict=True)
        return [_multiply(x, ExpandedWeights(*one), out_dtype) for one in each]
    outs = []
    for run in tiles.expansion_runs(columns, width):
        expanded = _expand(weights[run], width, fp6, out_dtype)
        if separate:
            each = zip(*(_split(part, columns[run], 0) for part in expanded), strict=True)
            outs += [_multiply(x, ExpandedWeights(*one), out_dtype) for one in each]
        else:
            outs += _split(_multiply(x, expanded, out_dtype), columns[run], 1)
    return outs


def _expand(weights: Any, width: int, fp6: str, out_dtype: torch.dtype) -> Any:
    n, device = sum(columns_of(weights)), weights[0].w4.node.get_device()
    bias = None if weights[0].bias is None else empty([n], out_dtype, device)
    expanded: Any = ExpandedWeights(
        empty([n, width], torch.uint8, device), empty([n], torch.float32, device), bias
    )  # fmt: skip
    room: Any = ExpandedWeights(*(None if part is None else Operand(part) for part in expanded))  # type: ignore[arg-type]
    launch(expand_call(weights, room, fp6=fp6))
    return expanded


def _split(node: Any, sizes: list[int], dim: int) -> list[Any]:
    if node is None or len(sizes) == 1:
        return [node] * len(sizes)
    parts: list[Any] = _call(torch.ops.aten.split_with_sizes.default, node, sizes, dim)
    return parts


def _multiply(x: tuple[Any, Any], w: Any, out_dtype: torch.dtype) -> Any:
    """The library's product. x: E4M3 and scales, (M, width) and (M, 1)."""
    right = _call(torch.ops.aten.permute.default, _as_e4m3(w.w), [1, 0])
    scale = _call(torch.ops.aten.unsqueeze.default, w.row_scale, 0)
    return _scaled_mm(x[0], right, x[1], scale, w.bias, None, out_dtype, True)


def _needs_own_memory(node: fx.Node) -> bool:
    """Whether what reads `node`, or a view of it, may count on the strides that eager gives it.

    So do the graph's results, operators of others, and `as_strided`, which Inductor applies to all of the memory.
    """
    for user in node.users:
        target = user.target
        if target is not operator.getitem and not _reads_by_index(target):
            return True
        if (target is operator.getitem or target.is_view) and _needs_own_memory(user):  # type: ignore[union-attr]
            return True
    return False


def _reads_by_index(target: Any) -> bool:
    is_known = is_overload(target) and target.namespace in ("aten", "prims", "micromix")
    return is_known and not any(name in target.name() for name in ("as_strided", "resize", "set_"))


def _call(op: Any, *args: Any) -> Any:
    return lowerings[op](*args)


def _as_e4m3(node: Any) -> Any:
    return _call(torch.ops.aten.view.dtype, node, torch.float8_e4m3fn)


def _operand(node: Any) -> Any:
    """A part of a weight in memory; what is empty is never read."""
    return node if 0 in node.get_size() else contiguous(node)

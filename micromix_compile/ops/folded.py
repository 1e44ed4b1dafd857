"""The operations of the folded path (see `folding`): the pass `fold_products` puts them in the place of exact ones.

    micromix::reorder_fold(x, channel_perm, k4, k6, k8, fp6, scale_rounding, activations, rotated, w_fp4)
        -> (q, row_scale, locks)
    micromix::rms_norm_reorder_fold(x, weight, eps, channel_perm, ...) -> (q, row_scale, locks)
    micromix::add_rms_norm_reorder_fold(x, residual, weight, eps, channel_perm, ...)
        -> (x + residual, q, row_scale, locks)
    micromix::silu_mul_reorder_fold(gate, up, channel_perm, ...) -> (q, row_scale, locks)
    micromix::folded_mm(q, row_scale, locks, w4[], w6[], w8[], w_factor[], w_row_scale[], bias[], expanded[], fp6,
        out_dtype) -> (M, N)[]

channel_perm holds every channel of x. The lists have an entry for each weight that reads the activation; `bias` may
be empty, and so may `expanded`, the weights as E4M3 (`folding.fold_weight`), which many rows are multiplied by. `locks`
is scratch memory: zeros before a product and after it. The device's target computes them: plain PyTorch where it has
nothing better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.packages import check_package
from micromix_compile.numerics import checks
from micromix_compile.numerics.folding import LOCKS, FoldedActivation, factor_shape, fold_width
from micromix_compile.numerics.layout import packed_shapes, split_of_weight
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.kernels import FoldedWeight, Residual
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

Folded = tuple[Tensor, Tensor, Tensor]

_LAYOUT_ARGS = (
    "Tensor channel_perm, int k4, int k6, int k8, str fp6, str scale_rounding, str activations, int rotated, bool w_fp4"
)
_FOLDED = "(Tensor q, Tensor row_scale, Tensor locks)"

_lib = torch.library.Library("micromix", "FRAGMENT")
_lib.define(f"reorder_fold(Tensor x, {_LAYOUT_ARGS}) -> {_FOLDED}")
_lib.define(f"rms_norm_reorder_fold(Tensor x, Tensor weight, float eps, {_LAYOUT_ARGS}) -> {_FOLDED}")
_lib.define(
    f"add_rms_norm_reorder_fold(Tensor x, Tensor residual, Tensor weight, float eps, {_LAYOUT_ARGS}) -> "
    "(Tensor total, Tensor q, Tensor row_scale, Tensor locks)"
)
_lib.define(f"silu_mul_reorder_fold(Tensor gate, Tensor up, {_LAYOUT_ARGS}) -> {_FOLDED}")
_lib.define(
    "folded_mm(Tensor q, Tensor row_scale, Tensor locks, Tensor[] w4, Tensor[] w6, Tensor[] w8, Tensor[] w_factor, "
    "Tensor[] w_row_scale, Tensor[] bias, Tensor[] expanded, str fp6, ScalarType out_dtype) -> Tensor[]"
)

reorder_fold: Callable[..., Folded] = torch.ops.micromix.reorder_fold.default
rms_norm_reorder_fold: Callable[..., Folded] = torch.ops.micromix.rms_norm_reorder_fold.default
add_rms_norm_reorder_fold: Callable[..., tuple[Tensor, ...]] = torch.ops.micromix.add_rms_norm_reorder_fold.default
silu_mul_reorder_fold: Callable[..., Folded] = torch.ops.micromix.silu_mul_reorder_fold.default
folded_mm: Callable[..., list[Tensor]] = torch.ops.micromix.folded_mm.default


def _fold(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, k4: int, k6: int, k8: int,
    fp6: str, scale_rounding: str, activations: str, rotated: int, w_fp4: bool, *, residual: Residual | None = None,
) -> Folded:  # fmt: skip
    return target_of(x.device).folded.quantize(
        producer, x, other, eps, channel_perm, (k4, k6, k8), fp6, scale_rounding, w_fp4=w_fp4, residual=residual,
        activations=activations, rotated=rotated,
    )  # fmt: skip


def _reorder_fold(x: Tensor, *layout: Any) -> Folded:
    return _fold("none", x, None, 0.0, *layout)


def _rms_norm_reorder_fold(x: Tensor, weight: Tensor, eps: float, *layout: Any) -> Folded:
    return _fold("rms_norm", x, weight, eps, *layout)


def _add_rms_norm_reorder_fold(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *layout: Any
) -> tuple[Tensor, ...]:
    checks.check_residual(x, residual)
    added = Residual(residual, x.new_empty(x.shape))
    folded = _fold("rms_norm", x, weight, eps, *layout, residual=added)
    return added.total, *folded


def _silu_mul_reorder_fold(gate: Tensor, up: Tensor, *layout: Any) -> Folded:
    return _fold("silu_mul", gate, up, 0.0, *layout)


def _folded_mm(
    q: Tensor, row_scale: Tensor, locks: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor],
    w_factor: list[Tensor], w_row_scale: list[Tensor], bias: list[Tensor], expanded: list[Tensor], fp6: str,
    out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    kernels, x = target_of(q.device).folded, FoldedActivation(q, row_scale, locks)
    parts = (*w4, *w6, *w8, *w_factor, *w_row_scale, *bias)
    products = kernels.multiply_again(x, parts, fp6, out_dtype, has_expanded=bool(expanded))
    if products is None:
        _check_folded_mm(q, row_scale, w4, w6, w8, w_factor, w_row_scale, bias, expanded)
        weights = [*map(FoldedWeight, w4, w6, w8, w_factor, w_row_scale, bias or [None] * len(w4))]  # type: ignore[list-item]
        products = kernels.multiply(x, weights, fp6, out_dtype, expanded=expanded)
    return products


def _check_folded_mm(
    q: Tensor, row_scale: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor], w_factor: list[Tensor],
    w_row_scale: list[Tensor], bias: list[Tensor], expanded: list[Tensor],
) -> None:  # fmt: skip
    """Raise ValueError unless the operands fit each other; only shapes are read."""
    if not 1 <= len(w4) <= MAX_GROUP or len(bias) not in (0, len(w4)):
        raise ValueError(f"w4 must list 1 to {MAX_GROUP} weights, bias as many or none, got {len(w4)} and {len(bias)}")
    if len(expanded) not in (0, len(w4)):
        raise ValueError(f"expanded must list as many weights as w4, {len(w4)}, or none, got {len(expanded)}")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {"row_scale": (row_scale, (q.shape[0],))}
    first = split_of_weight(w4[0], w6[0], w8[0])
    for i, parts in enumerate(zip(w4, w6, w8, w_factor, w_row_scale, strict=True)):
        columns, split = parts[0].shape[0], split_of_weight(*parts[:3])
        if split != first:
            raise ValueError(f"all weights must be split like the first, {first}, weight {i} is split {split}")
        width = fold_width(split, w_fp4=False)
        if width != q.shape[1]:
            raise ValueError(f"weight {i} takes rows of {width} bytes, q has {q.shape[1]}")
        expected = (*packed_shapes(columns, split)[1:3], factor_shape(columns, split), (columns,))
        for name, part, shape in zip(("w6", "w8", "w_factor", "w_row_scale"), parts[1:], expected, strict=True):
            shapes[f"{name}[{i}]"] = (part, shape)
        if bias:
            shapes[f"bias[{i}]"] = (bias[i], (columns,))
        if expanded:
            shapes[f"expanded[{i}]"] = (expanded[i], (columns, width))
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _fake_fold(x: Tensor, *layout: object) -> Folded:
    channel_perm, k4, k6, k8, *names, w_fp4 = layout
    split = (k4, k6, k8)
    checks.check_reorder_quantize(x, channel_perm, split, *names)  # type: ignore[arg-type]
    return (
        x.new_empty((x.shape[0], fold_width(split, w_fp4=bool(w_fp4))), dtype=torch.uint8),  # type: ignore[arg-type]
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(LOCKS, dtype=torch.int32),
    )


def _fake_rms_norm_fold(x: Tensor, weight: Tensor, eps: float, *layout: object) -> Folded:
    checks.check_norm_weight(x, weight)
    return _fake_fold(x, *layout)


def _fake_add_rms_norm_fold(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *layout: object
) -> tuple[Tensor, ...]:
    checks.check_residual(x, residual)
    return x.new_empty(x.shape), *_fake_rms_norm_fold(x, weight, eps, *layout)


def _fake_silu_mul_fold(gate: Tensor, up: Tensor, *layout: object) -> Folded:
    checks.check_gate_and_up(gate, up)
    return _fake_fold(gate, *layout)


def _fake_folded_mm(
    q: Tensor, row_scale: Tensor, locks: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor],
    w_factor: list[Tensor], w_row_scale: list[Tensor], bias: list[Tensor], expanded: list[Tensor], fp6: str,
    out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    check_package()
    _check_folded_mm(q, row_scale, w4, w6, w8, w_factor, w_row_scale, bias, expanded)
    return [q.new_empty((q.shape[0], w.shape[0]), dtype=out_dtype) for w in w4]


for _name, _kernel, _fake in (
    ("reorder_fold", _reorder_fold, _fake_fold),
    ("rms_norm_reorder_fold", _rms_norm_reorder_fold, _fake_rms_norm_fold),
    ("add_rms_norm_reorder_fold", _add_rms_norm_reorder_fold, _fake_add_rms_norm_fold),
    ("silu_mul_reorder_fold", _silu_mul_reorder_fold, _fake_silu_mul_fold),
    ("folded_mm", _folded_mm, _fake_folded_mm),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"micromix::{_name}", _fake, lib=_lib)

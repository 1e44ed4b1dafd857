"""The operations of the folded path (see `folding`), which `passes.fold_products` puts in the place of those in `ops`.

    micromix::reorder_fold(x, channel_perm, k4, k6, k8, fp6, scale_rounding, w_fp4) -> (q, row_scale, locks)
    micromix::rms_norm_reorder_fold(x, weight, eps, channel_perm, ...)              -> (q, row_scale, locks)
    micromix::add_rms_norm_reorder_fold(x, residual, weight, eps, channel_perm, ...)
        -> (x + residual, q, row_scale, locks)
    micromix::silu_mul_reorder_fold(gate, up, channel_perm, ...)                    -> (q, row_scale, locks)
    micromix::folded_mm(q, row_scale, locks, w4[], w6[], w8[], w_factor[], w_row_scale[], bias[], fp6, out_dtype)
        -> (M, N)[]

channel_perm holds every channel of x. The lists have an entry for each weight that reads the activation; `bias` may
be empty. `locks` is scratch memory: zeros before a product and after it. On a GPU without FP8 MMA, or a CPU, they are
plain PyTorch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from micromix_compile.numerics import folding, reference
from micromix_compile.numerics.folding import LOCKS, FoldedActivation, factor_shape, fold_width
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.ops import exact
from micromix_compile.targets import gpu, gpu_folded, target
from micromix_compile.targets.gpu_folded import MAX_GROUP, FoldedWeight, Residual

if TYPE_CHECKING:
    from collections.abc import Callable

Folded = tuple[Tensor, Tensor, Tensor]
_Made = TypeVar("_Made", bound="tuple[Tensor, ...]")
_Value = TypeVar("_Value")

_LAYOUT_ARGS = "Tensor channel_perm, int k4, int k6, int k8, str fp6, str scale_rounding, bool w_fp4"
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
    "Tensor[] w_row_scale, Tensor[] bias, str fp6, ScalarType out_dtype) -> Tensor[]"
)

reorder_fold: Callable[..., Folded] = torch.ops.micromix.reorder_fold.default
rms_norm_reorder_fold: Callable[..., Folded] = torch.ops.micromix.rms_norm_reorder_fold.default
add_rms_norm_reorder_fold: Callable[..., tuple[Tensor, ...]] = torch.ops.micromix.add_rms_norm_reorder_fold.default
silu_mul_reorder_fold: Callable[..., Folded] = torch.ops.micromix.silu_mul_reorder_fold.default
folded_mm: Callable[..., list[Tensor]] = torch.ops.micromix.folded_mm.default


def runs_folded(x: Tensor) -> bool:
    """Whether the folded kernels are those of x's device."""
    family = target.triton_family(x)
    return family is not None and family.folds


def _fold(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, k4: int, k6: int, k8: int,
    fp6: str, scale_rounding: str, w_fp4: bool,
) -> Folded:  # fmt: skip
    split = (k4, k6, k8)
    if runs_folded(x):
        return gpu_folded.reorder_fold(
            producer, x, other, eps, channel_perm, split, fp6, scale_rounding, w_fp4=w_fp4
        )  # fmt: skip
    if producer == "rms_norm":
        assert other is not None, "a norm has a weight"
        x = exact.rms_norm(x, other, eps)
    elif producer == "silu_mul":
        assert other is not None, "a gate has an up"
        x = torch.nn.functional.silu(x) * other
    rounding = ScaleRounding(scale_rounding)
    quantized = reference.reorder_quantize(x, channel_perm, split, fp6=fp6, scale_rounding=rounding)
    return folding.fold_activation(quantized, _amax(x), w_fp4=w_fp4)


def _amax(x: Tensor) -> Tensor:
    return x.abs().amax(1).float() if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float32)


def _reorder_fold(x: Tensor, *layout: object) -> Folded:
    return _fold("none", x, None, 0.0, *layout)  # type: ignore[arg-type]


def _rms_norm_reorder_fold(x: Tensor, weight: Tensor, eps: float, *layout: object) -> Folded:
    reference.check_norm_weight(x, weight)
    return _fold("rms_norm", x, weight, eps, *layout)  # type: ignore[arg-type]


def _add_rms_norm_reorder_fold(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *layout: Any
) -> tuple[Tensor, ...]:
    reference.check_residual(x, residual)
    reference.check_norm_weight(x, weight)
    if not runs_folded(x):
        total = x + residual
        return total, *_fold("rms_norm", total, weight, eps, *layout)
    added = Residual(gpu.unit_column_stride(residual), x.new_empty(x.shape))
    perm, k4, k6, k8, fp6, scale_rounding, w_fp4 = layout
    folded = gpu_folded.reorder_fold(
        "rms_norm", x, weight, eps, perm, (k4, k6, k8), fp6, scale_rounding, w_fp4=w_fp4, residual=added
    )
    return added.total, *folded


def _silu_mul_reorder_fold(gate: Tensor, up: Tensor, *layout: object) -> Folded:
    reference.check_gate_and_up(gate, up)
    return _fold("silu_mul", gate, up, 0.0, *layout)  # type: ignore[arg-type]


def _folded_mm(
    q: Tensor, row_scale: Tensor, locks: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor],
    w_factor: list[Tensor], w_row_scale: list[Tensor], bias: list[Tensor], fp6: str, out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    _check_folded_mm(q, row_scale, w4, w6, w8, w_factor, w_row_scale, bias)
    biases: list[Tensor | None] = [*bias] or [None] * len(w4)
    if runs_folded(q):
        fields = zip(w4, w6, w8, w_factor, w_row_scale, biases, strict=True)
        weights = [FoldedWeight(*(None if t is None else t.contiguous() for t in one)) for one in fields]  # type: ignore[arg-type]
        x = FoldedActivation(q.contiguous(), row_scale.contiguous(), locks)
        return gpu_folded.folded_mm(x, weights, fp6=fp6, out_dtype=out_dtype)
    folded = [folding.fold_weight(*one, fp6) for one in zip(w4, w6, w8, w_factor, strict=True)]
    return folding.folded_mm(q, row_scale, list(zip(folded, w_row_scale, strict=True)), biases, out_dtype)


def _check_folded_mm(
    q: Tensor, row_scale: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor], w_factor: list[Tensor],
    w_row_scale: list[Tensor], bias: list[Tensor],
) -> None:  # fmt: skip
    """Raise ValueError unless the operands fit each other; only shapes are read."""
    if not 1 <= len(w4) <= MAX_GROUP or len(bias) not in (0, len(w4)):
        raise ValueError(f"w4 must list 1 to {MAX_GROUP} weights, bias as many or none, got {len(w4)} and {len(bias)}")
    shapes: dict[str, tuple[Tensor, tuple[int, ...]]] = {"row_scale": (row_scale, (q.shape[0],))}
    first = (2 * w4[0].shape[1], 4 * w6[0].shape[2], w8[0].shape[1])
    for i, parts in enumerate(zip(w4, w6, w8, w_factor, w_row_scale, strict=True)):
        columns, split = parts[0].shape[0], (2 * parts[0].shape[1], 4 * parts[1].shape[2], parts[2].shape[1])
        if split != first:
            raise ValueError(f"all weights must be split like the first, {first}, weight {i} is split {split}")
        width = fold_width(split, w_fp4=False)
        if width != q.shape[1]:
            raise ValueError(f"weight {i} takes rows of {width} bytes, q has {q.shape[1]}")
        expected = ((3, columns, split[1] // 4), (columns, split[2]), factor_shape(columns, split), (columns,))
        for name, part, shape in zip(("w6", "w8", "w_factor", "w_row_scale"), parts[1:], expected, strict=True):
            shapes[f"{name}[{i}]"] = (part, shape)
        if bias:
            shapes[f"bias[{i}]"] = (bias[i], (columns,))
    for name, (tensor, shape) in shapes.items():
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensor.shape)}")


def _fake_fold(x: Tensor, *layout: object) -> Folded:
    channel_perm, k4, k6, k8, fp6, scale_rounding, w_fp4 = layout
    split = (k4, k6, k8)
    reference.check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding)  # type: ignore[arg-type]
    return (
        x.new_empty((x.shape[0], fold_width(split, w_fp4=bool(w_fp4))), dtype=torch.uint8),  # type: ignore[arg-type]
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(LOCKS, dtype=torch.int32),
    )


def _fake_rms_norm_fold(x: Tensor, weight: Tensor, eps: float, *layout: object) -> Folded:
    reference.check_norm_weight(x, weight)
    return _fake_fold(x, *layout)


def _fake_add_rms_norm_fold(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, *layout: object
) -> tuple[Tensor, ...]:
    reference.check_residual(x, residual)
    return x.new_empty(x.shape), *_fake_rms_norm_fold(x, weight, eps, *layout)


def _fake_silu_mul_fold(gate: Tensor, up: Tensor, *layout: object) -> Folded:
    reference.check_gate_and_up(gate, up)
    return _fake_fold(gate, *layout)


def _fake_folded_mm(
    q: Tensor, row_scale: Tensor, locks: Tensor, w4: list[Tensor], w6: list[Tensor], w8: list[Tensor],
    w_factor: list[Tensor], w_row_scale: list[Tensor], bias: list[Tensor], fp6: str, out_dtype: torch.dtype,
) -> list[Tensor]:  # fmt: skip
    _check_folded_mm(q, row_scale, w4, w6, w8, w_factor, w_row_scale, bias)
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

"""The products of experts: rows of one quantized activation with the weights that they were routed to; and their sum.

    micromix::grouped_mx_mm(x4, x6, x8, x_scale, rows, offs, w4, w6, w8, w_scale, bias, fp6, out_dtype) -> (R, N)
    micromix::grouped_folded_mm(q, row_scale, rows, offs, w4, w6, w8, w_factor, w_row_scale, bias, fp6, out_dtype)
        -> (R, N)
    micromix::grouped_input_gradient(grad, rows, offs, w4, w6, w8, w_scale, channel_perm, tokens, channels, fp6,
        rotated) -> (T, C)
    micromix::weighted_sum(rows, weights, place, out_dtype) -> (T, N)

The activation is what `reorder_quantize` or `reorder_fold` made of all T tokens of a layer, once. rows: (R,) int32,
which of them each output row reads. offs: (E,) int32, where each expert's output rows end; rows behind the last are
zeros. Weights have a leading dimension of experts: w4 (E, N, k4 // 2), w6 (E, 3, N, k6 // 4), w8 (E, N, k8), w_scale
(E, N, K // 32), w_factor (E, *factor_shape), w_row_scale (E, N), bias (E, N) or None. The device's target computes
them: plain PyTorch, which waits for `offs`, where it has nothing better. The gradient with respect to the T tokens, of
dequantized weights, is plain PyTorch everywhere. The sum, of which `numerics.grouped.weighted_sum` says what it is, is
what a graph pass makes of a model's own; it has no gradient.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.packages import check_package
from micromix_compile.numerics.grouped import (
    check_grouped_folded_mm,
    check_grouped_mx_mm,
    check_weighted_sum,
    expert_of,
    runs_of,
)
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.ops.exact import dequantize_weight
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

_lib = torch.library.Library("micromix", "FRAGMENT")
_lib.define(
    "grouped_mx_mm(Tensor x4, Tensor x6, Tensor x8, Tensor x_scale, Tensor rows, Tensor offs, Tensor w4, Tensor w6, "
    "Tensor w8, Tensor w_scale, Tensor? bias, str fp6, ScalarType out_dtype) -> Tensor"
)
_lib.define(
    "grouped_folded_mm(Tensor q, Tensor row_scale, Tensor rows, Tensor offs, Tensor w4, Tensor w6, Tensor w8, "
    "Tensor w_factor, Tensor w_row_scale, Tensor? bias, str fp6, ScalarType out_dtype) -> Tensor"
)
_lib.define(
    "grouped_input_gradient(Tensor grad, Tensor rows, Tensor offs, Tensor w4, Tensor w6, Tensor w8, Tensor w_scale, "
    "Tensor channel_perm, SymInt tokens, SymInt channels, str fp6, int rotated) -> Tensor"
)
_lib.define("weighted_sum(Tensor rows, Tensor weights, Tensor place, ScalarType out_dtype) -> Tensor")

grouped_mx_mm: Callable[..., Tensor] = torch.ops.micromix.grouped_mx_mm.default
grouped_folded_mm: Callable[..., Tensor] = torch.ops.micromix.grouped_folded_mm.default

grouped_input_gradient: Callable[..., Tensor] = torch.ops.micromix.grouped_input_gradient.default
weighted_sum: Callable[..., Tensor] = torch.ops.micromix.weighted_sum.default


def _grouped_mx_mm(
    x4: Tensor, x6: Tensor, x8: Tensor, x_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor,
    w_scale: Tensor, bias: Tensor | None, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x, w = QuantizedActivation(x4, x6, x8, x_scale), PackedWeight(w4, w6, w8, w_scale)
    return target_of(x_scale.device).grouped.multiply(x, rows, offs, w, bias, fp6, out_dtype)


def _grouped_folded_mm(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_factor: Tensor,
    w_row_scale: Tensor, bias: Tensor | None, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    w = FoldedWeight(w4, w6, w8, w_factor, w_row_scale, bias)
    return target_of(q.device).grouped.multiply_folded(q, row_scale, rows, offs, w, fp6, out_dtype)


def _fake_grouped_mx_mm(
    x4: Tensor, x6: Tensor, x8: Tensor, x_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor,
    w_scale: Tensor, bias: Tensor | None, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_package()
    x, w = QuantizedActivation(x4, x6, x8, x_scale), PackedWeight(w4, w6, w8, w_scale)
    check_grouped_mx_mm(x, rows, offs, w, bias, fp6)
    return x_scale.new_empty((rows.shape[0], w4.shape[1]), dtype=out_dtype)


def _fake_grouped_folded_mm(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_factor: Tensor,
    w_row_scale: Tensor, bias: Tensor | None, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_package()
    check_grouped_folded_mm(q, row_scale, rows, offs, w4, w6, w8, w_factor, w_row_scale, bias)
    return q.new_empty((rows.shape[0], w4.shape[1]), dtype=out_dtype)


def _grouped_input_gradient(
    grad: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor,
    tokens: int, channels: int, fp6: str, rotated: int,
) -> Tensor:  # fmt: skip
    out = grad.new_zeros((tokens, channels), dtype=torch.float32)
    w = PackedWeight(w4, w6, w8, w_scale)
    for expert, run in enumerate(runs_of(rows, offs)):
        weight = dequantize_weight(*expert_of(w, expert), channel_perm, channels, fp6, rotated, grad.dtype)
        out.index_add_(0, rows[run], (grad[run] @ weight).to(torch.float32))
    return out.to(grad.dtype)


def _fake_grouped_input_gradient(
    grad: Tensor, rows: Tensor, offs: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor,
    tokens: int, channels: int, fp6: str, rotated: int,
) -> Tensor:  # fmt: skip
    return grad.new_empty((tokens, channels))


def _weighted_sum(rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
    return target_of(rows.device).grouped.weighted_sum(rows, weights, place, out_dtype)


def _fake_weighted_sum(rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
    check_package()
    check_weighted_sum(rows, weights, place, out_dtype)
    return rows.new_empty((place.shape[0], rows.shape[1]), dtype=out_dtype)


for _name, _kernel, _fake in (
    ("grouped_mx_mm", _grouped_mx_mm, _fake_grouped_mx_mm),
    ("grouped_folded_mm", _grouped_folded_mm, _fake_grouped_folded_mm),
    ("grouped_input_gradient", _grouped_input_gradient, _fake_grouped_input_gradient),
    ("weighted_sum", _weighted_sum, _fake_weighted_sum),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"micromix::{_name}", _fake, lib=_lib)

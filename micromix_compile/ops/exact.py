"""The operations that every path meets at, as `torch.library` ops.

    micromix::reorder_quantize(x, channel_perm, k4, k6, k8, fp6, scale_rounding, activations, rotated)
        -> (q4, q6, q8, scale)
    micromix::rms_norm_reorder_quantize(x, weight, eps, channel_perm, ...) -> (q4, q6, q8, scale)
    micromix::silu_mul_reorder_quantize(gate, up, channel_perm, ...)       -> (q4, q6, q8, scale)
    micromix::mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6, out_dtype) -> (M, N)
    micromix::dequantize_weight(w4, w6, w8, w_scale, channel_perm, channels, fp6, rotated, dtype) -> (N, C)

(k4, k6, k8) is the split of the weights, unless these are all MXFP4; `activations` says what becomes of it. Layouts are
in `packing`, arithmetic in `reference`. Here each op gets its schema, its shapes for tracing, and an
implementation for any device, which leaves the work to the device's target. On a CPU the first call loads compiled
kernels, which the dispatcher then calls itself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.packages import check_package
from micromix_compile.numerics import checks, reference, rotation
from micromix_compile.numerics.layout import PackedWeight, activation_shapes, activation_split
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]

_LAYOUT_ARGS = "Tensor channel_perm, int k4, int k6, int k8, str fp6, str scale_rounding, str activations, int rotated"
_QUANTIZED = "(Tensor q4, Tensor q6, Tensor q8, Tensor scale)"

_lib = torch.library.Library("micromix", "DEF")
_lib.define(f"reorder_quantize(Tensor x, {_LAYOUT_ARGS}) -> {_QUANTIZED}")
_lib.define(f"rms_norm_reorder_quantize(Tensor x, Tensor weight, float eps, {_LAYOUT_ARGS}) -> {_QUANTIZED}")
_lib.define(f"silu_mul_reorder_quantize(Tensor gate, Tensor up, {_LAYOUT_ARGS}) -> {_QUANTIZED}")
_lib.define(
    "mixed_mx_mm(Tensor x4, Tensor x6, Tensor x8, Tensor x_scale, Tensor w4, Tensor w6, Tensor w8, Tensor w_scale, "
    "Tensor? bias, str fp6, ScalarType out_dtype) -> Tensor"
)
_lib.define(
    "dequantize_weight(Tensor w4, Tensor w6, Tensor w8, Tensor w_scale, Tensor channel_perm, SymInt channels, str fp6, "
    "int rotated, ScalarType dtype) -> Tensor"
)

reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.reorder_quantize.default
rms_norm_reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.rms_norm_reorder_quantize.default
silu_mul_reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.silu_mul_reorder_quantize.default
mixed_mx_mm: Callable[..., Tensor] = torch.ops.micromix.mixed_mx_mm.default
dequantize_weight: Callable[..., Tensor] = torch.ops.micromix.dequantize_weight.default


def _quantize(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, k4: int, k6: int, k8: int,
    fp6: str, scale_rounding: str, activations: str, rotated: int,
) -> Quantized:  # fmt: skip
    return target_of(x.device).exact.quantize(
        producer, x, other, eps, channel_perm, (k4, k6, k8), fp6, scale_rounding, activations=activations,
        rotated=rotated,
    )  # fmt: skip


def _reorder_quantize(x: Tensor, *layout: Any) -> Quantized:
    return _quantize("none", x, None, 0.0, *layout)


def _rms_norm_reorder_quantize(x: Tensor, weight: Tensor, eps: float, *layout: Any) -> Quantized:
    return _quantize("rms_norm", x, weight, eps, *layout)


def _silu_mul_reorder_quantize(gate: Tensor, up: Tensor, *layout: Any) -> Quantized:
    return _quantize("silu_mul", gate, up, 0.0, *layout)


def _mixed_mx_mm(
    x4: Tensor, x6: Tensor, x8: Tensor, x_scale: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor,
    bias: Tensor | None, fp6: str, out_dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    x, w = QuantizedActivation(x4, x6, x8, x_scale), PackedWeight(w4, w6, w8, w_scale)
    return target_of(x_scale.device).exact.multiply(x, w, bias, fp6, out_dtype)


def _dequantize_weight(
    w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor, channels: int, fp6: str,
    rotated: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    values = reference.dequantize_weight(w4, w6, w8, w_scale, fp6)
    values = (rotation.unrotate_weight(values, rotated) if rotated else values).to(dtype)
    place = channel_perm.to(torch.int64)
    place = torch.where(place < 0, channels, place)  # padding goes behind the last channel
    out = values.new_zeros(values.shape[0], channels + 1).index_copy_(1, place, values)
    return out[:, :channels].contiguous()


def _fake_reorder_quantize(
    x: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str, activations: str,
    rotated: int,
) -> Quantized:  # fmt: skip
    checks.check_reorder_quantize(x, channel_perm, (k4, k6, k8), fp6, scale_rounding, activations, rotated)
    shapes = activation_shapes(x.shape[0], activation_split((k4, k6, k8), activations))
    q4, q6, q8, scale = (x.new_empty(shape, dtype=torch.uint8) for shape in shapes)
    return q4, q6, q8, scale


def _fake_rms_norm_reorder_quantize(x: Tensor, weight: Tensor, eps: float, *layout: object) -> Quantized:
    checks.check_norm_weight(x, weight)
    return _fake_reorder_quantize(x, *layout)  # type: ignore[arg-type]


def _fake_silu_mul_reorder_quantize(gate: Tensor, up: Tensor, *layout: object) -> Quantized:
    checks.check_gate_and_up(gate, up)
    return _fake_reorder_quantize(gate, *layout)  # type: ignore[arg-type]


def _fake_mixed_mx_mm(
    x4: Tensor,
    x6: Tensor,
    x8: Tensor,
    x_scale: Tensor,
    w4: Tensor,
    w6: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    fp6: str,
    out_dtype: torch.dtype,
) -> Tensor:
    check_package()
    checks.check_mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6)
    return x_scale.new_empty((x_scale.shape[0], w_scale.shape[0]), dtype=out_dtype)


def _fake_dequantize_weight(
    w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor, channels: int, fp6: str,
    rotated: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    check_package()
    checks.check_rotated(rotated, channel_perm.shape[0])
    return w_scale.new_empty((w_scale.shape[0], channels), dtype=dtype)


for _name, _kernel, _fake in (
    ("reorder_quantize", _reorder_quantize, _fake_reorder_quantize),
    ("rms_norm_reorder_quantize", _rms_norm_reorder_quantize, _fake_rms_norm_reorder_quantize),
    ("silu_mul_reorder_quantize", _silu_mul_reorder_quantize, _fake_silu_mul_reorder_quantize),
    ("mixed_mx_mm", _mixed_mx_mm, _fake_mixed_mx_mm),
    ("dequantize_weight", _dequantize_weight, _fake_dequantize_weight),
):
    _lib.impl(_name, _kernel, "CompositeExplicitAutograd")
    torch.library.register_fake(f"micromix::{_name}", _fake, lib=_lib)

"""The operations that every path meets at, as `torch.library` ops.

    micromix::reorder_quantize(x, channel_perm, k4, k6, k8, fp6, scale_rounding) -> (q4, q6, q8, scale)
    micromix::rms_norm_reorder_quantize(x, weight, eps, channel_perm, ...)       -> (q4, q6, q8, scale)
    micromix::silu_mul_reorder_quantize(gate, up, channel_perm, ...)             -> (q4, q6, q8, scale)
    micromix::mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6, out_dtype) -> (M, N)
    micromix::dequantize_weight(w4, w6, w8, w_scale, channel_perm, channels, fp6, dtype)  -> (N, C)

Layouts are in `packing`, arithmetic in `reference`. Here each op gets its schema, its shapes for tracing, and its plain
PyTorch implementation for any device. On a CPU the first call loads `native`, whose kernels then take the ops over; on
a GPU `gpu` launches Triton kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.numerics import reference
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets import gpu, native, target

if TYPE_CHECKING:
    from collections.abc import Callable

Quantized = tuple[Tensor, Tensor, Tensor, Tensor]

_LAYOUT_ARGS = "Tensor channel_perm, int k4, int k6, int k8, str fp6, str scale_rounding"
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
    "ScalarType dtype) -> Tensor"
)

reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.reorder_quantize.default
rms_norm_reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.rms_norm_reorder_quantize.default
silu_mul_reorder_quantize: Callable[..., Quantized] = torch.ops.micromix.silu_mul_reorder_quantize.default
mixed_mx_mm: Callable[..., Tensor] = torch.ops.micromix.mixed_mx_mm.default
dequantize_weight: Callable[..., Tensor] = torch.ops.micromix.dequantize_weight.default


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Hugging Face models write it: normalized in float32, rounded to x's dtype, then times weight.

    x: (M, C) and weight: (C,), each float32, bfloat16 or float16. Returns (M, C), of x's dtype if weight has it, too.
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def _reorder_quantize(
    x: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str
) -> Quantized:
    if native.takes_over(x):
        return reorder_quantize(x, channel_perm, k4, k6, k8, fp6, scale_rounding)
    if target.triton_family(x):
        return gpu.reorder_quantize(x, channel_perm, k4, k6, k8, fp6, scale_rounding)
    rounding = ScaleRounding(scale_rounding)
    return reference.reorder_quantize(x, channel_perm, (k4, k6, k8), fp6=fp6, scale_rounding=rounding)


def _rms_norm_reorder_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    channel_perm: Tensor,
    k4: int,
    k6: int,
    k8: int,
    fp6: str,
    scale_rounding: str,
) -> Quantized:
    if native.takes_over(x):
        return rms_norm_reorder_quantize(x, weight, eps, channel_perm, k4, k6, k8, fp6, scale_rounding)
    if target.triton_family(x):
        return gpu.rms_norm_reorder_quantize(x, weight, eps, channel_perm, k4, k6, k8, fp6, scale_rounding)
    return _reorder_quantize(rms_norm(x, weight, eps), channel_perm, k4, k6, k8, fp6, scale_rounding)


def _silu_mul_reorder_quantize(
    gate: Tensor, up: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str
) -> Quantized:
    if target.triton_family(gate):
        return gpu.silu_mul_reorder_quantize(gate, up, channel_perm, k4, k6, k8, fp6, scale_rounding)
    product = torch.nn.functional.silu(gate) * up
    return reorder_quantize(product, channel_perm, k4, k6, k8, fp6, scale_rounding)


def _mixed_mx_mm(
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
    if native.takes_over(x_scale):
        return mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6, out_dtype)
    family = target.triton_family(x_scale)
    if family:
        return gpu.mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6, out_dtype, family)
    x = QuantizedActivation(x4, x6, x8, x_scale)
    return reference.mixed_mx_mm(x, w4, w6, w8, w_scale, bias, fp6=fp6, out_dtype=out_dtype)


def _dequantize_weight(
    w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor, channels: int, fp6: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    values = reference.dequantize_weight(w4, w6, w8, w_scale, fp6).to(dtype)
    place = channel_perm.to(torch.int64)
    place = torch.where(place < 0, channels, place)  # padding goes behind the last channel
    out = values.new_zeros(values.shape[0], channels + 1).index_copy_(1, place, values)
    return out[:, :channels].contiguous()


def _fake_reorder_quantize(
    x: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str
) -> Quantized:
    reference.check_reorder_quantize(x, channel_perm, (k4, k6, k8), fp6, scale_rounding)
    rows = x.shape[0]
    widths = (k4 // 2, k6, k8, (k4 + k6 + k8) // BLOCK_SIZE)
    q4, q6, q8, scale = (x.new_empty((rows, width), dtype=torch.uint8) for width in widths)
    return q4, q6, q8, scale


def _fake_rms_norm_reorder_quantize(x: Tensor, weight: Tensor, eps: float, *layout: object) -> Quantized:
    reference.check_norm_weight(x, weight)
    return _fake_reorder_quantize(x, *layout)  # type: ignore[arg-type]


def _fake_silu_mul_reorder_quantize(gate: Tensor, up: Tensor, *layout: object) -> Quantized:
    reference.check_gate_and_up(gate, up)
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
    reference.check_mixed_mx_mm(x4, x6, x8, x_scale, w4, w6, w8, w_scale, bias, fp6)
    return x_scale.new_empty((x_scale.shape[0], w_scale.shape[0]), dtype=out_dtype)


def _fake_dequantize_weight(
    w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, channel_perm: Tensor, channels: int, fp6: str,
    dtype: torch.dtype,
) -> Tensor:  # fmt: skip
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

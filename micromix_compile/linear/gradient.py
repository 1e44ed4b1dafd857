"""The gradient of packed products with respect to their input and their bias, through the dequantized weight."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micromix_compile.numerics.layout import RowLayout

if TYPE_CHECKING:
    from collections.abc import Iterable


class PackedProduct(torch.autograd.Function):
    """x: (M, C) -> (M, N) of x's dtype, as `MicroMixLinear` computes it.

    Backward: grad_x = grad_y W, with W (N, C) the dequantized weight in grad_y's dtype; x's own rounding counts as the
    identity (straight-through). grad_bias = the sum of grad_y's rows. Packed weights have no gradient.
    """

    @staticmethod
    def forward(
        x: Tensor,
        bias: Tensor | None,
        channel_perm: Tensor,
        w4: Tensor,
        w6: Tensor,
        w8: Tensor,
        w_scale: Tensor,
        *layout: Any,
    ) -> Tensor:
        """As in an inference."""
        return _product(x, bias, channel_perm, (w4, w6, w8, w_scale), RowLayout(*layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the packed weight, neither x nor anything of its size."""
        x, bias, channel_perm, *weight = inputs[:7]
        ctx.save_for_backward(*weight, channel_perm)
        ctx.channels, ctx.layout = x.shape[1], RowLayout(*inputs[7:])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(grad_x (M, C), grad_bias (N,), None, ...)."""
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            layout = (ctx.layout.fp6, ctx.layout.rotated)
            weight = torch.ops.micromix.dequantize_weight(*ctx.saved_tensors, ctx.channels, *layout, grad.dtype)
            grad_x = grad @ weight
        if ctx.needs_input_grad[1]:
            grad_bias = grad.sum(0).to(ctx.bias_dtype)
        return grad_x, grad_bias, *[None] * (5 + len(ctx.layout))


class PackedGroupedProduct(torch.autograd.Function):
    """x: (T, C) -> (R, N) of x's dtype, as `MicroMixExperts` computes it.

    Backward: as of `PackedProduct`, summed over the output rows that read the same row of x; grad_bias (E, N).
    """

    @staticmethod
    def forward(
        x: Tensor, rows: Tensor, offs: Tensor, bias: Tensor | None, channel_perm: Tensor, w4: Tensor, w6: Tensor,
        w8: Tensor, w_scale: Tensor, *layout: Any,
    ) -> Tensor:  # fmt: skip
        """As in an inference."""
        return _grouped_product(x, rows, offs, bias, channel_perm, (w4, w6, w8, w_scale), RowLayout(*layout))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        """Keeps the packed weight and the routing, neither x nor anything of its size."""
        x, rows, offs, bias, channel_perm, *weight = inputs[:9]
        ctx.save_for_backward(rows, offs, *weight, channel_perm)
        ctx.shape, ctx.layout = x.shape, RowLayout(*inputs[9:])
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """(grad_x (T, C), None, None, grad_bias (E, N), None, ...)."""
        rows, offs, *packed = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            layout = (ctx.layout.fp6, ctx.layout.rotated)
            grad_x = torch.ops.micromix.grouped_input_gradient(grad, rows, offs, *packed, *ctx.shape, *layout)
        if ctx.needs_input_grad[3]:
            place = torch.arange(len(rows), dtype=offs.dtype, device=offs.device)
            expert = torch.searchsorted(offs, place, right=True)  # len(offs) behind the last
            sums = grad.new_zeros(len(offs) + 1, grad.shape[1]).index_add_(0, expert, grad)
            grad_bias = sums[:-1].to(ctx.bias_dtype)
        return grad_x, None, None, grad_bias, *[None] * (5 + len(ctx.layout))


def wants_gradients(values: Iterable[Any]) -> bool:
    """Whether autograd is to record what is computed from `values`."""
    return torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values)


def packed_product(
    x: Tensor, bias: Tensor | None, channel_perm: Tensor, weight: tuple[Tensor, ...], layout: RowLayout
) -> Tensor:
    """(M, C) -> (M, N) of x's dtype: one packed linear, with a gradient where one is asked for."""
    if not wants_gradients((x, bias)):
        return _product(x, bias, channel_perm, weight, layout)
    out: Tensor = PackedProduct.apply(x, bias, channel_perm, *weight, *layout)  # type: ignore[no-untyped-call]
    return out


def _product(
    x: Tensor, bias: Tensor | None, channel_perm: Tensor, weight: tuple[Tensor, ...], layout: RowLayout
) -> Tensor:
    quantized = torch.ops.micromix.reorder_quantize(x, channel_perm, *layout)
    out: Tensor = torch.ops.micromix.mixed_mx_mm(*quantized, *weight, bias, layout.fp6, x.dtype)
    return out


def grouped_product(
    x: Tensor, rows: Tensor, offs: Tensor, bias: Tensor | None, channel_perm: Tensor, weight: tuple[Tensor, ...],
    layout: RowLayout,
) -> Tensor:  # fmt: skip
    """(T, C) -> (R, N) of x's dtype: rows of x with packed experts, with a gradient where one is asked for."""
    if not wants_gradients((x, bias)):
        return _grouped_product(x, rows, offs, bias, channel_perm, weight, layout)
    args = (x, rows, offs, bias, channel_perm, *weight, *layout)
    out: Tensor = PackedGroupedProduct.apply(*args)  # type: ignore[no-untyped-call]
    return out


def _grouped_product(
    x: Tensor, rows: Tensor, offs: Tensor, bias: Tensor | None, channel_perm: Tensor, weight: tuple[Tensor, ...],
    layout: RowLayout,
) -> Tensor:  # fmt: skip
    quantized = torch.ops.micromix.reorder_quantize(x, channel_perm, *layout)
    out: Tensor = torch.ops.micromix.grouped_mx_mm(*quantized, rows, offs, *weight, bias, layout.fp6, x.dtype)
    return out

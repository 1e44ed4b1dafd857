"""The gradient of a packed linear with respect to its input and its bias, through the dequantized weight."""

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

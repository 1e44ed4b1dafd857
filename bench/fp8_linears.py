"""What ours is measured beside: FP8 with a scale a row, and the norms that stand before quantizers, compiled."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from linear_cases import BF16, E4M3
from torch import nn

from micromix_compile.lowering.torch_private.operators import scaled_mm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of E4M3 with a float32 scale each, as dynamic FP8 quantization does it."""
    scale = x.abs().amax(1, keepdim=True).float().clamp(min=1e-12) / 448.0
    return (x.float() / scale).clamp(-448.0, 448.0).to(E4M3), scale


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    """What stands before a quantizer."""
    return torch.nn.functional.rms_norm(x, (x.shape[1],), weight, 1e-5)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The residual stream, and what the quantizer behind it reads."""
    total = x + residual
    return total, rms_norm(total, weight)


compiled_fp8_quantize: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(fp8_quantize)
compiled_rms_norm: Callable[[Tensor, Tensor], Tensor] = torch.compile(rms_norm)
compiled_add_rms_norm: Callable[..., tuple[Tensor, Tensor]] = torch.compile(add_rms_norm)


def fp8_mm(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor | None) -> Tensor:
    """FP8 product with a scale a row on both sides. weight: (N, K)."""
    return scaled_mm(x, weight.T, scale_a=x_scale, scale_b=w_scale, bias=bias, out_dtype=BF16, use_fast_accum=True)


def fp8_bias(x: Tensor, x_scale: Tensor, weight: Tensor, w_scale: Tensor, bias: Tensor) -> Tensor | None:
    """The bias where the library adds one in its product; elsewhere FP8 is timed without, which flatters it."""
    try:
        fp8_mm(x, x_scale, weight, w_scale, bias)
    except RuntimeError as error:
        print(f"FP8 without bias at M = {len(x)}: {str(error).splitlines()[0][:60]}", file=sys.stderr)
        return None
    return bias


class Fp8Linear(nn.Module):
    """Rows of E4M3 with a float32 scale each, on both sides; activations are quantized when they come."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        q, scale = fp8_quantize(weight)
        self.register_buffer("weight", q)
        self.register_buffer("scale", scale.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N)."""
        q, scale = fp8_quantize(x.reshape(-1, x.shape[-1]))
        out = scaled_mm(q, self.weight.T, scale_a=scale, scale_b=self.scale, out_dtype=x.dtype, use_fast_accum=True)
        return out.reshape(*x.shape[:-1], -1)


def with_fp8_linears(model: nn.Module) -> nn.Module:
    """Every linear but the head replaced in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, Fp8Linear(module.weight))
    return model

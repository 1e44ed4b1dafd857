"""torchao's quantized linears for bench_gpu_linear.py, where torchao is installed (`pip install --no-deps torchao`).

FP8 with a scale a row is the same product as ours of that name; MX formats are emulated on a GPU without block-scaled
MMA: weights and activations are dequantized to bfloat16 at every call.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from linear_cases import Contender
from torch import nn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


def torchao_contenders() -> dict[str, Contender]:
    """torchao's by what they are called here; none, and why on standard error, where there is no such version.

    Without their settings of Inductor, which would change what the competitors' code is.
    """
    try:
        return {
            name: Contender(4 if name.endswith("4") else 8, partial(torchao_linear, config=config))
            for name, config in _configs().items()
        }
    except Exception as error:  # whatever a version's import or signature says
        print(f"torchao is not measured: {error}", file=sys.stderr)
        return {}


def _configs() -> dict[str, Any]:
    from torchao.prototype.mx_formats import inference_workflow as mx
    from torchao.quantization import Float8DynamicActivationFloat8WeightConfig, PerRow
    from torchao.quantization.quantize_.common import KernelPreference

    def emulated(dtype: torch.dtype) -> Any:
        return mx.MXDynamicActivationMXWeightConfig(
            activation_dtype=dtype, weight_dtype=dtype, kernel_preference=KernelPreference.EMULATED
        )

    return {
        "torchao fp8": Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), set_inductor_config=False),
        "torchao mxfp8": emulated(torch.float8_e4m3fn),
        "torchao mxfp4": emulated(torch.float4_e2m1fn_x2),
    }


def torchao_linear(weight: Tensor, bias: Tensor, config: Any) -> Callable[[Tensor], Tensor]:
    """A compiled linear of a weight (N, K) that torchao has quantized. Raises RuntimeError if it left it as it was."""
    from torchao.quantization import quantize_

    linear = nn.Linear(weight.shape[1], weight.shape[0], dtype=weight.dtype, device="meta").eval()
    linear.weight, linear.bias = nn.Parameter(weight), nn.Parameter(bias)
    quantize_(nn.Sequential(linear), config)
    if type(linear.weight.data) is torch.Tensor:
        raise RuntimeError(f"torchao does not quantize a weight of {tuple(weight.shape)}")
    return lambda x: _compiled_linear(x, linear.weight, linear.bias)


_compiled_linear: Callable[..., Tensor] = torch.compile(nn.functional.linear)

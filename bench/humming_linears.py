"""Humming's linears for bench_gpu_linear.py, where it is installed (`pip install "humming-kernels[cu13]"`, 0.1.20).

What vLLM ships for 4-bit weights on Hopper; NVRTC compiles its kernels at their first call. Weights are MXFP4 (E2M1, a
power of two for 32 channels), rounded by Humming; activations stay BF16, or are E4M3 with a scale a row, which it
quantizes in a launch of its own.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

from linear_cases import Contender

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

MXFP4 = {"dtype": "float4e2m1", "group_size": 32, "scale_dtype": "float8e8m0"}
INPUTS: dict[str, dict[str, str]] = {"humming w4a16": {}, "humming w4a8": {"dtype": "float8e4m3"}}


def humming_contenders() -> dict[str, Contender]:
    """By what they are called here; none, and why on standard error, where Humming is not installed."""
    if importlib.util.find_spec("humming") is None:
        print("Humming is not measured: it is not installed", file=sys.stderr)
        return {}
    return {name: Contender(4, partial(humming_linear, inputs=inputs)) for name, inputs in INPUTS.items()}


def humming_linear(weight: Tensor, bias: Tensor, *, inputs: dict[str, str]) -> Callable[[Tensor], Tensor]:
    """A linear of a weight (N, K) that Humming has quantized. inputs: its input config."""
    from humming.layer import HummingLayer

    layer: Any = HummingLayer(
        shape_n=weight.shape[0], shape_k=weight.shape[1], weight_config=dict(MXFP4), input_config=dict(inputs),
        has_bias=True, torch_dtype=weight.dtype,
    ).to(weight.device)  # fmt: skip
    layer.load_from_unquantized(weight)
    layer.bias.data.copy_(bias)
    layer.transform()
    run: Callable[[Tensor], Tensor] = layer.forward
    return run

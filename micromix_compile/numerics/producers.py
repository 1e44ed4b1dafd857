"""What may stand before a quantizer and be part of it: nothing, an RMSNorm, SiLU times up. Here in plain PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics import checks

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Producer:
    """compute: the quantizer's input (M, C) from x (M, C), another tensor and eps. check: raises for what it can't."""

    compute: Callable[[Tensor, Tensor, float], Tensor]
    check: Callable[[Tensor, Tensor], None]


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm as Hugging Face models write it: normalized in float32, rounded to x's dtype, then times weight.

    x: (M, C) and weight: (C,), each float32, bfloat16 or float16. Returns (M, C), of x's dtype if weight has it, too.
    """
    h = x.to(torch.float32)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def silu_mul(gate: Tensor, up: Tensor, eps: float = 0.0) -> Tensor:
    """SiLU(gate) * up, rounded to the dtype after each of the two steps. gate, up: (M, C). eps: of no effect."""
    return torch.nn.functional.silu(gate) * up


PRODUCERS: Final[Mapping[str, Producer]] = MappingProxyType(
    {
        "rms_norm": Producer(compute=rms_norm, check=checks.check_norm_weight),
        "silu_mul": Producer(compute=silu_mul, check=checks.check_gate_and_up),
    }
)
"""By `PRODUCER` of the kernels, for which "none" is nothing."""


def produce(producer: str, x: Tensor, other: Tensor | None, eps: float) -> Tensor:
    """The quantizer's input. other: weight (C,) of "rms_norm", up (M, C) of "silu_mul", None of "none"."""
    return x if other is None else PRODUCERS[producer].compute(x, other, eps)


def check_produce(producer: str, x: Tensor, other: Tensor | None) -> None:
    """Raise TypeError or ValueError for arguments that `produce` does not take; only shapes and dtypes are read."""
    assert (other is None) == (producer == "none"), "nothing else stands before a quantizer"
    if other is not None:
        PRODUCERS[producer].check(x, other)

"""Quantized operands of a mixed product, and how far a product may be from the exact one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile import packing, reference

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.reference import QuantizedActivation

    Split = tuple[int, int, int]

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def quantized_rows(rows: int, split: Split, fp6: str, magnitude: float = 1.0) -> QuantizedActivation:
    k = sum(split)
    x = torch.randn(rows, k) * torch.exp2(torch.randint(-6, 3, (rows, k))) * magnitude
    return reference.reorder_quantize(x, torch.arange(k), split, fp6=fp6)


def packed_rows(rows: int, split: Split, fp6: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q = quantized_rows(rows, split, fp6)
    return q.q4, packing.pack_fp6(q.q6, fp6), q.q8, q.scale


def assert_product_is_exact(
    got: Tensor,
    x: QuantizedActivation,
    weight: tuple[Tensor, Tensor, Tensor, Tensor],
    bias: Tensor | None,
    fp6: str,
    *,
    unit: float = 2.0**-24,
) -> None:
    """|got - exact| stays below what float32 accumulation and one final rounding can do.

    The operands and their products are exact, so only the additions round: K of them and the bias, each by at most
    u = `unit` of a partial sum, which |X| |W|^T + |b| bounds: 2**-24 where additions round to nearest, 2**-23 where
    they may truncate, as a GPU's MMA does. Hence gamma_(K + 1) (|X| |W|^T + |b|), gamma_n = n u / (1 - n u) (Higham,
    Accuracy and Stability, lemma 3.1), for any order of summation. bf16 instructions flush results below 2**-126, at
    most K times; bf16 operands lose what lies below 2**-133, times the other side. The rounding to the output type adds
    its unit roundoff of the value. A NaN must come out where, and only where, one goes in.
    """
    left = reference.dequantize_activation(*x).double()
    right = reference.dequantize_weight(*weight, fp6).double().T
    offset = torch.zeros(right.shape[1], dtype=torch.float64) if bias is None else bias.double()
    exact, magnitude = left @ right + offset, left.abs() @ right.abs() + offset.abs()
    n = (left.shape[1] + 1) * unit
    lost = 2.0**-133 * (left.abs().sum(1, keepdim=True) + right.abs().sum(0, keepdim=True))
    accumulated = n / (1 - n) * magnitude + left.shape[1] * 2.0**-126 + lost
    bound = accumulated + UNIT_ROUNDOFF[got.dtype] * (exact.abs() + accumulated)
    assert got.shape == exact.shape
    poisoned = exact.isnan()
    assert torch.equal(got.isnan(), poisoned)
    assert bool(((got.double() - exact).abs() <= bound)[~poisoned].all())

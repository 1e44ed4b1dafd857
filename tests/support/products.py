"""Quantized operands of a mixed product, and how far a product may be from the exact one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from micromix_compile.numerics import folding, packing, reference
from micromix_compile.numerics.formats import FP6_FORMATS, elem_format
from micromix_compile.targets.kernels import FoldedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.numerics.reference import QuantizedActivation

    Split = tuple[int, int, int]

INTERPRETED = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning"),
]
"""Marks of tests in Triton's interpreter, which is NumPy: it warns where float32 overflows or meets a NaN, and of its
own use of NumPy."""

SEGMENTS = {"e2m1": (1, 0, 0), "e2m3": (0, 1, 0), "e3m2": (0, 1, 0), "e4m3": (0, 0, 1)}
"""Which segment a format's channels are: shares of a split."""

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


def pack_activation(x: Tensor, split: Split, fp6: str, *, w_fp4: bool = False) -> FoldedActivation:
    """x: (M, K) float32, quantized in the order of its channels and folded."""
    quantized = reference.reorder_quantize(x, torch.arange(x.shape[1], device=x.device), split, fp6=fp6)
    return folding.fold_activation(quantized, x.abs().amax(1), w_fp4=w_fp4)


def folded_weight(w: QuantizedActivation, fp6: str, bias: Tensor | None = None) -> FoldedWeight:
    """Quantized rows as a packed weight with factors and row scales."""
    packed = (w.q4, packing.pack_fp6(w.q6, fp6), w.q8)
    row_scale = folding.weight_row_scale(*packed, w.scale, fp6)
    return FoldedWeight(*packed, folding.weight_factor(*packed, w.scale, row_scale), row_scale, bias)


def folded_product(x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str) -> tuple[Tensor, Tensor]:
    """The product of folded operands with biases, in float64, and |X| |W|^T + |b|: both (M, sum of N)."""
    e4m3 = elem_format("e4m3")
    left = reference.decode(x.q, e4m3).double() * x.row_scale.double()[:, None]
    exact, magnitude = [], []
    for weight in weights:
        folded = folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, fp6)
        right = (reference.decode(folded, e4m3).double() * weight.row_scale.double()[:, None]).T
        offset = torch.zeros_like(right[0]) if weight.bias is None else weight.bias.double()
        exact.append(left @ right + offset)
        magnitude.append(left.abs() @ right.abs() + offset.abs())
    return torch.cat(exact, 1), torch.cat(magnitude, 1)


def assert_folded_product_is_exact(
    got: Tensor, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, *, mma_channels: int = 0
) -> None:
    """|got - exact| stays below what the additions and one final rounding can do.

    Folded operands and their products are exact, and so is the multiplication by powers of two. Float32 additions, K
    of them and at most 8 for the parts of K and the bias, round by 2**-24 of a partial sum: gamma_(K + 9), as in
    `assert_product_is_exact`.

    mma_channels: of the sums that FP8 MMA makes, where it does (0 elsewhere). On sm_90 an instruction adds 32 products
    to a sum by aligning all to the largest and cutting off what is below 2**-13 of it, so that each of its 33 addends
    is off by less than 2**-13 of the sum of magnitudes: n = mma_channels * 33 / 32 truncations, gamma_n of u = 2**-13.
    """
    exact, magnitude = folded_product(x, weights, fp6)

    def gamma(n: float, unit: float) -> float:
        assert n * unit < 1, "too many additions for a bound"
        return n * unit / (1 - n * unit)

    added = (1 + gamma(x.q.shape[1] + 9, 2.0**-24)) * (1 + gamma(mma_channels * 33 / 32, 2.0**-13)) - 1
    accumulated = added * magnitude + 2.0**-126
    bound = accumulated + UNIT_ROUNDOFF[got.dtype] * (exact.abs() + accumulated)
    if got.dtype == torch.float16:
        bound += 2.0**-25  # its subnormals
    assert got.shape == exact.shape
    poisoned = exact.isnan()
    assert torch.equal(got.isnan(), poisoned)
    assert bool(((got.double() - exact).abs() <= bound)[~poisoned].all())


def assert_within_folding(
    got: Tensor, exact: Tensor, left: Tensor, right: Tensor, activations: str, *, sums: float = 2.0**-24
) -> None:
    """A float32 product of folded operands beside that of the MX operands left (M, K) and right (N, K).

    Folding costs 2**-9 of a weight row's largest value, and 2**-17 of an activation's, for each channel; nothing of an
    activation that has one scale a row. sums: what an addition rounds by, of the sum of magnitudes.
    """
    of_x = 0.0 if activations == "fp8" else 2.0**-17
    lost = left.abs().sum(1)[:, None] * right.abs().amax(1) * (2.0**-9 + of_x)
    lost += right.abs().sum(1) * left.abs().amax(1)[:, None] * of_x
    added = left.abs() @ right.abs().T * (2 * left.shape[1] * sums)
    assert bool(((got - exact).abs() <= lost + added).all())


def one_format(fmt: str, channels: int) -> tuple[Split, str]:
    k4, k6, k8 = (channels * share for share in SEGMENTS[fmt])
    return (k4, k6, k8), fmt if fmt in FP6_FORMATS else "e2m3"

"""The reference's mixed product: against float64, its bias, its poison, its empty parts."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import ml_dtypes_encode, oracle_dequantize, oracle_quantize
from support.strategies import (
    MatmulCase,
    ReorderCase,
    matmul_cases,
)
from torch import Tensor

from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.formats import FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.reference import QuantizedActivation, reorder_quantize

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FP32_UNIT = 2.0**-24
"""Largest relative error of one float32 rounding."""


def segments(case: ReorderCase) -> list[tuple[str, Tensor]]:
    """(format, channels) of the three segments of x[:, perm], where -1 reads a column of zeros put after the last."""
    padded = torch.cat((case.x, torch.zeros(case.x.shape[0], 1)), dim=1)
    reordered = padded[:, case.channel_perm.long()]
    return list(zip(("e2m1", case.fp6, "e4m3"), reordered.split(case.split, dim=1), strict=True))


def packed_weight(weight: Tensor, split: tuple[int, int, int], fp6: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(w4, w6, w8, w_scale) of a weight whose channels are in order already."""
    q4, q6, q8, scale = reorder_quantize(weight, torch.arange(weight.shape[1]), split, fp6=fp6)
    return q4, packing.pack_fp6(q6, fp6), q8, scale


def oracle_values(matrix: Tensor, split: tuple[int, int, int], fp6: str) -> np.ndarray:
    """float64 values of a matrix quantized with RCEIL, segment by segment, by ml_dtypes."""
    parts = zip(("e2m1", fp6, "e4m3"), matrix.split(split, dim=1), strict=True)
    values = [
        oracle_dequantize(*oracle_quantize(part, name, ScaleRounding.RCEIL, ml_dtypes_encode), name)
        for name, part in parts
    ]
    return np.concatenate(values, axis=1)


def assert_product(actual: Tensor, x: np.ndarray, weight: np.ndarray, bias: Tensor | None) -> None:
    """Within the error that float32 accumulation in any order, the bias and one final rounding can have.

    Products are exact (at most 8 significant bits); K - 1 additions and one for the bias each err by a factor of
    1 + FP32_UNIT, so the sum of K terms errs by at most n u / (1 - n u) of |X| |W|^T + |b| with n = K (Higham,
    Accuracy and Stability, section 3.1); the rounding to the output type adds its own unit.
    """
    exact, magnitude = x @ weight.T, np.abs(x) @ np.abs(weight).T
    if bias is not None:
        exact, magnitude = exact + bias.double().numpy(), magnitude + np.abs(bias.double().numpy())
    additions = x.shape[1] * FP32_UNIT
    bound = additions / (1 - additions) * magnitude
    finfo = torch.finfo(actual.dtype)
    bound = bound + (np.abs(exact) + bound) * finfo.eps / 2 + finfo.smallest_normal * finfo.eps
    assert actual.shape == exact.shape
    assert (np.abs(actual.double().numpy() - exact) <= bound).all()


def product(case: MatmulCase, *, weight_split: tuple[int, int, int], out_dtype: torch.dtype) -> Tensor:
    """mixed_mx_mm of the quantized operands of `case`."""
    x = reorder_quantize(case.x, torch.arange(case.x.shape[1]), case.split, fp6=case.fp6)
    weight = packed_weight(case.weight, weight_split, case.fp6)
    return reference.mixed_mx_mm(x, *weight, case.bias, fp6=case.fp6, out_dtype=out_dtype)


@given(case=matmul_cases(), out_dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_mixed_product_is_the_float64_product_within_its_bound(case: MatmulCase, out_dtype: torch.dtype) -> None:
    actual = product(case, weight_split=case.split, out_dtype=out_dtype)
    assert actual.dtype == out_dtype
    x, weight = (oracle_values(matrix, case.split, case.fp6) for matrix in (case.x, case.weight))
    assert_product(actual, x, weight, case.bias)


@given(case=matmul_cases())
def test_weights_may_all_be_mxfp4(case: MatmulCase) -> None:
    channels = case.x.shape[1]
    actual = product(case, weight_split=(channels, 0, 0), out_dtype=torch.float32)
    x = oracle_values(case.x, case.split, case.fp6)
    assert_product(actual, x, oracle_values(case.weight, (channels, 0, 0), case.fp6), case.bias)


@pytest.mark.parametrize("split", [(64, 0, 0), (0, 64, 0), (0, 0, 64), (32, 0, 32), (0, 32, 32), (32, 32, 0)])
@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize("fp6", FP6_FORMATS)
def test_empty_segments_and_empty_batches_multiply(split: tuple[int, int, int], rows: int, fp6: str) -> None:
    case = MatmulCase(torch.randn(rows, 64), torch.randn(7, 64), torch.randn(7), split, fp6)
    actual = product(case, weight_split=split, out_dtype=torch.float32)
    x, weight = (oracle_values(matrix, split, fp6) for matrix in (case.x, case.weight))
    assert_product(actual, x, weight, case.bias)


def test_a_long_product_stays_within_its_bound() -> None:
    case = MatmulCase(torch.randn(8, 4096), torch.randn(16, 4096), None, (2048, 1536, 512), "e3m2")
    actual = product(case, weight_split=case.split, out_dtype=torch.float32)
    x, weight = (oracle_values(matrix, case.split, case.fp6) for matrix in (case.x, case.weight))
    assert_product(actual, x, weight, None)


@pytest.mark.parametrize("bias_dtype", [torch.float32, torch.bfloat16])
def test_the_bias_is_added_before_the_only_rounding(bias_dtype: torch.dtype) -> None:
    x = torch.zeros(1, 32)
    x[0, :2] = torch.tensor([16.0, 1.0])
    bias = torch.tensor([-256.0], dtype=bias_dtype)
    case = MatmulCase(x, x, bias, (0, 0, 32), "e2m3")  # 256 + 1 - 256, where bfloat16 has no 257
    assert product(case, weight_split=case.split, out_dtype=torch.bfloat16).item() == 1.0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("channel", [0, 40, 95])
def test_a_poisoned_activation_reaches_its_own_output_row_and_no_other(bad: float, channel: int) -> None:
    x, weight = torch.randn(3, 96), torch.randn(5, 96)
    x[1, channel] = bad
    out = product(MatmulCase(x, weight, None, (32, 32, 32), "e2m3"), weight_split=(32, 32, 32), out_dtype=torch.float32)
    assert torch.equal(out.isnan(), torch.tensor([[False], [True], [False]]).expand(3, 5))


def test_the_layouts_have_the_documented_shapes() -> None:
    quantized = reorder_quantize(torch.randn(3, 160), torch.arange(160), (64, 32, 64), fp6="e2m3")
    assert isinstance(quantized, QuantizedActivation)
    assert [tuple(part.shape) for part in quantized] == [(3, 32), (3, 32), (3, 64), (3, 5)]
    assert {part.dtype for part in quantized} == {torch.uint8}

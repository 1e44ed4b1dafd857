"""Arguments that the operations share are refused by name and value."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from micromix_compile.numerics.checks import check_split
from micromix_compile.numerics.reference import reorder_quantize

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FP32_UNIT = 2.0**-24
"""Largest relative error of one float32 rounding."""

Quantized = tuple[np.ndarray, np.ndarray]


@pytest.mark.parametrize(
    ("split", "channels", "message"),
    [
        ((-32, 64, 0), 32, "k4 must be a non-negative multiple of 32, got -32"),
        ((0, 33, 31), 64, "k6 must be a non-negative multiple of 32, got 33"),
        ((0, 32, 16), 48, "k8 must be a non-negative multiple of 32, got 16"),
        ((32, 32, 32), 64, r"split \(32, 32, 32\) sums to 96, but channel_perm has 64 entries"),
        ((0, 0, 0), 32, r"split \(0, 0, 0\) sums to 0, but channel_perm has 32 entries"),
    ],
)
def test_a_bad_split_is_refused_with_its_values(split: tuple[int, int, int], channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_split(split, channels)
    with pytest.raises(ValueError, match=message):
        reorder_quantize(torch.zeros(1, channels), torch.arange(channels), split, fp6="e2m3")


def test_bad_arguments_of_reorder_quantize_are_refused_by_name() -> None:
    x, perm = torch.zeros(2, 32), torch.arange(32)
    with pytest.raises(ValueError, match=r"x must be 2-dimensional \(M, C\), got shape \(1, 2, 32\)"):
        reorder_quantize(x[None], perm, (32, 0, 0), fp6="e2m3")
    with pytest.raises(ValueError, match="fp6 must be one of e2m3, e3m2, got 'e4m3'"):
        reorder_quantize(x, perm, (32, 0, 0), fp6="e4m3")
    with pytest.raises(TypeError, match=r"channel_perm must be int16, int32 or int64, got torch\.float32"):
        reorder_quantize(x, perm.float(), (32, 0, 0), fp6="e2m3")

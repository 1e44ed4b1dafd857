"""What the compiled products refuse, and how they say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.grouped import packed_experts
from support.products import packed_rows, quantized_rows

from micromix_compile import ops
from micromix_compile.targets import cpu


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Without this, a machine that cannot compile would test the plain PyTorch path."""
    assert cpu.load(), cpu.status().reason


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x_scale": torch.zeros(2, 4, dtype=torch.uint8)}, ValueError, "x_scale must have 3 columns"),
        ({"w_scale": torch.zeros(6, 3, dtype=torch.uint8)}, ValueError, "w4 must have 6 rows"),
        ({"w6": torch.zeros(2, 5, 8, dtype=torch.uint8)}, ValueError, "w6 must have three byte planes"),
        ({"w6": torch.zeros(3, 5, 7, dtype=torch.uint8)}, ValueError, "w6 must hold whole blocks of 32"),
        ({"x8": torch.zeros(2, 32)}, TypeError, "x8 must be uint8, got torch.float32"),
        ({"x4": torch.zeros(2, 32, dtype=torch.uint8)}, ValueError, "x_scale must have 4 columns"),
        ({"bias": torch.zeros(4)}, ValueError, r"bias must have shape \(5,\), got \(4,\)"),
        ({"fp6": "e3m3"}, ValueError, "fp6 must be one of e2m3, e3m2"),
    ],
)
def test_product_refuses_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    x, weight = quantized_rows(2, (32, 32, 32), "e2m3"), packed_rows(5, (32, 32, 32), "e2m3")
    names = ("x4", "x6", "x8", "x_scale", "w4", "w6", "w8", "w_scale")
    args = dict(zip(names, (*x, *weight), strict=True))
    options = {"bias": None, "fp6": "e2m3", "out_dtype": torch.float32}
    with pytest.raises(error, match=message):
        ops.mixed_mx_mm(**{**args, **options, **change})


def test_product_refuses_operands_of_different_k() -> None:
    x, weight = quantized_rows(2, (32, 0, 0), "e2m3"), packed_rows(5, (64, 0, 0), "e2m3")
    with pytest.raises(ValueError, match="x has K = 32, but w has K = 64"):
        ops.mixed_mx_mm(*x, *weight, None, "e2m3", torch.float32)


def test_a_row_that_there_is_not_is_named() -> None:
    x, w = quantized_rows(4, (32, 32, 32), "e2m3"), packed_experts(2, 5, (32, 32, 32), "e2m3")
    rows, offs = torch.tensor([0, 4], dtype=torch.int32), torch.tensor([1, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match="rows must be from 0 to 3, got 4"):
        ops.grouped_mx_mm(*x, rows, offs, *w, None, "e2m3", torch.float32)

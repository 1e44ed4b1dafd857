"""The folded operations: what torch.library checks, and operands that don't fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.products import folded_weight, pack_activation

from micromix_compile import ops
from micromix_compile.numerics import reference
from micromix_compile.numerics.formats import ELEM_FORMATS

Split = tuple[int, int, int]

E4M3 = ELEM_FORMATS["e4m3"]


def folded_operands(columns: int = 40) -> list[Any]:
    x = pack_activation(torch.randn(3, 96), (32, 32, 32), "e2m3")
    weight = folded_weight(
        reference.reorder_quantize(torch.randn(columns, 96), torch.arange(96), (32, 32, 32), fp6="e2m3"), "e2m3"
    )
    parts = (weight.w4, weight.w6, weight.w8, weight.factor, weight.row_scale)
    return [*x, *([part] for part in parts), [torch.randn(columns)], "e2m3", torch.float32]


def test_the_ops_pass_the_checks_of_torch_library() -> None:
    x, perm = torch.randn(3, 96), torch.randperm(96)
    torch.library.opcheck(ops.reorder_fold, (x, perm, 32, 32, 32, "e2m3", "rceil", False))
    torch.library.opcheck(ops.folded_mm, tuple(folded_operands()))


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(4), r"row_scale must have shape \(3,\), got \(4,\)"),
        (4, [torch.zeros(3, 40, 0, dtype=torch.uint8)], r"weight 0 takes rows of 64 bytes, q has 128"),
        (6, [torch.zeros(40, 3, dtype=torch.uint8)], r"w_factor\[0\] must have shape \(3, 40, 4\), got \(40, 3\)"),
        (8, [torch.zeros(39)], r"bias\[0\] must have shape \(40,\), got \(39,\)"),
        (8, [torch.zeros(40)] * 2, r"w4 must list 1 to 3 weights, bias as many or none, got 1 and 2"),
    ],
)
def test_operands_of_a_folded_product_must_fit(place: int, wrong: Any, message: str) -> None:
    operands = folded_operands()
    operands[place] = wrong
    with pytest.raises(ValueError, match=message):
        ops.folded_mm(*operands)


def test_weights_of_one_product_must_be_split_alike() -> None:
    *x, w4, w6, w8, factor, row_scale, _, fp6, out_dtype = folded_operands()
    other = [torch.zeros(40, 32), torch.zeros(3, 40, 0), torch.zeros(40, 64), torch.zeros(2, 40, 4)]
    lists = [[*first, part.to(torch.uint8)] for first, part in zip((w4, w6, w8, factor), other, strict=True)]
    with pytest.raises(ValueError, match=r"split like the first, \(\d+, \d+, \d+\), weight 1 is split \(64, 0, 64\)"):
        ops.folded_mm(*x, *lists, row_scale * 2, [], fp6, out_dtype)

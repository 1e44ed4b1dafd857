"""Weights expanded for products of the library against `folding`: kernels interpreted, or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.folded import (
    on,
    random_weight,
    share,
)
from support.products import (
    INTERPRETED,
    SEGMENTS,
)

from micromix_compile.numerics import folding, packing
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.targets.expansion import ExpandedWeights, expand_weights
from micromix_compile.targets.kernels import FoldedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence


pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

POWERS = [2.0**e for e in range(-16, 12)]


def check_expanded(device: str, weights: Sequence[FoldedWeight], fp6: str) -> None:
    """Equal bytes, scales and biases, below each other, and nothing before or behind them."""
    weights = [on(device, one) for one in weights]
    want = torch.cat([folding.fold_weight(one.w4, one.w6, one.w8, one.factor, fp6) for one in weights])
    rows = want.shape[0] + 2
    room = torch.full((rows, want.shape[1]), 0xA5, dtype=torch.uint8, device=device)
    scales, biases = torch.full((rows,), 7.0, device=device), torch.full((rows,), 7.0, device=device).bfloat16()
    has_bias = weights[0].bias is not None
    out = ExpandedWeights(room[1:-1], scales[1:-1], biases[1:-1] if has_bias else None)
    expand_weights(weights, out, fp6=fp6)
    wrong = (room[1:-1] != want).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0].tolist()}"
    assert torch.equal(out.row_scale, torch.cat([one.row_scale for one in weights]))
    if out.bias is not None:
        assert torch.equal(out.bias, torch.cat([one.bias for one in weights if one.bias is not None]))
    assert bool((room[[0, -1]] == 0xA5).all())
    assert bool((scales[[0, -1]] == 7.0).all())
    assert bool((biases[[0, -1]] == 7.0).all())


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("columns", [(0,), (1,), (7,), (5, 3), (3, 9, 6), (4, 0, 1)])
@pytest.mark.parametrize(
    "split", [(32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 0, 96), (0, 160, 32), (1056, 544, 32), (992, 1024, 1056)]
)
def test_expanded_weights_equal_the_definition(device: str, fp6: str, columns: tuple[int, ...], split: Split) -> None:
    check_expanded(device, [random_weight(n, split, fp6, bias=len(columns) > 1) for n in columns], fp6)


def test_weights_without_channels_still_have_scales_and_biases(device: str) -> None:
    none = torch.zeros(5, 0, dtype=torch.uint8)
    factor = torch.zeros(folding.factor_shape(5, (0, 0, 0)), dtype=torch.uint8)
    weight = FoldedWeight(none, none.expand(3, 5, 0), none, factor, torch.ones(5), torch.randn(5).bfloat16())
    check_expanded(device, [weight] * 2, "e2m3")


def every_code_under_every_factor(fmt: str) -> FoldedWeight:
    """A row a factor. All that a factor byte can be, and all codes but E4M3's NaN."""
    if fmt == "e2m1":
        factors = 8 * torch.arange(12, dtype=torch.uint8)
        codes = torch.arange(32, dtype=torch.uint8) % 16
    else:
        upper = torch.tensor(POWERS, dtype=torch.float16).view(torch.int16) >> 8
        factors = torch.cat((torch.zeros(1, dtype=torch.uint8), upper.to(torch.uint8)))
        codes = torch.arange(256 if fmt == "e4m3" else 64, dtype=torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if fmt == "e4m3" else codes
    codes = codes.repeat(len(factors), 1)
    aligned = codes[:, :0]
    if fmt in FP6_FORMATS:
        aligned, _ = packing.align_fp6(codes, codes.new_zeros(len(codes), 2), fmt)
    w4 = packing.pack_fp4(codes) if fmt == "e2m1" else codes[:, :0]
    w6 = packing.pack_fp6(aligned, fmt if fmt in FP6_FORMATS else "e2m3")
    w8 = codes if fmt == "e4m3" else codes[:, :0]
    words = -(-codes.shape[1] // (BLOCK_SIZE * folding.FACTOR_WORD))
    factor = factors[None, :, None].repeat(words, 1, folding.FACTOR_WORD)
    return FoldedWeight(w4, w6, w8, factor, torch.ones(len(factors)))


@pytest.mark.parametrize("fmt", SEGMENTS)
def test_every_code_is_folded_under_every_factor(device: str, fmt: str) -> None:
    check_expanded(device, [every_code_under_every_factor(fmt)], fmt if fmt in FP6_FORMATS else "e2m3")


@pytest.mark.gpu
def test_bytes_of_large_weights_equal_the_definition() -> None:
    for columns, channels in (((4096, 1024, 1024), 4096), ((1001,), 14336), ((257, 30), 28672)):
        for fp6 in FP6_FORMATS:
            split = share(channels, 0.75, 0.2)
            check_expanded("cuda", [random_weight(n, split, fp6, bias=True, device="cuda") for n in columns], fp6)

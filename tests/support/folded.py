"""Folded operands and products of them: random, of integers, exact, by any tile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.numerics import folding, reference
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.targets.expansion import ExpandedWeights, expand_weights
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile, Parts
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight
from support.products import (
    folded_product,
    folded_weight,
    pack_activation,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon_tiles import Plan

Split = tuple[int, int, int]

ALL_TILES = FOLDED_SM_90.tiles


def on(device: str | torch.device, weight: FoldedWeight) -> FoldedWeight:
    return FoldedWeight(*(None if part is None else part.to(device) for part in weight))  # type: ignore[arg-type]


def random_weight(columns: int, split: Split, fp6: str, *, bias: bool = False, device: str = "cpu") -> FoldedWeight:
    """Rows of blocks of all sizes that folding treats differently."""
    k = sum(split)
    w = torch.randn(columns, k, device=device)
    w *= torch.exp2(torch.randint(-18, 3, (columns, k // BLOCK_SIZE), device=device)).repeat_interleave(BLOCK_SIZE, 1)
    quantized = reference.reorder_quantize(w, torch.arange(k, device=device), split, fp6=fp6)
    return folded_weight(quantized, fp6, torch.randn(columns, device=device).bfloat16() if bias else None)


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


def tiles_on(device: str) -> tuple[FoldedTile, ...]:
    """All tiles on a GPU; in the interpreter small ones, for several programs and steps."""
    if device == "cpu":
        return FoldedTile(16, 32, 64, 2, 2), FoldedTile(32, 32, 128, 1, 2, SUM_STEPS=False)
    return ALL_TILES


def multiply(
    x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, tile: FoldedTile | None, split_k: int | None,
    out_dtype: torch.dtype = torch.float32, whole: int = 0,
) -> Tensor:  # fmt: skip
    """The products side by side. whole: tiles that are not shared."""
    parts = None if split_k is None else Parts(whole, split_k)
    outs = TritonFolded().multiply(x, weights, fp6=fp6, out_dtype=out_dtype, tile=tile, parts=parts)
    assert all(out.dtype == out_dtype and out.is_contiguous() for out in outs)
    assert not x.locks.any(), "locks are left"
    return torch.cat(outs, 1)


@dataclass(frozen=True)
class OnePlan:
    """Says that the persistent kernel takes all products, in one way."""

    plan: Plan
    most_rows: int = 1 << 30

    def plan_for(self, rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> Plan:
        """As `GluonTiles.plan_for`."""
        return self.plan


def folded_rows(rows: int, split: Split, fp6: str, *, w_fp4: bool = False, device: str = "cpu") -> FoldedActivation:
    k = sum(split)
    x = torch.randn(rows, k, device=device) * torch.exp2(torch.randint(-6, 3, (rows, k), device=device))
    return pack_activation(x, split, fp6, w_fp4=w_fp4)


def integers(
    rows: int, columns: Sequence[int], split: Split, fp6: str, *, w_fp4: bool = False, bias: bool = True,
    device: str = "cpu",
) -> tuple[FoldedActivation, list[FoldedWeight]]:  # fmt: skip
    """Operands of which every sum is exact, in any order, in float32 and in the 14 bits of sm_90's FP8 MMA.

    x has four entries of ±1 or ±2 a block, w integers up to 7 or twice that: a step of 8 blocks adds at most 32
    products up to 28, 896 < 2**13, and 28,672 channels less than 2**17. Up to 2,048 channels stay below 2**13 too, and
    all do that the instruction adds in one sum: 2**13 is 12 standard deviations of 28,672 channels' sum.
    """
    blocks = sum(split) // BLOCK_SIZE

    def doubled(values: Tensor) -> Tensor:
        factor = torch.randint(1, 3, (len(values), blocks, 1), device=device)
        return (values.unflatten(1, (blocks, BLOCK_SIZE)) * factor).flatten(1).float()

    nonzero = torch.rand(rows, blocks, BLOCK_SIZE, device=device).argsort(2) < 4
    x = doubled(nonzero.flatten(1) * (2 * torch.randint(0, 2, (rows, sum(split)), device=device) - 1))
    weights = []
    for n in columns:
        w = torch.randint(-7, 8, (n, sum(split)), device=device)
        first = w[:, : sum(split) if w_fp4 else split[0]]
        first[first.abs() == 5] = 3  # E2M1 has no 5 and no 7
        first[first.abs() == 7] = -6
        w_split = (sum(split), 0, 0) if w_fp4 else split
        quantized = reference.reorder_quantize(doubled(w), torch.arange(sum(split), device=device), w_split, fp6=fp6)
        offset = torch.randint(-50, 51, (n,), device=device).bfloat16() if bias else None
        weights.append(folded_weight(quantized, fp6, offset))
    return pack_activation(x, split, fp6, w_fp4=w_fp4), weights


def exact_integers(x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str) -> Tensor:
    """The product in float64."""
    exact, _ = folded_product(x, weights, fp6)
    assert torch.equal(exact, exact.round())
    return exact


def assert_equal_but_for_one_rounding(got: Tensor, exact: Tensor) -> None:
    assert torch.equal(exact.float().double(), exact)
    assert torch.equal(got, exact.float().to(got.dtype))


def mma_channels(tile: FoldedTile, x: FoldedActivation) -> int:
    """The most that matrix instructions add to one sum."""
    return tile.BLOCK_K if tile.SUM_STEPS else x.q.shape[1]

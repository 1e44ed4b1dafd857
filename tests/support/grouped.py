"""Quantized operands of grouped products."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.numerics import packing
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.targets.kernels import FoldedWeight
from support.products import folded_weight, quantized_rows

if TYPE_CHECKING:
    from torch import Tensor

    Split = tuple[int, int, int]


def packed_experts(experts: int, columns: int, split: Split, fp6: str) -> PackedWeight:
    """Random weights of `experts`, packed."""
    one = quantized_rows(experts * columns, split, fp6)
    planes = packing.pack_fp6(one.q6, fp6).unflatten(1, (experts, columns)).transpose(0, 1).contiguous()
    q4, q8, scale = (part.unflatten(0, (experts, columns)) for part in (one.q4, one.q8, one.scale))
    return PackedWeight(q4, planes, q8, scale)


def folded_experts(experts: int, columns: int, split: Split, fp6: str, *, bias: bool) -> FoldedWeight:
    """Random weights of `experts`, packed, with factors, row scales and, if asked for, a bias."""
    each = [folded_weight(quantized_rows(columns, split, fp6), fp6) for _ in range(experts)]
    parts = (torch.stack(part) for part in zip(*(weight[:5] for weight in each), strict=True))
    return FoldedWeight(*parts, torch.randn(experts, columns) if bias else None)


def expert_of_rows(rows: Tensor, offs: Tensor) -> list[int | None]:
    """Which expert computes each output row, by counting; None behind the last."""
    ends: list[int] = offs.tolist()
    return [next((e for e, end in enumerate(ends) if row < end), None) for row in range(len(rows))]

"""Rows that every quantizer must get right, whoever computes: strided, of all magnitudes, and with one right result."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch.nn.functional import silu

from support.strategies import hostile_rows

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from micromix_compile.numerics.layout import Split

ARRANGEMENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "column major": lambda x: x.t().contiguous().t(),
    "every second column": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "wide rows": lambda x: torch.cat((x, x), 1)[:, : x.shape[1]],
    "wide odd rows": lambda x: torch.cat((x, x, x[:, :1]), 1)[:, 1 : x.shape[1] + 1],
    "one row repeated": lambda x: x[:1].expand(7, -1),
    "every second row": lambda x: x.flip(0)[1::2],
}
each_arrangement = pytest.mark.parametrize("arrange", ARRANGEMENTS.values(), ids=ARRANGEMENTS)
"""Of a matrix in memory, without a copy but for the one that makes it so."""


def rows_of_every_size(
    rows: int,
    channels: int,
    padded: int,
    dtype: torch.dtype,
    centers: Sequence[int] = (-148, -126, -60, 0, 100, 121, 126),
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """`hostile_rows` around powers of two that the dtype has, and an order of their channels, padded with -1."""
    for center in (-20, 0, 9) if dtype == torch.float16 else centers:
        x = hostile_rows(rows, channels, dtype, seed=center + 200, center=center)
        perm = torch.cat((torch.randperm(channels), torch.full((padded - channels,), -1)))[torch.randperm(padded)]
        yield center, x, perm.to(torch.int32)


def rows_with_an_exact_mean(rows: int, channels: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Split]:
    """(x, weight, order, split) of which an RMSNorm has one result.

    Integers below 16 have squares whose sum stays below 2**24, and a power of two divides it without rounding: the
    order of the sum cannot matter, and every other step rounds in one way only.
    """
    x = torch.randint(-15, 16, (rows, channels)).to(dtype)
    x[0] = 0
    k4, k6 = channels // 64 * 32, channels // 128 * 32
    perm = torch.randperm(channels).to(torch.int32)
    return x, torch.randn(channels).to(dtype), perm, (k4, k6, channels - k4 - k6)


def gates_of_one_rounding(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All gates (M, 2048) of 16 bits whose SiLU rounds to the dtype in one way, and as many factors.

    Exponentials differ in float32's last places; where that could turn the rounding the gate is left out.
    """
    gate = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(dtype)
    exact = silu(gate.double())
    near = torch.stack([(exact * (1 + e)).to(dtype) for e in (-(2.0**-20), 2.0**-20)])
    gate = gate[(near[0] == near[1]) & exact.isfinite()]
    gate = gate[: len(gate) // 2048 * 2048].reshape(-1, 2048)
    assert gate.numel() > 40000
    return gate, torch.randn(gate.shape).to(dtype)

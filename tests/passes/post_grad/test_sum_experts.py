"""The sum of what experts made of each token."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.graphs import run_post_grad
from support.grouped import packed_experts
from support.products import quantized_rows
from support.targets import FOLDING, served_by
from torch.fx.experimental.proxy_tensor import make_fx

from micromix_compile import ops
from micromix_compile.passes import sum_experts

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

pytestmark = pytest.mark.versions

SPLIT, TOKENS, TOP_K, EXPERTS, COLUMNS = (32, 32, 32), 5, 2, 3, 8
ROWS = TOKENS * TOP_K


def inputs(weights: torch.dtype) -> list[Tensor]:
    """The router's weights, which pair comes when, and the operands of a product."""
    routing = torch.randint(0, TOKENS, (ROWS,)).int(), torch.tensor([3, 3, ROWS]).int()
    operands = (*quantized_rows(TOKENS, SPLIT, "e2m3"), *routing, *packed_experts(EXPERTS, COLUMNS, SPLIT, "e2m3"))
    return [torch.rand(TOKENS, TOP_K).to(weights), torch.randperm(ROWS), *operands]


def product(operands: tuple[Tensor, ...], dtype: torch.dtype) -> Tensor:
    return ops.grouped_mx_mm(*operands, None, "e2m3", dtype)


def summed(weights: Tensor, order: Tensor, *operands: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """As packed experts and those of transformers do it."""
    weighted = product(operands, dtype) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(len(weights), TOP_K, weighted.shape[1]).sum(1).to(dtype)


def summed_the_other_way(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    """Factors, dimensions and views said otherwise; another cast behind."""
    rows = product(operands, torch.float32)
    weighted = weights.reshape(-1)[order][:, None] * rows
    return weighted[order.argsort()].reshape(len(weights), TOP_K, rows.shape[1]).sum(dim=-2)


@pytest.mark.parametrize("mode", ["fake", "symbolic"])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("program", [summed, summed_the_other_way])
def test_a_sum_of_weighted_rows_becomes_one_operation(
    program: Callable[..., Tensor], weights: torch.dtype, mode: str
) -> None:
    given = inputs(weights)
    gm = make_fx(program, tracing_mode=mode)(*given)
    want = gm(*given)
    with served_by(FOLDING):
        assert run_post_grad(sum_experts, gm.graph) == 1
    gm.graph.lint()
    gm.recompile()
    targets = Counter(str(node.target) for node in gm.graph.nodes)
    assert targets["micromix.weighted_sum.default"] == 1
    assert targets["aten.mul.Tensor"] == targets["aten.sum.dim_IntList"] == 0
    got = gm(*given)
    assert got.dtype == want.dtype
    # Rows, products and the sum may each have been rounded to bfloat16 before, by half of 2^-7 of them.
    rows, place = product(tuple(given[2:]), torch.float32).abs(), given[1].argsort().view(TOKENS, TOP_K)
    bound = ops.weighted_sum(rows, given[0].reshape(-1)[given[1]], place, torch.float32)
    assert ((got.float() - want.float()).abs() <= 3 * 2**-8 * bound).all()


def with_another_reader(weights: Tensor, order: Tensor, *operands: Tensor) -> tuple[Tensor, Tensor]:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(1), weighted


def of_other_rows(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16).relu() * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(1)


def over_all(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum((0, 1))


def over_channels(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(2)


def kept_dimension(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(1, keepdim=True)


def by_one_weight(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights[:1, :1]
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(1)


def by_channels(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[:COLUMNS]
    return weighted[order.argsort()].view(TOKENS, TOP_K, -1).sum(1)


def of_columns(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[:, order[:COLUMNS] % COLUMNS].view(TOKENS, TOP_K, -1).sum(1)


def of_narrower_rows(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    return weighted[order.argsort()].view(TOKENS * 2, TOP_K, -1).sum(1)


def by_a_mask(weights: Tensor, order: Tensor, *operands: Tensor) -> Tensor:
    weighted = product(operands, torch.bfloat16) * weights.reshape(-1)[order].unsqueeze(-1)
    mask = torch.ones_like(order, dtype=torch.bool)
    return torch.ops.aten.index.Tensor(weighted, [mask]).view(TOKENS, TOP_K, -1).sum(1)


@pytest.mark.parametrize(
    "program",
    [with_another_reader, of_other_rows, over_all, over_channels, kept_dimension, by_one_weight, by_channels,
     of_columns, of_narrower_rows],
)  # fmt: skip
def test_other_sums_stay(program: Callable[..., Any]) -> None:
    gm = make_fx(program, tracing_mode="fake")(*inputs(torch.bfloat16))
    with served_by(FOLDING):
        assert run_post_grad(sum_experts, gm.graph) == 0


def test_a_sum_by_a_mask_stays() -> None:
    gm = make_fx(by_a_mask, tracing_mode="real")(*inputs(torch.bfloat16))
    with served_by(FOLDING):
        assert run_post_grad(sum_experts, gm.graph) == 0


def test_a_sum_stays_where_the_target_has_no_such_pass() -> None:
    gm = make_fx(summed, tracing_mode="fake")(*inputs(torch.bfloat16))
    assert run_post_grad(sum_experts, gm.graph) == 0

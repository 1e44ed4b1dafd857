"""Which quantizers are one."""

from __future__ import annotations

import pytest
import torch
from support.graphs import session_with, trace
from support.models import Block
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.passes import (
    find_linears,
    rewrite_linears,
    share_activations,
)

pytestmark = pytest.mark.versions


def test_equal_quantizes_of_one_activation_become_one() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    session = session_with(find_linears, rewrite_linears, share_activations, model=block, recipe=recipe)
    gm, _, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.reorder_quantize.default"] == 2
    shared = next(node for node in gm.graph.nodes if node.target is ops.reorder_quantize)
    assert len({user.args[1] for user in shared.users}) == 4


def test_quantizes_in_different_orders_or_formats_stay_apart() -> None:
    perm = torch.arange(64, dtype=torch.int32)
    other = perm.flip(0).contiguous()

    def several(x: Tensor) -> tuple[Tensor, ...]:
        first = torch.ops.micromix.reorder_quantize(x, perm, 64, 0, 0, "e2m3", "rceil", "same", 0)
        second = torch.ops.micromix.reorder_quantize(x, other, 64, 0, 0, "e2m3", "rceil", "same", 0)
        third = torch.ops.micromix.reorder_quantize(x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0)
        fourth = torch.ops.micromix.reorder_quantize(x, perm, 64, 0, 0, "e2m3", "rceil", "same", 32)
        fifth = torch.ops.micromix.reorder_quantize(x, perm, 64, 0, 0, "e2m3", "rceil", "fp8", 0)
        return first[0], second[0] + third[0].sum(), fourth[0], fifth[2]

    gm, context, _ = trace(several, torch.randn(3, 64), session=session_with())
    assert share_activations(gm.graph, context) == 0


class Cast(nn.Module):
    """Two linears behind an operator that is called without one of its overloads."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(64, 32), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.ops.aten.to(x, torch.float32)
        return self.a(x) + self.b(x)


def test_an_operator_without_an_overload_of_several_is_let_through() -> None:
    model, x = Cast().eval(), torch.randn(3, 64)
    recipe = micromix.calibrate(model, [x])
    session = session_with(find_linears, rewrite_linears, share_activations, model=model, recipe=recipe)
    _, _, targets = trace(model, x, session=session)
    assert targets["micromix.reorder_quantize.default"] == 1

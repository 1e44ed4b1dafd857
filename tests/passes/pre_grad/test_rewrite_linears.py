"""Linears become a quantizer and a product."""

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
)

pytestmark = pytest.mark.versions


def test_rewriting_leaves_no_linear_and_shares_the_order_of_a_group() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    session = session_with(find_linears, rewrite_linears, model=block, recipe=recipe)
    gm, context, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.reorder_quantize.default"] == targets["micromix.mixed_mx_mm.default"] == 3
    assert not any("linear" in target for target in targets)
    quantizes = [node for node in gm.graph.nodes if node.target is ops.reorder_quantize]
    assert quantizes[0].args[1] is quantizes[1].args[1] is not quantizes[2].args[1]
    splits = [recipe.linears[name].split for name in ("gate", "up", "down")]
    assert [tuple(node.args[2:5]) for node in quantizes] == splits
    products = [node for node in gm.graph.nodes if node.target is ops.mixed_mx_mm]
    assert [node.args[8] is not None for node in products] == [True, False, False]
    assert len(context.inputs) == 3 * 4 + 2
    assert "stack_trace" in products[0].meta


def test_without_a_recipe_for_it_a_linear_stays() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    del recipe.linears["down"]  # type: ignore[attr-defined]
    session = session_with(find_linears, rewrite_linears, model=block, recipe=recipe)
    _, _, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.mixed_mx_mm.default"] == 2
    assert sum("linear" in target for target in targets) == 1


class BiasOfALinear(nn.Module):
    """A linear whose bias is what another one makes of the first token."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 96), nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.second.weight, self.first(x[0]))


def test_a_bias_that_is_another_linears_output_comes_from_what_that_became() -> None:
    model = BiasOfALinear().eval()
    recipe = micromix.calibrate(model, [torch.randn(5, 64)], micromix.MicroMixConfig(policy="mxfp8"))
    session = session_with(find_linears, rewrite_linears, model=model, recipe=recipe)
    gm, _, targets = trace(model, torch.randn(5, 64), session=session)
    assert targets["micromix.mixed_mx_mm.default"] == 2
    first, second = (node for node in gm.graph.nodes if node.target is ops.mixed_mx_mm)
    assert second.args[8].all_input_nodes[0] is first

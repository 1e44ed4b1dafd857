"""Where observers go."""

from __future__ import annotations

import pytest
import torch
from support.graphs import session_with, trace
from support.models import Block

from micromix_compile.passes import (
    find_linears,
    insert_observers,
)

pytestmark = pytest.mark.versions


def test_linears_that_share_an_input_share_an_observer() -> None:
    block = Block(64, 96).eval()
    session = session_with(find_linears, insert_observers, model=block)
    gm, context, _ = trace(block, torch.randn(2, 5, 64), session=session)
    observed = [node for node in gm.graph.nodes if node.target == context.owner.observe]
    assert [len(node.args[1]) for node in observed] == [2, 1]
    assert {node.args[0] for node in observed} == {context.sites[0].x, context.sites[2].x}

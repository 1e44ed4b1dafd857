"""Where observers go."""

from __future__ import annotations

import pytest
import torch
from support.graphs import session_with, trace
from support.models import Block
from torch import nn

from micromix_compile.config import MicroMixConfig
from micromix_compile.passes import (
    find_linears,
    insert_observers,
)
from micromix_compile.session.session import Session

pytestmark = pytest.mark.versions


def test_linears_that_share_an_input_share_an_observer() -> None:
    block = Block(64, 96).eval()
    session = session_with(find_linears, insert_observers, model=block)
    gm, context, _ = trace(block, torch.randn(2, 5, 64), session=session)
    observed = [node for node in gm.graph.nodes if node.target == context.owner.observe]
    assert [len(node.args[1]) for node in observed] == [2, 1]
    assert {node.args[0] for node in observed} == {context.sites[0].x, context.sites[2].x}


def test_a_convolution_reads_what_was_observed_even_where_another_one_made_it() -> None:
    net = nn.Sequential(nn.Conv1d(64, 96, 1), nn.Conv1d(96, 64, 1)).eval()
    session = Session(MicroMixConfig(convolutions=True))
    session.passes = (find_linears, insert_observers)  # type: ignore[attr-defined]
    session.prepare(net)
    gm, context, _ = trace(net, torch.randn(2, 64, 5), session=session)
    observed = [node.args[0] for node in gm.graph.nodes if node.target == context.owner.observe]
    assert [site.node.args[0].args[0] for site in context.sites] == observed  # its inverse view
    assert len(gm(*context.example_inputs)) == 1

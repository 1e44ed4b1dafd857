"""Graphs that Dynamo compiled for one layer and reuses for others."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.session.session import Session

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]

CHEAP = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)


@pytest.mark.parametrize("width", [64, 128])
def test_equal_layers_compiled_one_by_one_share_a_graph_and_know_which_way_weights_are_used(width: int) -> None:
    """Dynamo compiles the first only; the others' weights, (in, out) as Conv1D has them, meet its graph."""
    layers = [nn.Sequential(Conv1D(width, 64), nn.GELU(), Conv1D(64, width)) for _ in range(3)]
    whole, x = nn.Sequential(*layers).eval(), torch.randn(5, 64)
    recipe = micromix.calibrate(whole, [x], CHEAP, progress=False)
    apart = copy.deepcopy(whole)
    for layer in apart:
        layer.compile(backend="micromix", options={"recipe": recipe, "strict": True})
    with torch.no_grad():
        want = torch.compile(copy.deepcopy(whole), backend="micromix", options={"recipe": recipe})(x)
        torch.testing.assert_close(apart(x), want)


def test_a_weight_that_a_graph_before_used_the_other_way_round_is_an_error() -> None:
    """`find_linears` leaves it alone where a graph is compiled for it; one that is reused can't."""
    net, x = nn.Sequential(nn.Linear(64, 64)).eval(), torch.randn(5, 64)
    session = Session(CHEAP, micromix.calibrate(net, [x], CHEAP, progress=False))
    session.prepare(net)
    session.packed(net[0].weight, transposed=False)
    with pytest.raises(RuntimeError, match=r"0: its weight is used both as it is and transposed; skip='0' leaves"):
        session.packed(net[0].weight, transposed=True)

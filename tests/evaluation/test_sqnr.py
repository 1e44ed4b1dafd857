"""The noise of each linear against the formula."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import make_net
from torch import Tensor

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation.sqnr import linear_sqnr

VOCABULARY = 37


class WindowNet(torch.nn.Module):
    """`Net` over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.net = make_net(layers=1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(self.embedding(input_ids)))


def test_the_noise_of_a_linear_is_measured_on_exact_inputs() -> None:
    """The first linear's figure follows from its weights and inputs; MXFP8's is about 12 dB above MXFP4's."""
    model, windows = WindowNet().eval(), torch.randint(VOCABULARY, (2, 30))
    found = {}
    for policy in ("mxfp4", "mxfp8"):
        recipe = micromix.calibrate(model, windows.split(1), MicroMixConfig(policy=policy, activations="same"))
        packed = micromix.quantize_(copy.deepcopy(model), recipe)
        found[policy] = linear_sqnr(model, packed, windows)
        block, twin = model.net.layers[0], packed.net.layers[0]
        with torch.no_grad():
            x = block.norm(model.embedding(windows))
            exact, noise = block.gate(x), twin.gate(x) - block.gate(x)
        expected = 10 * math.log10(float(exact.square().sum() / noise.square().sum()))
        assert found[policy]["net.layers.0.gate"] == pytest.approx(expected, abs=1e-3)
    assert set(found["mxfp4"]) == {f"net.layers.0.{name}" for name in ("gate", "up", "down")}
    assert all(8 < found["mxfp8"][name] - found["mxfp4"][name] < 20 for name in found["mxfp4"])

"""Quantized graphs: what is said of targets and of layers that run otherwise."""

from __future__ import annotations

import dataclasses
import logging
import re

import pytest
import torch
from support.compiled import batches, compiled_with
from support.models import make_net
from support.targets import FOLDING, served_by
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.targets.target import Target
from micromix_compile.verbs import quantized

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


def test_strict_refuses_plain_pytorch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    plain = Target(name="cpu (plain PyTorch)", emulated="no compiler")
    monkeypatch.setattr(quantized, "_said", set())
    refused = pytest.raises(BackendCompilerFailed, match=r"strict=True: the linears run as plain PyTorch.*no compiler")
    with served_by(plain), refused:
        compiled_with(net, recipe, strict=True)(torch.randn(2, 5, 64))
    torch._dynamo.reset()
    with served_by(plain), caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        compiled_with(net, recipe)(torch.randn(2, 5, 64))
    assert len(re.findall("plain PyTorch operations", caplog.text)) == 1


def test_a_position_on_another_device_leaves_linears_what_their_own_device_runs(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph has a 0-dimensional input and a table, whose devices are not asked; "meta" is no linear's device."""
    net, asked = make_net(torch.bfloat16, layers=1), []

    class Positioned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, x: Tensor, scale: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x * scale), table.clone()

    x, scale, table = torch.randn(2, 5, 64).bfloat16(), torch.tensor(2.0), torch.empty(3, device="meta")
    model = Positioned().eval()
    recipe = micromix.calibrate(net, [x])
    original = quantized.target_of

    def target_of(device: torch.device, *, exact: bool) -> Target:
        asked.append(device)
        return original(device, exact=exact)

    monkeypatch.setattr(quantized, "target_of", target_of)
    with torch.no_grad(), served_by(FOLDING):
        out, _ = compiled_with(model, recipe)(x, scale, table)
        micromix.quantize_(net, recipe)
        expected = net(2 * x)
    assert asked == [torch.device("cpu")]
    assert (out - expected).float().abs().mean() <= 2.0**-7 * expected.float().abs().mean()


def test_layers_that_fall_out_of_compilation_are_reported(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net(layers=2, breaks=True)
    recipe = micromix.calibrate(net, batches())
    formats = {"0": "mxfp8", "1": "mxfp6"}  # other splits: the second layer needs a graph of its own
    uniform = {layer: micromix.assign(recipe, MicroMixConfig(policy=name)) for layer, name in formats.items()}
    linears = {fqn: uniform[fqn.split(".")[1]].linears[fqn] for fqn in recipe.linears}
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1), torch.no_grad(), caplog.at_level(logging.WARNING):
        fast = compiled_with(net, dataclasses.replace(recipe, linears=linears))
        for _ in range(4):
            fast(torch.randn(2, 5, 64))
    assert re.search(r"linears of Net have a recipe but ran quantized seldom or never \(layers.1", caplog.text)

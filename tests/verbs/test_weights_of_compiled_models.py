"""Weights of a compiled model that change, are loaded again or saved; packed ones, that go."""

from __future__ import annotations

import copy
import gc
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import fake_quantized, make_net

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import pack_weight

if TYPE_CHECKING:
    from pathlib import Path

from support.compiled import batches, close, compiled_with

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


def test_a_changed_weight_is_packed_again() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches(), MicroMixConfig(weight_rounding="nearest", scale_search=False))
    fast, x = compiled_with(net, recipe), torch.randn(2, 9, 64)
    with torch.no_grad():
        before = fast(x)
        net.layers[0].down.weight.mul_(2.0)  # exact in every format
        assert close(fast(x), fake_quantized(net, recipe)(x))
        assert not torch.equal(fast(x), before)


def test_a_weight_that_changed_between_calibration_and_the_first_call_is_not_the_one_that_was_rounded(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, x = make_net(layers=1), torch.randn(2, 9, 64)
    recipe = micromix.calibrate(net, batches())
    up = net.layers[0].up.weight
    with torch.no_grad():
        up.view(-1)[1] = 100.0  # not an element of `weight_sample`
        assert torch.equal(compiled_with(net, recipe)(x), micromix.quantize_(copy.deepcopy(net), recipe)(x))
        packed = micromix.quantize_(net, recipe)
    assert "layers.0.up has changed since it was calibrated: it is rounded to nearest" in caplog.text
    assert "layers.0.gate" not in caplog.text
    linear = recipe.linears["layers.0.up"]
    want = pack_weight(up, linear.group, recipe.config)
    assert torch.equal(packed.layers[0].up.weight_q8, want.w8)
    assert torch.equal(packed.layers[0].up.weight_scale, want.w_scale)


def test_the_same_weights_loaded_again_stay_as_calibration_rounded_them(caplog: pytest.LogCaptureFixture) -> None:
    net, x = make_net(layers=1), torch.randn(2, 9, 64)
    fast = compiled_with(net, micromix.calibrate(net, batches()))
    with torch.no_grad():
        before = fast(x)
        net.load_state_dict(copy.deepcopy(net.state_dict()))
        assert torch.equal(fast(x), before)
    assert "rounded to nearest" not in caplog.text


def test_parameters_of_a_compiled_model_are_saved_for_weights_only(tmp_path: Path) -> None:
    net = make_net(layers=1)
    fast = compiled_with(net, micromix.calibrate(net, batches()))
    with torch.no_grad():
        fast(torch.randn(2, 9, 64))
    torch.save(dict(net.named_parameters()), tmp_path / "weights.pt")
    loaded = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert torch.equal(loaded["layers.0.up.weight"], net.layers[0].up.weight)


def test_packed_weights_go_with_the_compiled_code() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    fast = compiled_with(net, recipe)
    with torch.no_grad():
        fast(torch.randn(2, 5, 64))
    assert any("_micromix" in name for name in vars(net.layers[0].down.weight))
    del fast
    torch._dynamo.reset()
    gc.collect()
    assert not any("_micromix" in name for name in vars(net.layers[0].down.weight))

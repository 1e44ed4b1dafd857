"""torch.compile(model, backend="micromix") without a recipe: the model calibrates and converts itself."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import fake_quantized, make_net
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.session import registry

if TYPE_CHECKING:
    from collections.abc import Callable

from support.compiled import batches, close

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


def observed_tokens(net: nn.Module) -> set[int]:
    """Tokens that the observers of a model that is still calibrating itself have seen."""
    own = [session for session in registry.sessions() if session.is_model(net) and session.recipe is None]
    return {observer.tokens for session in own for observer in session.observation.observers()}


def test_a_model_calibrates_and_converts_itself(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    original, inputs = copy.deepcopy(net), batches(4)
    fast = torch.compile(net, backend="micromix", options={"calibration_batches": 3})
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        for x in inputs[:3]:
            assert close(fast(x), original(x))
        assert "Net now runs quantized" in caplog.text
        recipe = micromix.recipe_of(net)
        assert recipe is not None
        assert recipe.config.activations == "fp8"
        assert close(fast(inputs[3]), fake_quantized(original, recipe)(inputs[3]))


def test_it_converts_after_enough_tokens() -> None:
    net = make_net(layers=1)
    original = copy.deepcopy(net)
    fast = torch.compile(net, backend="micromix", options={"calibration_tokens": 20})
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(2, 5, 64)
            assert close(fast(x), original(x))
        assert not close(fast(x), original(x))


def test_it_converts_itself_across_graph_breaks_and_layers_compiled_alone() -> None:
    broken, regional = make_net(layers=2, breaks=True), make_net(layers=3)
    for net in (broken, regional):
        original, inputs = copy.deepcopy(net), batches(5)
        options = {"calibration_batches": 3, "policy": "mxfp8-anchor"}
        if net is regional:
            for layer in net.layers:
                layer.compile(backend="micromix", options=options)
            fast: Callable[..., Tensor] = net
        else:
            fast = torch.compile(net, backend="micromix", options=options)
        with torch.no_grad():
            for x in inputs[:3]:
                assert close(fast(x), original(x))
            recipe = micromix.calibrate(original, inputs[:3], MicroMixConfig(policy="mxfp8-anchor"))
            assert close(fast(inputs[3]), fake_quantized(original, recipe)(inputs[3]))


def test_the_attention_mask_of_a_call_keeps_padding_out() -> None:
    net = make_net(layers=1)
    x = torch.randn(2, 6, 64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    recipe = micromix.calibrate(net, [{"x": x, "attention_mask": mask}])
    statistics = recipe.linears["layers.0.gate"].group.statistics
    assert statistics.tokens == 10
    net = copy.deepcopy(net)
    fast = torch.compile(net, backend="micromix", options={"calibration_batches": 4})
    with torch.no_grad():
        fast(x=x, attention_mask=mask)
        assert observed_tokens(net) == {10}
        fast(x=x)  # no mask: an earlier call's must not linger
        assert observed_tokens(net) == {10 + 12}


def test_a_deep_copy_keeps_the_recipe_and_calibrates_anew_where_its_weights_are_others(
    caplog: pytest.LogCaptureFixture,
) -> None:
    options = {"calibration_batches": 1, "policy": "mxfp8"}
    net, x = make_net(layers=1), torch.randn(2, 5, 64)
    with torch.no_grad():
        torch.compile(net, backend="micromix", options=options)(x)
        same, other = copy.deepcopy(net), copy.deepcopy(net)
        other.load_state_dict({name: value.flip(0) for name, value in other.state_dict().items()})
        fast = torch.compile(same.train(), backend="micromix", options=options)
        with pytest.raises(BackendCompilerFailed, match="Net is in training mode"):
            fast(x)
        same.eval()
        fast(x)
        assert micromix.recipe_of(same) is micromix.recipe_of(net)
        want = copy.deepcopy(other)(x)
        fast = torch.compile(other, backend="micromix", options=options)
        assert close(fast(x), want)
    assert "Net, a copy of a model that converted itself, calibrates anew: the recipe was made for Net" in caplog.text
    assert micromix.recipe_of(other) is not micromix.recipe_of(net)
    assert not close(fast(x), want)

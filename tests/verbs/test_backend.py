"""torch.compile(model, backend="micromix") with a recipe, on models small enough to compile in seconds."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import EXACT_DTYPE, fake_quantized, make_net
from torch import Tensor, nn
from transformers.models.falcon.modeling_falcon import FalconLinear

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from pathlib import Path

from support.compiled import assert_statistics_equal_hooks, batches, close, compiled_with

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


@pytest.mark.parametrize("weights", ["same", "mxfp4"])
@pytest.mark.parametrize("fp6", ["e2m3", "e3m2"])
def test_a_compiled_model_equals_its_fake_quantized_twin(weights: str, fp6: str) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp8-anchor", weights=weights, fp6=fp6))
    assert all(min(linear.split) > 0 for linear in recipe.linears.values() if linear.in_features == 96)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(net, recipe)(x), fake_quantized(net, recipe)(x))
        assert not close(compiled_with(net, recipe)(x), net(x))


@pytest.mark.parametrize("rotate", ["none", "all"])
@pytest.mark.parametrize("activations", ["same", "fp8", "mxfp6"])
def test_activations_of_any_format_equal_the_fake_quantized_twins(activations: str, rotate: str) -> None:
    net = make_net(layers=1)
    config = MicroMixConfig(activations=activations, rotate=rotate, target_bits=5.0)
    recipe = micromix.calibrate(net, batches(), config)
    assert all((group.rotated > 0) == (rotate == "all") for group in recipe.groups.values())
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(net, recipe)(x), fake_quantized(net, recipe)(x))


@pytest.mark.parametrize(("activations", "rotate"), [("same", "none"), ("fp8", "all"), ("mxfp6", "all")])
def test_a_compiled_model_gives_the_bits_of_eager_packed_modules(activations: str, rotate: str) -> None:
    net = make_net(EXACT_DTYPE)
    config = MicroMixConfig(activations=activations, rotate=rotate)
    recipe = micromix.calibrate(net, [x.to(EXACT_DTYPE) for x in batches()], config)
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    x = torch.randn(2, 9, 64).to(EXACT_DTYPE)
    with torch.no_grad():
        assert torch.equal(compiled_with(net, recipe)(x), packed(x))


def test_batch_and_length_may_change_between_calls() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    twin, fast = fake_quantized(net, recipe), compiled_with(net, recipe)
    with torch.inference_mode():
        for shape in ((2, 9), (1, 1), (3, 4), (2, 9), (1, 30)):
            x = torch.randn(*shape, 64)
            assert close(fast(x), twin(x)), shape
        assert fast(torch.randn(0, 5, 64)).shape == (0, 5, 16)


def test_float16_and_odd_channel_counts_work() -> None:
    """Linears alone: before 2.13 Inductor keeps chains of float16 operations in float32, where eager rounds."""
    net = nn.Sequential(nn.Linear(50, 70), nn.Linear(70, 50, bias=False)).half().eval()
    recipe = micromix.calibrate(net, [x.half() for x in batches(channels=50)])
    assert set(recipe.padded.values()) == {(50, 64), (70, 96)}
    x = torch.randn(2, 9, 50).half()
    with torch.no_grad():
        assert torch.equal(compiled_with(net, recipe)(x), micromix.quantize_(copy.deepcopy(net), recipe)(x))


def test_a_recipe_may_be_a_path_and_its_splits_solved_again(tmp_path: Path) -> None:
    net = make_net(layers=1)
    micromix.calibrate(net, batches()).save(tmp_path / "net.safetensors")
    recipe = micromix.assign(micromix.Recipe.load(tmp_path / "net.safetensors"), MicroMixConfig(policy="mxfp8"))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        fast = compiled_with(net, str(tmp_path / "net.safetensors"), policy="mxfp8")
        assert close(fast(x), fake_quantized(net, recipe)(x))


def test_layers_that_share_one_graph_keep_their_own_weights() -> None:
    net = make_net(layers=4, breaks=True)  # a graph break inside every layer of the loop
    inputs = batches()
    recipe = micromix.calibrate(net, inputs)
    assert_statistics_equal_hooks(recipe, net, inputs)
    one_split = micromix.assign(recipe, MicroMixConfig(policy="mxfp6"))  # equal splits: one graph for all layers
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(net, one_split)(x), fake_quantized(net, one_split)(x))
        torch._dynamo.reset()
        assert close(compiled_with(net, recipe)(x), fake_quantized(net, recipe)(x))


def test_layers_compiled_one_by_one_keep_their_own_weights() -> None:
    net = make_net(layers=3)
    recipe = micromix.calibrate(net, batches())
    uniform = micromix.assign(recipe, MicroMixConfig(policy="mxfp8"))
    twins = {name: fake_quantized(net, r) for name, r in (("mixed", recipe), ("uniform", uniform))}
    x = torch.randn(2, 9, 64)
    for name, r in (("mixed", recipe), ("uniform", uniform)):
        torch._dynamo.reset()
        for layer in net.layers:
            layer.compile(backend="micromix", options={"recipe": r})
        with torch.no_grad():
            assert close(net(x), twins[name](x)), name


def test_tied_embeddings_stay_whole() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(50, 64)
            self.body = make_net(layers=1)
            self.lm_head = nn.Linear(64, 50, bias=False)
            self.lm_head.weight = self.embed.weight
            self.body.lm_head = nn.Identity()

        def forward(self, ids: Tensor) -> Tensor:
            return self.lm_head(self.body(self.embed(ids)))

    model = Tied().eval()
    ids = torch.randint(0, 50, (2, 7))
    recipe = micromix.calibrate(model, [ids])
    assert "lm_head" in recipe.refused
    with torch.no_grad():
        assert close(compiled_with(model, recipe)(ids), fake_quantized(model, recipe)(ids))
        everything = micromix.calibrate(model, [ids], MicroMixConfig(skip=()))
        assert "lm_head" in everything.linears
        packed = micromix.quantize_(copy.deepcopy(model), everything)
        assert close(packed(ids), fake_quantized(model, everything)(ids))
        assert packed.embed.weight.shape == (50, 64)


def test_a_weight_that_is_transposed_in_the_graph_is_a_linear() -> None:
    model = nn.Sequential(FalconLinear(64, 48)).eval()
    recipe = micromix.calibrate(model, [torch.randn(2, 5, 64)])
    twin, x = fake_quantized(model, recipe), torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(model, recipe)(x), twin(x))
        assert close(micromix.quantize_(model, recipe)(x), twin(x))


def test_a_weight_that_another_graph_uses_transposed_stays_there() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x: Tensor) -> Tensor:
            y = x @ self.weight
            torch._dynamo.graph_break()
            return y @ self.weight.T

    model, x = Both().eval(), torch.randn(2, 9, 64)
    config = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, batches(), config)
    with torch.no_grad():
        got, want = compiled_with(model, recipe)(x), model(x)
    assert 0 < (got - want).norm() < 0.1 * want.norm()


def test_gradients_are_not_asked_for() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    out = compiled_with(net, recipe)(torch.randn(2, 9, 64))  # grad mode is on, as users forget to turn it off
    assert not out.requires_grad


def test_other_modules_packed_weights_share_one_quantize() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(torch.compile(packed, backend="micromix")(x), fake_quantized(net, recipe)(x))
        assert close(torch.compile(packed, backend="inductor")(x), fake_quantized(net, recipe)(x))

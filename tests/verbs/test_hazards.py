"""Ways in which a backend can be silently wrong: graphs, weights and sessions that change or are shared."""

from __future__ import annotations

import copy
import io
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import fake_quantized, make_net
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering.torch_private import inductor as torch_inductor

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def compiled_with(model: Callable[..., Any], recipe: micromix.Recipe, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options={"recipe": recipe, **options})


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal up to float32 accumulation order of at most 128 channels."""
    assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_linear_may_read_another_linears_output() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64)).eval()
    recipe = micromix.calibrate(model, [torch.randn(4, 64)])
    x = torch.randn(3, 64)
    with torch.no_grad():
        assert_close(compiled_with(model, recipe)(x), fake_quantized(model, recipe)(x))


def test_an_explicit_default_is_not_the_recipes_choice() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    fp4 = micromix.assign(recipe, MicroMixConfig(policy="mxfp4"))
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        assert_close(compiled_with(net, recipe)(x), fake_quantized(net, recipe)(x))
        assert_close(compiled_with(net, fp4)(x), fake_quantized(net, fp4)(x))
        uniform = micromix.assign(recipe, MicroMixConfig(policy="mxfp8"))
        assert_close(compiled_with(net, fp4, policy="mxfp8")(x), fake_quantized(net, uniform)(x))


def test_functions_over_different_models_calibrate_apart() -> None:
    inputs = [torch.randn(2, 5, 64) for _ in range(3)]
    by_thresholds = {"policy": "mxfp8-anchor", "weight_rounding": "gptq"}  # which measures the same in both ways
    for net in (make_net(layers=1), make_net(layers=1)):
        original = copy.deepcopy(net)
        options = {"calibration_batches": 2, **by_thresholds}
        fast = torch.compile(lambda x, net=net: net(x), backend="micromix", options=options)
        with torch.no_grad():
            for x in inputs:
                fast(x)
            recipe = micromix.calibrate(original, inputs[:2], MicroMixConfig(**by_thresholds))
            assert_close(fast(inputs[2]), fake_quantized(original, recipe)(inputs[2]))


def test_a_packed_model_reaches_inductor_and_calibrates_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)], MicroMixConfig(skip=("*lm_head", "*.down")))
    packed = micromix.quantize_(net, recipe)
    compiles: list[int] = []
    original = torch_inductor.compile_with_inductor

    def counting(*args: Any) -> Callable[..., Any]:
        compiles.append(1)
        return original(*args)

    monkeypatch.setattr(torch_inductor, "compile_with_inductor", counting)
    fast, x = torch.compile(packed, backend="micromix", options={"calibration_batches": 1}), torch.randn(2, 5, 64)
    with torch.no_grad():
        for _ in range(3):
            assert_close(fast(x), packed(x))
    assert compiles == [1]


class InPlaceBetween(nn.Module):
    """Two linears of one tensor, which changes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone()
        h = self.a(x)
        x[:, :2] = 100.0
        y = self.b(x)
        x.mul_(2.0)
        return h, y + self.b(x)


def test_a_tensor_that_changes_in_place_is_observed_and_quantized_anew() -> None:
    model = InPlaceBetween().eval()
    recipe = micromix.calibrate(model, [torch.randn(4, 64)])
    assert float(recipe.linears["b"].group.statistics.abs_max[0]) == 200.0
    assert float(recipe.linears["a"].group.statistics.abs_max[0]) < 100.0
    x = torch.randn(3, 64)
    with torch.no_grad():
        for actual, expected in zip(compiled_with(model, recipe)(x), fake_quantized(model, recipe)(x), strict=True):
            assert_close(actual, expected)


def test_a_weight_that_is_replaced_does_not_run_unquantized_unsaid() -> None:
    net = make_net(layers=1)
    config = micromix.MicroMixConfig(weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)], config)
    fast, x = compiled_with(net, recipe), torch.randn(2, 5, 64)
    with torch.no_grad():
        fast(x)
        net.layers[0].down.weight.data = 2 * net.layers[0].down.weight.data
        assert_close(fast(x), fake_quantized(net, recipe)(x))
        state = {name: value.clone() + 1 for name, value in net.state_dict().items()}
        net.load_state_dict(state, assign=True)
        assert_close(fast(x), fake_quantized(net, recipe)(x))
    with pytest.raises(BackendCompilerFailed, match="has other weights here"):
        compiled_with(copy.deepcopy(net), recipe)(x)


def test_a_weight_used_in_both_orientations_is_refused_the_second_time() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 64) / 8)

        def forward(self, x: Tensor) -> Tensor:
            return torch.relu(nn.functional.linear(x, self.weight)) @ self.weight

    model = Tied().eval()
    recipe = micromix.calibrate(model, [torch.randn(4, 64)])
    x = torch.randn(3, 64)
    assert recipe.linears["weight"].group.statistics.tokens == 4
    assert recipe.refused == {"weight (transposed)": "its weight is used both as it is and transposed"}
    with torch.no_grad():
        plain = nn.ModuleDict({"weight": nn.Linear(64, 64, bias=False)})
        plain["weight"].weight.copy_(model.weight)
        twin = fake_quantized(plain, recipe)["weight"]
        assert_close(compiled_with(model, recipe)(x), torch.relu(twin(x)) @ model.weight)


def test_a_per_head_norm_is_left_to_the_compiler() -> None:
    class PerHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.rand(64))
            self.out = nn.Linear(128, 32, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            h = x.unflatten(-1, (2, 64))
            h = self.weight * (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5))
            return self.out(h.flatten(-2))

    model = PerHead().eval()
    recipe = micromix.calibrate(model, [torch.randn(2, 5, 128)])
    x = torch.randn(2, 7, 128)
    with torch.no_grad():
        assert_close(compiled_with(model, recipe)(x), fake_quantized(model, recipe)(x))


def test_an_input_without_tokens_does_not_stop_calibration() -> None:
    class Expert(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.main, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.main(x) + self.idle(x[:0]).sum()

    model = Expert().eval()
    recipe = micromix.calibrate(model, [torch.randn(4, 64)])
    assert list(recipe.linears) == ["main"]
    assert recipe.refused == {"idle": "its input had no token that counts: all were masked, or there was none"}


def test_training_mode_is_refused_later_too() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    fast, x = compiled_with(net, recipe), torch.randn(2, 5, 64)
    with torch.no_grad():
        fast(x)
        net.train()
        with pytest.raises(ValueError, match="Net is in training mode"):
            fast(x)
    with pytest.raises(ValueError, match="Net is in training mode"):
        micromix.quantize_(net, recipe)


def test_a_calibrated_and_compiled_model_can_still_be_saved_whole() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    fast, x = compiled_with(net, recipe), torch.randn(2, 5, 64)
    with torch.no_grad():
        fast(x)
        buffer = io.BytesIO()
        torch.save(net, buffer)
        buffer.seek(0)
        loaded = torch.load(buffer, weights_only=False)
        assert torch.equal(loaded(x), net(x))
        assert_close(compiled_with(loaded, recipe)(x), fake_quantized(net, recipe)(x))


def test_a_compiled_model_is_quantized_under_its_wrapper() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    net.layers[0] = torch.compile(net.layers[0], backend="eager")
    wrapped = torch.compile(net, backend="eager")
    assert micromix.quantize_(wrapped, recipe) is wrapped
    assert sum(isinstance(module, micromix.MicroMixLinear) for module in net.modules()) == 3


def test_a_model_can_be_calibrated_as_often_as_one_likes() -> None:
    net = make_net(layers=1)
    for _ in range(torch._dynamo.config.recompile_limit + 2):
        assert len(micromix.calibrate(net, [torch.randn(2, 5, 64)]).linears) == 3


def test_reasons_found_in_the_graph_reach_the_user() -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(64, 64)
            self.experts = nn.Parameter(torch.randn(2, 64, 64))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.fc(x), self.experts[1])

    recipe = micromix.calibrate(Experts().eval(), [torch.randn(4, 64)])
    assert list(recipe.refused) == ["experts"]
    assert recipe.refused["experts"].startswith("a matrix of it is taken out by index: a stack of matrices is covered")
    with pytest.raises(ValueError, match=r"no linear layer to quantize \(0: its weight is torch.float64"):
        micromix.calibrate(nn.Sequential(nn.Linear(64, 64)).double().eval(), [torch.randn(4, 64).double()])


def test_linears_that_were_not_reached_are_said_at_conversion(caplog: pytest.LogCaptureFixture) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    fast = torch.compile(Two().eval(), backend="micromix", options={"calibration_batches": 1})
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        for _ in range(3):
            fast(torch.randn(2, 64))
    assert "1 were not reached and stay as they are (unused, ...)" in caplog.text

"""torch.compile(model, backend="micromix") end to end, on models small enough to compile in seconds."""

from __future__ import annotations

import copy
import dataclasses
import gc
import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import EXACT_DTYPE, Net, fake_quantized, make_net
from support.targets import FOLDING, served_by
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.models.falcon.modeling_falcon import FalconLinear
from transformers.pytorch_utils import Conv1D

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import pack_weight
from micromix_compile.session import registry
from micromix_compile.targets.target import Target
from micromix_compile.verbs import backend as backend_module
from micromix_compile.verbs.backend import parse_options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from micromix_compile.recipe.types import Recipe

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


def batches(count: int = 3, channels: int = 64) -> list[Tensor]:
    return [torch.randn(2, 5 + i, channels) for i in range(count)]


def compiled_with(model: nn.Module, recipe: Recipe | str, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options={"recipe": recipe, **options})


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to float32 accumulation order: the twin multiplies in another order, K is at most 128."""
    scale = float(expected.abs().max())
    return float((actual.float() - expected.float()).abs().max()) <= 1e-5 * scale


def hooked_abs_mean(model: nn.Module, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """The largest over samples of mean |x|, by forward hooks: an independent reading of what observers see."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor]) -> None:
            mean = args[0].float().abs().mean(1).amax(0)
            seen[name] = torch.maximum(seen.get(name, mean), mean)

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for x in inputs:
            model(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_statistics_equal_hooks(recipe: Recipe, model: nn.Module, inputs: list[Tensor]) -> None:
    expected = hooked_abs_mean(copy.deepcopy(model), inputs, list(recipe.linears))
    for fqn, linear in recipe.linears.items():
        assert linear.group.statistics.batches == len(inputs), fqn
        torch.testing.assert_close(linear.group.statistics.abs_mean, expected[fqn], msg=fqn)


# Recipe in the options


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


def test_a_compiled_model_gives_the_bits_of_eager_packed_modules() -> None:
    net = make_net(EXACT_DTYPE)
    recipe = micromix.calibrate(net, [x.to(EXACT_DTYPE) for x in batches()])
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


# The one-line form


def test_a_model_calibrates_and_converts_itself(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    original, inputs = copy.deepcopy(net), batches(4)
    fast = torch.compile(net, backend="micromix", options={"calibration_batches": 3})
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        for x in inputs[:3]:
            assert close(fast(x), original(x))
        assert "Net now runs quantized" in caplog.text
        recipe = micromix.calibrate(original, inputs[:3])
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


def observed_tokens() -> set[int]:
    """Tokens that the observers of models still calibrating themselves have seen."""
    return {o.tokens for s in registry.sessions() if s.recipe is None for o in s.observers()}


def test_the_attention_mask_of_a_call_keeps_padding_out() -> None:
    net = make_net(layers=1)
    x = torch.randn(2, 6, 64)
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    recipe = micromix.calibrate(net, [{"x": x, "attention_mask": mask}])
    statistics = recipe.linears["layers.0.gate"].group.statistics
    assert statistics.tokens == 10
    fast = torch.compile(copy.deepcopy(net), backend="micromix", options={"calibration_batches": 4})
    with torch.no_grad():
        fast(x=x, attention_mask=mask)
        assert observed_tokens() == {10}
        fast(x=x)  # no mask: an earlier call's must not linger
        assert observed_tokens() == {10 + 12}


# Calibration


@pytest.mark.parametrize("breaks", [False, True])
def test_statistics_equal_those_of_forward_hooks(breaks: bool) -> None:
    net, inputs = make_net(layers=3, breaks=breaks), batches(4)
    recipe = micromix.calibrate(net, inputs)
    assert sorted(recipe.linears) == sorted(f"layers.{i}.{name}" for i in range(3) for name in ("gate", "up", "down"))
    assert recipe.linears["layers.1.gate"].group is recipe.linears["layers.1.up"].group
    assert_statistics_equal_hooks(recipe, net, inputs)


def test_calibration_leaves_the_model_as_it_was() -> None:
    net = make_net(layers=1)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = net(x)
        micromix.calibrate(net, batches())
        assert torch.equal(net(x), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_conv1d_weights_are_calibrated_and_quantized() -> None:
    model = nn.Sequential(Conv1D(48, 64)).eval()
    recipe = micromix.calibrate(model, [torch.randn(2, 5, 64)])
    twin = fake_quantized(model, recipe)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(model, recipe)(x), twin(x))
        assert close(micromix.quantize_(model, recipe)(x), twin(x))


# Bad input


def test_nan_in_calibration_names_layer_and_batch() -> None:
    net = make_net(layers=1)
    bad = torch.randn(2, 5, 64)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibration batch 1: the input of layers.0.gate holds a NaN"):
        micromix.calibrate(net, [torch.randn(2, 5, 64), bad])


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Net is in training mode.*call model.eval\(\)"):
        micromix.calibrate(Net(), batches())
    with pytest.raises(BackendCompilerFailed, match="Net is in training mode"):
        torch.compile(Net(), backend="micromix")(torch.randn(2, 5, 64))


def test_a_model_without_linears_is_told_why() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    with pytest.raises(
        ValueError, match=r"Sequential has no linear layer to quantize \(0: its name matches skip='0'\)"
    ):
        micromix.calibrate(model, [torch.randn(2, 64)], MicroMixConfig(skip=("0",)))
    with pytest.raises(BackendCompilerFailed, match="weight: it is a convolution"):
        torch.compile(nn.Conv1d(1, 1, 1).eval(), backend="micromix")(torch.randn(1, 1, 4))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration of Net reached no linear layer"):
        micromix.calibrate(make_net(layers=1), [])


@pytest.mark.parametrize("batch", [torch.randn(2, 5, 64), {"x": torch.randn(2, 5, 64)}])
def test_one_batch_instead_of_several_is_an_error(batch: object) -> None:
    with pytest.raises(TypeError, match=r"batches must be several tensors or mappings, put one \w+ into a list"):
        micromix.calibrate(make_net(layers=1), batch)  # type: ignore[arg-type]


def test_what_is_packed_is_not_packed_or_calibrated_again_and_takes_no_recipe() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    packed = micromix.quantize_(net, recipe)
    with pytest.raises(ValueError, match=r"Net is packed already: layers.0.gate is a MicroMixLinear"):
        micromix.quantize_(packed, recipe)
    with pytest.raises(ValueError, match="Net holds packed linears: calibrate the model that they were made from"):
        micromix.calibrate(packed, batches())
    for options, name in (({"recipe": recipe}, "recipe"), ({"strict": False, "policy": "mxfp4"}, "policy")):
        with pytest.raises(BackendCompilerFailed, match=f"on which the option {name} has no effect"):
            torch.compile(packed, backend="micromix", options=options)(torch.randn(2, 5, 64))


def test_a_dump_of_no_pass_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"dump must list passes, all, open_attention, find_linears, .*, got 'find_linear'"
    ):
        parse_options(None, {"dump": ["rewrite_linears", "find_linear"]})


def test_a_batch_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="a batch must be a tensor or a mapping of keyword arguments, got int"):
        micromix.calibrate(make_net(layers=1), [3])  # type: ignore[list-item]


def test_a_recipe_for_another_model_names_both() -> None:
    recipe = micromix.calibrate(make_net(layers=1), batches())
    x = torch.randn(2, 5, 64)
    with pytest.raises(BackendCompilerFailed, match=r"made for Net, and this model is Net: layers.0.gate has other"):
        compiled_with(make_net(layers=1), recipe)(x)
    wide = make_net(layers=1, hidden=128)
    with pytest.raises(ValueError, match=r"layers.0.gate is \(96, 64\) there and \(128, 64\) here"):
        micromix.quantize_(wide, recipe)
    other = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.raises(BackendCompilerFailed, match=r"this model is Sequential: it has no layers\.0"):
        compiled_with(other, recipe)(x)


def test_unknown_options_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'polcy'; .*recipe, mode, policy, target_bits, target_kind"):
        parse_options(None, {"polcy": "paper"})
    with pytest.raises(TypeError, match="recipe must be a Recipe or the path of one, got int"):
        parse_options(None, {"recipe": 3})
    with pytest.raises(BackendCompilerFailed, match="granularity must be one of 32, 64, 128, got 48"):
        torch.compile(make_net(), backend="micromix", options={"granularity": 48})(torch.randn(2, 5, 64))


def test_inductors_options_and_modes_pass_through() -> None:
    parsed = parse_options(None, {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False, "lam": 2.0})
    assert parsed.inductor == {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}
    assert parsed.ours == {"lam": 2.0}


def test_strict_refuses_plain_pytorch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    plain = Target(name="cpu (plain PyTorch)", emulated="no compiler")
    monkeypatch.setattr(backend_module, "_said", set())
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
    original = backend_module.target_of

    def target_of(device: torch.device, *, exact: bool) -> Target:
        asked.append(device)
        return original(device, exact=exact)

    monkeypatch.setattr(backend_module, "target_of", target_of)
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

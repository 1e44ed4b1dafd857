"""What a notebook does: calibrating and compiling again and again in one process, and modules inside others."""

from __future__ import annotations

import copy
import gc
import io
import logging
import threading
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
from support.models import Net, make_net
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from micromix_compile.recipe.types import Recipe

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]

CHEAP: dict[str, Any] = {"weight_rounding": "nearest", "scale_search": False, "granularity": 32}
"""Options with which calibrating takes milliseconds."""


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def batches(count: int = 2) -> list[Tensor]:
    return [torch.randn(2, 5 + i, 64) for i in range(count)]


def linear_net(dtype: torch.dtype = torch.float32) -> nn.Module:
    """Linears alone: compiled and eager differ in nothing."""
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval().to(dtype)


def fast(model: Any, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options=options or None)


def packed(model: nn.Module, recipe: Recipe) -> nn.Module:
    return micromix.quantize_(copy.deepcopy(model), recipe)


def differs(a: Tensor, b: Tensor) -> bool:
    """By more than rounding to another order of sums would."""
    return float((a - b).abs().max()) > 1e-4 * float(b.abs().max())


# Any number of calibrations, recipes, options and lengths


def test_a_notebook_may_calibrate_and_compile_one_model_twenty_times(caplog: pytest.LogCaptureFixture) -> None:
    net, x = linear_net(), torch.randn(2, 9, 64)
    configs = [
        MicroMixConfig(policy=policy, **bits)
        for policy, options in (
            ("budget", [{"target_bits": 4.5 + 0.25 * i} for i in range(10)]),
            ("mxfp8-anchor", [{"lam": 2.0**-i} for i in range(7)]),
            ("mxfp6", [{}, {"fp6": "e3m2"}, {}]),
        )
        for bits in options
    ]
    assert len(configs) == 20
    for config in configs:
        recipe = micromix.calibrate(net, batches(), config)
        assert torch.equal(fast(net, recipe=recipe)(x), packed(net, recipe)(x)), config
    assert not [r for r in caplog.records if r.name.startswith("torch") and r.levelno >= logging.WARNING]


def test_calibrating_in_one_process_leaves_no_compiled_code_and_other_backends_their_own() -> None:
    net, x, compiled = linear_net(), torch.randn(2, 9, 64), []

    def other(gm: torch.fx.GraphModule, _: list[Any]) -> Callable[..., Any]:
        compiled.append(gm)
        return gm.forward

    before = torch.compile(net, backend=other)
    before(x)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for _ in range(5):
            recipe = micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp6", **CHEAP))
            fast(net, recipe=recipe)(x)
        before(x)
        torch.compile(net, backend=lambda gm, inputs: other(gm, inputs))(x)
    assert len(compiled) == 2


def test_calibrations_of_models_that_live_no_more_are_freed_in_one_process() -> None:
    net = linear_net()
    micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp6", **CHEAP))
    weight = ref(net[0].weight)
    del net
    gc.collect()
    assert weight() is None


def test_one_process_may_hold_more_models_of_one_class_and_more_options_than_dynamos_limit() -> None:
    x = torch.randn(2, 9, 64)
    with torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True):
        for fp6 in ("e2m3", "e3m2"):
            for _ in range(3):
                net = linear_net()
                plain = net(x)
                run = fast(net, policy="mxfp6", fp6=fp6, calibration_batches=1, **CHEAP)
                assert torch.equal(run(x), plain)
                assert differs(run(x), plain)


def test_a_process_that_sees_eight_lengths_one_by_one_stays_quantized() -> None:
    net = linear_net()
    run = torch.compile(net, backend="micromix", dynamic=False, options={"policy": "mxfp4", "calibration_batches": 8})
    for length in range(1, 9):
        run(torch.randn(1, length, 64))
    twin = packed(net, micromix.recipe_of(net))
    for length in range(1, 9):
        x = torch.randn(1, length, 64)
        assert torch.equal(run(x), twin(x)), length


@pytest.mark.parametrize("strict", [False, True])
def test_a_process_that_passes_the_limit_is_told_what_runs_unquantized(
    strict: bool, caplog: pytest.LogCaptureFixture
) -> None:
    net = linear_net()
    recipe = micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp4", **CHEAP))
    run = torch.compile(net, backend="micromix", dynamic=False, options={"recipe": recipe, "strict": strict})
    with torch._dynamo.config.patch(recompile_limit=2):
        for length in (1, 2):
            run(torch.randn(1, length, 64))
        assert "UNQUANTIZED" not in caplog.text
        if strict:
            with pytest.raises(
                RuntimeError, match=r"strict=True: torch.compile gave up on Sequential at .*recompile_limit=2"
            ):
                run(torch.randn(1, 3, 64))
        else:
            run(torch.randn(1, 3, 64))
            assert "its linears run UNQUANTIZED" in caplog.text


# What a recipe is known by


def test_a_notebook_cell_may_be_run_twice(tmp_path: Path) -> None:
    net, x, config = linear_net(), torch.randn(2, 9, 64), MicroMixConfig(policy="mxfp6", **CHEAP)
    inputs, outputs = batches(), []
    for _ in range(2):
        recipe = micromix.calibrate(net, inputs, config)
        recipe.save(tmp_path / "recipe.safetensors")
        outputs.append(fast(net, recipe=recipe)(x))
        outputs.append(fast(net, recipe=micromix.Recipe.load(tmp_path / "recipe.safetensors"))(x))
    assert all(torch.equal(outputs[0], other) for other in outputs)


def test_one_calibration_may_be_asked_for_equal_configs() -> None:
    net, config = linear_net(), MicroMixConfig(target_bits=5.0)
    first, second = micromix.calibrate_each(net, batches(), [config, config])
    assert torch.equal(packed(net, first)(torch.ones(1, 64)), packed(net, second)(torch.ones(1, 64)))


def test_a_recipe_file_that_is_written_anew_is_another_recipe_to_the_process(tmp_path: Path) -> None:
    net, x, path = linear_net(), torch.randn(2, 9, 64), tmp_path / "recipe.safetensors"
    recipes = [micromix.calibrate(net, batches(), MicroMixConfig(policy=p, **CHEAP)) for p in ("mxfp8", "mxfp4")]
    run = fast(net, recipe=str(path))
    for recipe in (*recipes, *recipes):
        recipe.save(path)
        assert torch.equal(run(x), packed(net, recipe)(x))
    path.unlink()
    assert torch.equal(run(x), packed(net, recipes[1])(x)), "a file that is gone was read before"


# Which model is compiled


class Holder(nn.Module):
    """A wrapper that is in training mode, such as a trainer's, or holds models in a plain list."""

    def __init__(self, *models: Callable[..., Tensor]) -> None:
        super().__init__()
        self.models = list(models)
        self.own = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return sum((model(x) for model in self.models), self.own(x) * 0)  # type: ignore[return-value]


class Trainer(Holder):
    def __init__(self, model: Callable[..., Tensor]) -> None:
        super().__init__(model)
        self.teacher = model
        self.teacher.eval()


@pytest.mark.parametrize("wrapper", [Holder, Trainer])
@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_first_called_inside_another_module_of_the_process_is_itself(wrapper: type, in_place: bool) -> None:
    net, x = make_net(layers=1, breaks=True), torch.randn(2, 9, 64)
    recipe = micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp6", **CHEAP))
    want = packed(net, recipe)(x)
    if in_place:
        net.compile(backend="micromix", options={"recipe": recipe})
    run = net if in_place else fast(net, recipe=recipe)
    outer = wrapper(run).train()
    net.eval()
    # 16 outputs of `net` beside 64 of `own`: only the model's are looked at
    outer.own = nn.Linear(64, 16)
    assert not differs(outer(x), want)
    assert not differs(outer(torch.cat((x, x))), torch.cat((want, want))), "recompiled inside"
    assert not differs(run(x), want), "called alone, it is the same model"
    assert micromix.recipe_of(net) is recipe


def test_members_of_an_ensemble_calibrate_apart_in_one_process() -> None:
    one, two = linear_net(), linear_net()
    x = torch.randn(2, 9, 64)
    runs = [fast(net, policy="mxfp6", calibration_batches=1, **CHEAP) for net in (one, two)]
    ensemble = Holder(*runs).eval()
    ensemble(x)
    want = packed(one, micromix.recipe_of(one))(x) + packed(two, micromix.recipe_of(two))(x)
    assert not differs(ensemble(x), want)


def test_layers_with_equal_weights_compiled_one_by_one_in_a_process_run_by_their_own_recipes() -> None:
    net = make_net(layers=3)
    for layer in net.layers:
        layer.load_state_dict(net.layers[0].state_dict())
    inputs, x = batches(), torch.randn(2, 9, 64)
    recipe = micromix.calibrate(net, inputs, MicroMixConfig(target_bits=5.0))
    splits = {recipe.linears[f"layers.{i}.down"].split for i in range(3)}
    assert len(splits) > 1, "equal weights that see other activations are split otherwise"
    want = packed(net, recipe)(x)
    for layer in net.layers:
        layer.compile(backend="micromix", options={"recipe": recipe})
    assert not differs(net(x), want)
    alone = copy.deepcopy(net.layers[0])
    with pytest.raises(BackendCompilerFailed, match=r"gate of Block fits several linears of the recipe \(lay"):
        fast(alone, recipe=recipe)(x)


def test_a_model_in_a_closure_is_found_by_its_sources() -> None:
    net, x = make_net(layers=1), torch.randn(2, 9, 64)
    recipe = micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp6", **CHEAP))
    run = fast(lambda x: net(x) + 1, recipe=recipe)
    assert not differs(run(x), packed(net, recipe)(x) + 1)
    assert micromix.recipe_of(net) is recipe


def test_recipe_of_a_model_that_is_not_compiled_in_this_process_is_an_error() -> None:
    with pytest.raises(ValueError, match="Net has no quantized graph yet: call it first"):
        micromix.recipe_of(make_net(layers=1))


@pytest.mark.parametrize("backend", ["eager", "micromix"])
@pytest.mark.parametrize("layers", [False, True])
def test_a_model_compiled_in_place_calibrates_as_if_it_were_not(backend: str, layers: bool) -> None:
    net, inputs = make_net(layers=2), batches()
    config = MicroMixConfig(policy="mxfp8-anchor", **CHEAP)
    want = micromix.calibrate(copy.deepcopy(net), inputs, config)
    for module in net.layers if layers else [net]:
        module.compile(backend=backend)
    net(inputs[0])
    got = micromix.calibrate(net, inputs, config)
    assert list(got.linears) == list(want.linears)
    assert all(torch.equal(got.groups[g].channel_perm, want.groups[g].channel_perm) for g in want.groups)
    assert (net.layers[0] if layers else net)._compiled_call_impl is not None


# Copies, saving


def converted(net: nn.Module, **options: Any) -> Callable[..., Tensor]:
    run = fast(net, policy="mxfp6", calibration_batches=1, **CHEAP, **options)
    run(torch.randn(2, 9, 64))
    return run


def test_a_deep_copy_of_a_model_that_converted_itself_is_converted() -> None:
    net, x = linear_net(), torch.randn(2, 9, 64)
    run = converted(net)
    want = run(x)
    for twin in (copy.deepcopy(run), fast(copy.deepcopy(net), policy="mxfp6", calibration_batches=1, **CHEAP)):
        assert torch.equal(twin(x), want)
        assert torch.equal(twin(x), want)


def test_saving_a_model_that_converted_itself_says_that_its_own_weights_are_saved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    net, file = linear_net(), io.BytesIO()
    net.state_dict()
    assert "own weights" not in caplog.text
    run = converted(net)
    net.state_dict()
    net.state_dict()
    assert caplog.text.count("the state of Sequential holds its own weights, not the packed ones") == 1
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert loaded.state_dict().keys() == net.state_dict().keys()
    x = torch.randn(2, 9, 64)
    assert torch.equal(packed(net, micromix.recipe_of(net))(x), run(x))


# Threads


def in_threads(*functions: Callable[[], Any]) -> list[Any]:
    """What the functions return that ran at the same time; the first error is raised."""
    results: dict[int, Any] = {}

    def run(i: int) -> None:
        try:
            results[i] = functions[i]()
        except BaseException as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(functions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results.values():
        if isinstance(result, BaseException):
            raise result
    return [results[i] for i in range(len(functions))]


def test_threads_of_one_process_may_calibrate_one_model_at_once() -> None:
    net, inputs = make_net(layers=2), [batches(3), batches(4)]
    config = MicroMixConfig(target_bits=5.0)
    want = [micromix.calibrate(net, each, config) for each in inputs]
    got = in_threads(*(lambda each=each: micromix.calibrate(net, each, config) for each in inputs))
    for a, b in zip(got, want, strict=True):
        assert all(torch.equal(a.groups[g].statistics.abs_mean, b.groups[g].statistics.abs_mean) for g in b.groups)
        assert {g: a.groups[g].split for g in a.groups} == {g: b.groups[g].split for g in b.groups}


def test_each_thread_of_a_process_keeps_its_own_padding_out() -> None:
    net = make_net(layers=1)
    masks = [torch.tensor([[1] * n + [0] * (6 - n)] * 2) for n in (2, 3, 4, 5)]
    run = fast(net, calibration_batches=99, policy="mxfp6", **CHEAP)
    run(torch.randn(2, 6, 64), masks[0])
    turn = threading.Barrier(len(masks))

    def call(mask: Tensor) -> None:
        turn.wait()
        for _ in range(3):
            run(torch.randn(2, 6, 64), mask)

    in_threads(*(lambda mask=mask: call(mask) for mask in masks))
    from micromix_compile.session.registry import sessions

    (session,) = [s for s in sessions() if s.is_model(net)]
    assert {o.tokens for o in session.observation.observers()} == {2 * 2 + 3 * 2 * (2 + 3 + 4 + 5)}


def test_calibrating_does_not_touch_the_process_wide_limits_of_dynamo() -> None:
    seen = []

    class Watching(Net):
        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x, attention_mask)

    net = Watching(layers=1).eval()
    handle = net.lm_head.register_forward_hook(lambda *_: seen.append(torch._dynamo.config.recompile_limit))
    micromix.calibrate(net, batches(), MicroMixConfig(policy="mxfp6", **CHEAP))
    handle.remove()
    assert set(seen) == {torch._dynamo.config.recompile_limit}

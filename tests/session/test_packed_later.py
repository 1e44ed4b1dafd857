"""Models that are packed, wholly or in parts, and what was compiled of them before; training mode of packed ones."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import AutoModelForCausalLM, LlamaConfig

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.session import deciding

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CHEAP: dict[str, Any] = {"policy": "mxfp8", "weight_rounding": "nearest", "scale_search": False}
PLAIN = MicroMixConfig(**CHEAP)
X = torch.randn(2, 5, 64)


def two() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval()


def compiled(model: Any, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options={**CHEAP, **options})


@pytest.mark.parametrize("converted", [False, True])
def test_a_model_packed_after_its_first_calls_runs_as_if_it_had_been_before(
    converted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from micromix_compile.verbs import backend

    model = two()
    run = compiled(model, calibration_batches=1 if converted else 9)
    with torch.no_grad():
        for _ in range(2):
            run(X)
    micromix.quantize_(model, micromix.recipe_of(model) if converted else micromix.calibrate(model, [X], PLAIN))
    graphs, original = [], backend.compile_quantized
    monkeypatch.setattr(backend, "compile_quantized", lambda *args: graphs.append(1) or original(*args))
    x = X.clone().requires_grad_()
    out = run(x)
    assert graphs == [1]
    assert out.requires_grad
    assert torch.allclose(out, model(x), atol=1e-5)


def test_a_packed_model_may_be_in_training_mode_and_one_that_is_not_may_not() -> None:
    model = two()
    recipe = micromix.calibrate(model, [X], PLAIN)
    packed = micromix.quantize_(copy.deepcopy(model), recipe).train()
    out = torch.compile(packed, backend="micromix")(X.clone().requires_grad_())
    assert out.requires_grad
    partly = micromix.quantize_(copy.deepcopy(model), micromix.assign(recipe, dataclasses.replace(PLAIN, skip=("1",))))
    with pytest.raises(BackendCompilerFailed, match="Sequential is in training mode"):
        torch.compile(partly.train(), backend="micromix", options={"recipe": recipe})(X)


LLAMA = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=1, vocab_size=64
)  # fmt: skip


def test_linears_that_are_packed_one_recipe_after_the_other_are_saved_together(tmp_path: Path) -> None:
    model, ids = AutoModelForCausalLM.from_config(LLAMA).eval(), torch.randint(0, 64, (2, 8))
    skip = ("*lm_head", "*down_proj")
    micromix.quantize_(model, micromix.calibrate(model, [ids], dataclasses.replace(PLAIN, skip=skip)))
    rest = micromix.calibrate(model, [ids], PLAIN)
    assert list(rest.linears) == ["model.layers.0.mlp.down_proj"]
    other = micromix.assign(rest, dataclasses.replace(PLAIN, fp6="e3m2"))
    with pytest.raises(ValueError, match="holds linears packed with fp6='e2m3', and one checkpoint has one for all: g"):
        micromix.quantize_(model, other)
    micromix.quantize_(model, rest)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


def test_a_linear_that_converted_itself_is_packed_with_its_model_and_says_nothing_of_plain_weights(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = two()
    runs = [compiled(model[0], calibration_batches=1), compiled(model, calibration_batches=1)]
    with torch.no_grad():
        for run in runs:
            run(X)
            run(X)
    micromix.quantize_(model, micromix.recipe_of(model))
    assert not model.micromix_refused
    model.state_dict()
    assert "own weights" not in caplog.text


def test_a_model_that_is_a_linear_is_told_that_it_cannot_be_replaced(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(64, 64).eval()
    micromix.quantize_(model, micromix.calibrate(model, [X], PLAIN))
    assert "weight stays as it is: the linear is the model itself, which nothing can stand in for" in caplog.text


def test_a_conversion_that_fails_half_way_starts_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model, original, calls = two(), deciding.round_weights, []

    def fails_once(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no memory")
        return original(*args)

    monkeypatch.setattr(deciding, "round_weights", fails_once)
    options = {"weight_rounding": "gptq", "calibration_batches": 2}
    run, batches = compiled(model, **options), [torch.randn(2, 5, 64) for _ in range(4)]
    with torch.no_grad():
        run(batches[0])
        with pytest.raises(torch.OutOfMemoryError):
            run(batches[1])
        run(batches[2])
        run(batches[3])
    want = micromix.calibrate(model, batches[2:], dataclasses.replace(PLAIN, weight_rounding="gptq"), progress=False)
    for fqn, weight in micromix.recipe_of(model).packed.items():
        assert all(map(torch.equal, weight, want.packed[fqn])), fqn

"""What runs unquantized under a recipe though nobody asked for it is said, or refused if strict."""

from __future__ import annotations

import copy
import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("fresh_compiler")

CHEAP: dict[str, Any] = {"policy": "mxfp8", "weight_rounding": "nearest", "scale_search": False}
PLAIN = MicroMixConfig(**CHEAP)
X = torch.randn(2, 5, 64)


class Two(nn.Module):
    """Two linears, and another one where a caller asks for it, or in the place of the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.idle = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, idles: bool = True) -> Tensor:
        x = self.b(torch.relu(self.a(x)))
        return x if idles else self.idle(x)


class Renamed(nn.Module):
    """A linear of `Two`, and one that it has not."""

    def __init__(self, two: Two) -> None:
        super().__init__()
        self.a, self.new, self.lm_head = two.a, nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.lm_head(self.new(self.a(x)))


def said_by(run: Callable[[], object], caplog: pytest.LogCaptureFixture) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        run()
    return [r.getMessage() for r in caplog.records if "unquantized" in r.getMessage()]


def compiled(model: Any, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options=options)


def refused(run: Callable[[], object]) -> str:
    with pytest.raises(BackendCompilerFailed) as error, torch.no_grad():
        run()
    return str(error.value)


def test_a_linear_that_the_recipe_does_not_know_is_said(caplog: pytest.LogCaptureFixture) -> None:
    two = Two().eval()
    recipe = micromix.calibrate(two, [X], PLAIN)
    other = Renamed(two).eval()
    message = "1 linears of Renamed run unquantized (new: the recipe of Two has no such linear)"
    assert said_by(lambda: compiled(other, recipe=recipe)(X), caplog) == [message]
    assert f"strict=True: {message}" in refused(lambda: compiled(other, recipe=recipe, strict=True)(X))
    assert said_by(lambda: compiled(two, recipe=recipe, strict=True)(X, False), caplog) == []


@pytest.mark.parametrize("with_recipe", [True, False])
def test_products_of_a_function_with_what_is_no_parameter_are_said(
    with_recipe: bool, caplog: pytest.LogCaptureFixture
) -> None:
    two = Two().eval()
    tensors = {name: parameter.detach() for name, parameter in two.named_parameters()}
    options = {"recipe": micromix.calibrate(two, [X], PLAIN)} if with_recipe else CHEAP

    def function(tensors: dict[str, Tensor], x: Tensor) -> Tensor:
        return torch.func.functional_call(two, tensors, (x,))

    (message,) = said_by(lambda: compiled(function, **options)(tensors, X), caplog)
    assert message.startswith("2 linears of a function run unquantized (")
    assert "its weight is computed in the graph, not a Parameter" in message
    assert message in refused(lambda: compiled(function, **options, strict=True)(tensors, X))


def test_a_new_skip_takes_linears_out_of_a_recipe() -> None:
    two = Two().eval()
    recipe = micromix.calibrate(two, [X], dataclasses.replace(PLAIN, weight_rounding="gptq"))
    fewer = micromix.assign(recipe, dataclasses.replace(recipe.config, skip=("b",)))
    assert (list(fewer.linears), list(fewer.packed), fewer.refused["b"]) == (["a"], ["a"], "its name matches skip='b'")
    assert isinstance(micromix.quantize_(copy.deepcopy(two), fewer).get_submodule("b"), nn.Linear)
    with pytest.raises(ValueError, match="no linear of the recipe of Two is left: a is left out, for its name matches"):
        micromix.assign(recipe, dataclasses.replace(recipe.config, skip=("*",)))


@pytest.mark.parametrize("first", [0, 1])
def test_each_config_of_a_calibration_skips_its_own(first: int) -> None:
    two = Two().eval()
    configs = [dataclasses.replace(PLAIN, scale_search=True, skip=skip) for skip in ((), ("b",))]
    order = [configs[first], configs[1 - first]]
    recipes = list(micromix.calibrate_each(two, [X], order, progress=False))
    for recipe, config in zip(recipes, order, strict=True):
        alone = micromix.calibrate(two, [X], config, progress=False)
        assert list(recipe.linears) == list(alone.linears) == list(recipe.packed)
        assert (recipe.refused, recipe.left_alone) == (alone.refused, alone.left_alone)


def test_what_skip_names_is_no_linear_left_out(caplog: pytest.LogCaptureFixture) -> None:
    two = Two().eval()
    recipe = micromix.calibrate(two, [X], PLAIN)
    assert said_by(lambda: compiled(two, recipe=recipe, skip=["b"], strict=True)(X), caplog) == []
    assert list(micromix.recipe_of(two).linears) == ["a"]


class Tied(nn.Module):
    """Two linears with one weight, and another."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.b(self.a(x)))


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_tied_weight_is_skipped_by_any_of_its_names_beside_a_recipe_too(wrapped: bool) -> None:
    tied = Tied().eval()
    recipe = micromix.calibrate(tied, [X], PLAIN)
    assert list(recipe.linears) == ["b", "c"]
    model = nn.Sequential(tied).eval() if wrapped else tied  # whose names are longer than the recipe's
    fewer = micromix.assign(recipe, dataclasses.replace(recipe.config, skip=("*a",)))
    packed = micromix.quantize_(copy.deepcopy(model), fewer)
    linears = [name for name, module in packed.named_modules() if type(module) is nn.Linear]
    assert linears == (["0.a", "0.b"] if wrapped else ["a", "b"])
    with torch.no_grad():
        fast = compiled(model, recipe=recipe, skip=["*a"], strict=True)
        assert torch.allclose(fast(X), packed(X), atol=1e-5)
    assert list(micromix.recipe_of(model).linears) == ["c"]
    nothing = dataclasses.replace(recipe.config, skip=("*[ac]",))
    with pytest.raises(
        ValueError, match=r"no linear of the recipe of Tied is left: b is left out, for its name matches skip='\*\["
    ):
        micromix.quantize_(copy.deepcopy(model), micromix.assign(recipe, nothing))

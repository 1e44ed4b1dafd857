"""Inputs and models that calibration is not made for: the right result, or an error that names what is wrong."""

from __future__ import annotations

import re
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.calibration.sensitivity import CostProbe
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics.formats import ScaleRounding

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NEAREST = {"weight_rounding": "nearest", "scale_search": False}


class Masked(nn.Module):
    """Two linears, called with a mask that they need not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(self.first(x).relu())


def model() -> Masked:
    return Masked().eval()


# Tokens


def test_where_all_tokens_are_masked_the_error_says_so() -> None:
    batch = {"x": torch.randn(2, 5, 64), "attention_mask": torch.zeros(2, 5)}
    with pytest.raises(ValueError, match=r"Masked reached no linear layer.*first: its input had no token that counts"):
        micromix.calibrate(model(), [batch])


def test_a_batch_that_is_masked_wholly_adds_nothing() -> None:
    net, x = model(), torch.randn(2, 5, 64)
    masked, whole = ({"x": x * (1 + 9 * i), "attention_mask": torch.full((2, 5), 1 - i)} for i in (1, 0))
    both, one = (micromix.calibrate(net, batches) for batches in ([whole, masked], [whole]))
    for fqn, linear in one.linears.items():
        assert both.linears[fqn].split == linear.split
        assert torch.equal(both.linears[fqn].group.statistics.abs_mean, linear.group.statistics.abs_mean)
        assert all(map(torch.equal, both.packed[fqn], one.packed[fqn]))


@pytest.mark.parametrize("shape", [(1, 64), (1, 1, 64), (64,)])
def test_a_single_token_is_enough(shape: tuple[int, ...]) -> None:
    recipe = micromix.calibrate(model(), [torch.randn(shape)])
    assert {linear.group.statistics.tokens for linear in recipe.linears.values()} == {1}
    assert set(recipe.packed) == {"first", "second"}


# Types


def refused(call: Callable[[], object]) -> str:
    """What a TypeError says."""
    with pytest.raises(TypeError) as caught:
        call()
    return str(caught.value)


class Windows(torch.utils.data.Dataset):
    """As many datasets are: items by number, and no iterator."""

    def __getitem__(self, index: int) -> torch.Tensor:
        if index > 1:
            raise IndexError(index)
        return torch.randn(2, 5, 64)


def test_a_dataset_of_batches_calibrates() -> None:
    assert micromix.calibrate(model(), Windows(), MicroMixConfig(policy="mxfp8", **NEAREST)).linears


def test_verbs_name_the_type_that_they_were_given_and_what_they_take() -> None:
    net, x = model(), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x], MicroMixConfig(policy="mxfp8", **NEAREST))
    no_config = "config must be a MicroMixConfig, got dict; MicroMixConfig(**options) makes one of a mapping"
    no_recipe = "recipe must be a Recipe, got str; calibrate makes one, Recipe.load(path) reads one"
    no_batches = "batches must be several tensors or mappings, got"
    for config in ({}, {"policy": "mxfp8"}):
        assert refused(lambda config=config: micromix.calibrate(net, [x], config)) == no_config
        assert refused(lambda config=config: micromix.assign(recipe, config)) == no_config
        assert refused(lambda config=config: next(micromix.calibrate_each(net, [x], [config]))) == no_config
    for configs, shown in ((MicroMixConfig(), "MicroMixConfig("), ([], "[]")):
        said = refused(lambda configs=configs: next(micromix.calibrate_each(net, [x], configs)))
        assert said.startswith(f"configs must be a list of at least one MicroMixConfig, got {shown}")
    differing = [MicroMixConfig(convolutions=one) for one in (True, False)]
    with pytest.raises(ValueError, match="configs must have one value of convolutions for all, got True and False"):
        next(micromix.calibrate_each(net, [x], differing))
    for batches in (None, 5):
        said = refused(lambda batches=batches: micromix.calibrate(net, batches))
        assert said == f"{no_batches} {type(batches).__name__}"
    assert refused(lambda: micromix.calibrate(net, "text")) == f"{no_batches} str"
    assert refused(lambda: micromix.quantize_(net, "recipe.safetensors")) == no_recipe
    assert refused(lambda: micromix.assign("recipe.safetensors", MicroMixConfig())) == no_recipe
    for verb in (lambda: micromix.calibrate("net", [x]), lambda: micromix.quantize_("net", recipe),
                 lambda: micromix.recipe_of("net"), lambda: micromix.refresh("net")):  # fmt: skip
        assert refused(verb) == "model must be an nn.Module, got str"


@pytest.mark.parametrize("options", [MicroMixConfig(), ["recipe"]])
def test_options_that_are_no_mapping_are_refused_with_what_to_write(options: object) -> None:
    said = f'options must be a mapping, such as {{"recipe": recipe}}, got {type(options).__name__}'
    with pytest.raises(BackendCompilerFailed, match=re.escape(said)):
        torch.compile(model(), backend="micromix", options=options)(torch.randn(2, 64))


# Magnitudes


@pytest.mark.parametrize("value", [1e19, -1e30, 3e38])
@pytest.mark.parametrize("options", [{"policy": "budget", **NEAREST}, {"policy": "mxfp8"}, {"policy": "paper"}])
def test_a_value_whose_square_passes_float32_is_named_with_what_is_accepted(value: float, options: dict) -> None:
    x = torch.randn(2, 5, 64)
    x[1, 2, 7] = value
    message = rf"batch 1: the input of first reaches {abs(value):.3g}.*\(channel 7\).* 15 tokens up to 4\.76e\+18"
    with pytest.raises(ValueError, match=message.replace("+", r"\+", 1)):
        micromix.calibrate(model(), [torch.randn(1, 5, 64), x], MicroMixConfig(**options))


@pytest.mark.parametrize("value", [1e18, 1e30, 3e38])
@pytest.mark.parametrize("policy", ["mxfp6", "paper"])
def test_policies_that_need_no_squares_take_any_finite_value(value: float, policy: str) -> None:
    x = torch.randn(2, 5, 64)
    x[:, :, 7] = value  # the sum of five of the largest is an infinity
    recipe = micromix.calibrate(nn.Sequential(nn.Linear(64, 32)).eval(), [x], MicroMixConfig(policy=policy, **NEAREST))
    seen = recipe.linears["0"].group.statistics
    assert seen.abs_max[7] == seen.abs_mean[7] == torch.tensor(value)
    assert recipe.linears["0"].group.channel_perm[-1] == 7


def test_costs_that_are_not_finite_name_the_linear() -> None:
    probe = CostProbe(64, ScaleRounding.RCEIL, gradients=True)
    x, weight = torch.randn(2, 64), torch.randn(8, 64)
    probe.add_input(x, torch.arange(64))
    probe.add_information("decoder.fc", torch.full((2, 8), 1e30), x)
    with pytest.raises(ValueError, match=r"the sensitivity of decoder\.fc is not finite"):
        probe.costs({"decoder.fc": weight}, torch.arange(64))


# Models


class Mapped(nn.Module):
    """A linear that is called as it is, and under vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.func.vmap(self.fc)(x) + self.fc(x)


def test_a_linear_under_vmap_stays_and_is_said_to(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Mapped().eval(), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    assert recipe.refused == {"fc (torch.func)": "it runs under a transform of torch.func, such as vmap"}
    fast = torch.compile(net, backend="micromix", options={"recipe": recipe})
    with torch.no_grad():
        plain, out = net.fc(x), fast(x)
        micromix.quantize_(net, recipe)
        torch.testing.assert_close(out, plain + net.fc(x), rtol=1e-4, atol=1e-4)
    assert "fc (torch.func) has a recipe and runs unquantized in a part of the model: it runs under" in caplog.text


def test_strict_refuses_a_linear_under_vmap() -> None:
    net, x = Mapped().eval(), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    strict = torch.compile(net, backend="micromix", options={"recipe": recipe, "strict": True})
    with pytest.raises(BackendCompilerFailed, match=r"strict=True: fc \(torch\.func\) has a recipe"), torch.no_grad():
        strict(x)


class Escaping(Masked):
    """A linear, another that is multiplied by every other row of its weight, and one that nothing calls."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Linear(64, 64)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.second(x) + torch.nn.functional.linear(x, self.first.weight[::2])


def test_weights_that_escape_are_named_and_refused_when_strict(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Escaping().eval(), [torch.randn(2, 5, 64)]
    recipe = micromix.calibrate(net, x, MicroMixConfig(policy="mxfp8", **NEAREST))
    assert set(recipe.linears) == {"second"}
    said = (
        "2 weights of Escaping stay unquantized (first: a part of it is multiplied that is no run of whole rows or "
        "columns; "
        "idle: calibration did not reach it)"
    )
    assert said in caplog.text
    with pytest.raises(ValueError, match=re.escape(f"strict=True: {said}; name them in skip if that is meant")):
        micromix.calibrate(net, x, MicroMixConfig(policy="mxfp8", strict=True, **NEAREST))
    skip = ("first", "idle")
    meant = micromix.calibrate(net, x, MicroMixConfig(policy="mxfp8", strict=True, skip=skip, **NEAREST))
    assert set(meant.linears) == {"second"}


@pytest.mark.parametrize("ran", [False, True])
def test_a_compiled_model_under_vmap_is_refused(ran: bool) -> None:
    net, x = model(), torch.randn(3, 5, 64)
    fast = torch.compile(net, backend="micromix", options={"recipe": micromix.calibrate(net, [x])})
    with torch.no_grad():
        if ran:
            fast(x[0])
        with pytest.raises(ValueError, match=r"would run unquantized: .* nothing under torch.func.vmap; map the"):
            torch.func.vmap(fast)(x)


@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")  # torch 2.15 on row after row
def test_packed_models_run_under_vmap() -> None:
    net, x = model(), torch.randn(3, 5, 64)
    micromix.quantize_(net, micromix.calibrate(net, [x]))
    with torch.no_grad():
        assert torch.equal(torch.func.vmap(net)(x), net(x))


@pytest.mark.parametrize(("inputs", "outputs"), [(0, 5), (64, 0)])
def test_an_empty_weight_is_refused_by_name(inputs: int, outputs: int) -> None:
    class Partly(Masked):
        def __init__(self) -> None:
            super().__init__()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch's, of nothing to initialize
                self.empty = nn.Linear(inputs, outputs)

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return super().forward(x) + self.empty(x[..., :inputs]).sum(-1, keepdim=True)

    net = Partly().eval()
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    assert set(recipe.linears) == {"first", "second"}
    assert recipe.refused == {"empty": f"its weight {(outputs, inputs)} is empty"}
    with pytest.raises(ValueError, match=r"no linear layer to quantize \(0: its weight \(\d+, \d+\) is empty\)"):
        micromix.calibrate(nn.Sequential(net.empty).eval(), [torch.randn(2, inputs)])


def test_weights_without_values_are_refused_by_name() -> None:
    net, x = model(), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    net.to("meta")
    reason = "its weight is on the meta device, which holds no values: load it first"
    with pytest.raises(ValueError, match=rf"no linear layer to quantize \(first: {reason}"):
        micromix.calibrate(net, [x])
    with pytest.raises(ValueError, match="first of Masked is on the meta device, which holds no values"):
        micromix.quantize_(net, recipe)
    for options in ({}, {"recipe": recipe}):
        with pytest.raises(BackendCompilerFailed, match=reason):
            torch.compile(net, backend="micromix", options=options)(x.to("meta"))


def test_inputs_without_values_are_refused() -> None:
    with pytest.raises(RuntimeError, match="meta and cpu"):
        micromix.calibrate(model(), [torch.randn(2, 5, 64, device="meta")])


def test_an_exported_model_is_refused_with_what_to_take_instead() -> None:
    net, x = model(), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    exported = torch.export.export(net, (x,)).module()
    for refused in (lambda: micromix.calibrate(exported, [x]), lambda: micromix.quantize_(exported, recipe)):
        with pytest.raises(ValueError, match=r"in training mode.* take the model that it was made from"):
            refused()

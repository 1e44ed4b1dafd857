"""Costs of channels: against plain formulas, and against what really happens to a model."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import Net, make_net
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.calibration import sensitivity
from micromix_compile.calibration.costs import costs_in_order, rotated_costs
from micromix_compile.calibration.observer import ChannelObserver
from micromix_compile.calibration.sensitivity import CostProbe, pull_back, rounding_errors
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics import reference, rotation
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.recipe.types import COST_FORMATS, ChannelCosts
from micromix_compile.session import deciding

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BUDGET = MicroMixConfig(
    policy="budget", weight_rounding="nearest", scale_search=False, activations="same", rotate="none"
)


HADAMARD = rotation.rotate_weight(torch.eye(32), 32)


def quantized(rows: Tensor, order: Tensor, name: str, rotates: bool = False) -> Tensor:
    """Rows rounded by the reference, blocked by `order`."""
    padding = torch.full((-rows.shape[1] % 32,), -1)
    y = reference.reorder(rows, torch.cat((padding, order)))
    turn = torch.block_diag(*[HADAMARD if rotates else torch.eye(32)] * (y.shape[1] // 32))
    codes, scale = reference.quantize(y @ turn, name)
    values = reference.dequantize(codes, scale, name) @ torch.linalg.inv(turn)
    return values[:, len(padding) :][:, torch.argsort(order)]


@pytest.mark.parametrize("name", COST_FORMATS)
@pytest.mark.parametrize("channels", [64, 70])
def test_rounding_errors_are_the_references(name: str, channels: int) -> None:
    rows, order = torch.randn(5, channels), torch.randperm(channels)
    errors = rounding_errors(rows, order, name, ScaleRounding.RCEIL)
    assert torch.equal(errors, quantized(rows, order, name) - rows)


def test_costs_equal_the_formulas_with_gradients() -> None:
    x, weight, order = torch.randn(6, 64), torch.randn(8, 64), torch.randperm(64)
    probe = CostProbe(64, ScaleRounding.RCEIL, gradients=True)
    direction = torch.randn(6, 8)
    probe.add_input(x, order)
    probe.add_information("fc", direction, x)
    probe.add_slopes(x, direction @ weight, order)
    costs = probe.costs({"fc": weight}, order)
    slopes, information = direction @ weight, direction.square().T @ x.square() / len(x)
    for row, name in enumerate(COST_FORMATS):
        for rotates in (False, True):
            error = quantized(x, order, name, rotates) - x
            off = quantized(weight, order, name, rotates) - weight
            activations = costs.rotated_activations if rotates else costs.activations
            weights = costs.rotated_weights if rotates else costs.weights
            assert activations is not None
            assert weights is not None
            assert torch.allclose(activations[row], (slopes * error).square().mean(0) / 2, rtol=1e-4)
            assert torch.allclose(weights[row], (information * off.square()).sum(0) / 2, rtol=1e-4)
    assert costs.measured


def test_costs_equal_the_formulas_without_gradients() -> None:
    x, weight, order = torch.randn(2, 3, 64), torch.randn(8, 64), torch.randperm(64)
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    kept = x[mask.bool()]
    probe = CostProbe(64, ScaleRounding.RCEIL, gradients=False)
    probe.add_input(kept, order)
    probe.add_output("fc", kept @ weight.T)
    costs = probe.costs({"fc": weight}, order)
    total = (kept @ weight.T).square().sum()
    for row, name in enumerate(COST_FORMATS):
        error = quantized(kept, order, name) - kept
        expected = error.square().sum(0) * weight.square().sum(0) / total
        assert torch.allclose(costs.activations[row], expected, rtol=1e-4)
        off = quantized(weight, order, name) - weight
        assert torch.allclose(costs.weights[row], off.square().sum(0) * kept.square().sum(0) / total, rtol=1e-4)
    assert not costs.measured


class LanguageNet(nn.Module):
    """`Net` whose output is a mapping with logits."""

    def __init__(self, net: Net) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.net(x)}


def costs_of(model: nn.Module, batches: list[Tensor], config: MicroMixConfig = BUDGET) -> dict[str, ChannelCosts]:
    recipe = micromix.calibrate(model, batches, config)
    found = {name: group.statistics.costs for name, group in recipe.groups.items()}
    assert all(costs is not None for costs in found.values())
    return found  # type: ignore[return-value]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("activations", ["same", "fp8"])
@pytest.mark.parametrize(("row", "rotates"), [(0, False), (1, False), (0, True)], ids=["mxfp4", "mxfp6", "rotated"])
def test_the_predicted_divergence_is_that_of_the_model(row: int, rotates: bool, activations: str) -> None:
    """The sum of all costs against the divergence that is measured, with small logits: within a factor of 1.5."""
    net = make_net(layers=2)
    net.lm_head.weight.data *= 0.3
    model = LanguageNet(net).eval()
    batches = [torch.randn(4, 64, 64) for _ in range(8)]
    recipe = micromix.calibrate(model, batches, dataclasses.replace(BUDGET, activations=activations, rotate="auto"))
    config = recipe.config
    predicted = 0.0
    for group in recipe.groups.values():
        costs = rotated_costs(group, config) if rotates else costs_in_order(group, config)
        assert costs is not None, "they were measured"
        predicted += float(costs[row].sum())
    groups = {}
    for name, group in recipe.groups.items():
        channels = sum(group.split)
        groups[name] = dataclasses.replace(group, split=(channels, 0, 0) if row == 0 else (0, channels, 0))
        groups[name] = dataclasses.replace(groups[name], rotated=channels if rotates else 0)
    linears = {fqn: dataclasses.replace(x, group=groups[x.group.name]) for fqn, x in recipe.linears.items()}
    with torch.no_grad():
        log_p = torch.cat([model(b)["logits"] for b in batches]).log_softmax(-1)
        micromix.quantize_(model, dataclasses.replace(recipe, linears=linears))
        log_q = torch.cat([model(b)["logits"] for b in batches]).log_softmax(-1)
    measured = float(nn.functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean())
    assert predicted / 1.5 < measured < 1.5 * predicted


@pytest.mark.usefixtures("fresh_compiler")
def test_padding_tokens_and_frozen_models_are_no_trouble() -> None:
    net = make_net(layers=1)
    for parameter in net.parameters():
        parameter.requires_grad_(False)
    mask = torch.ones(2, 9)
    mask[0, 5:] = 0
    x = torch.randn(2, 9, 64)
    costs = costs_of(net, [{"x": x, "attention_mask": mask}])  # type: ignore[list-item]
    assert all(c.measured and c.activations.isfinite().all() for c in costs.values())
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert not x.requires_grad


@pytest.mark.usefixtures("fresh_compiler")
def test_parameters_ask_for_gradients_again_and_hold_none() -> None:
    net = make_net(layers=1)
    costs_of(net, [torch.randn(2, 9, 64)])
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


@pytest.mark.usefixtures("fresh_compiler")
def test_the_same_seed_gives_the_same_costs_and_another_one_others() -> None:
    net, batches = make_net(layers=1), [torch.randn(2, 9, 64)]
    first, again = costs_of(net, batches), costs_of(net, batches)
    other = costs_of(net, batches, dataclasses.replace(BUDGET, seed=1))
    assert all(torch.equal(first[n].activations, again[n].activations) for n in first)
    assert any(not torch.equal(first[n].activations, other[n].activations) for n in first)


class NoGradient(Net):
    """A model that switches gradients off by itself."""

    @torch.no_grad()
    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(x, attention_mask)


@pytest.mark.usefixtures("fresh_compiler")
def test_without_gradients_each_linears_own_output_decides(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        costs = costs_of(NoGradient(layers=1).eval(), [torch.randn(2, 9, 64)])
    assert "has no usable gradient" in caplog.text
    assert all(not c.measured and c.activations.gt(0).any() for c in costs.values())


class FailsWithGradients(Net):
    """A model that does something else where gradients are taken."""

    def __init__(self, failure: Callable[[], Tensor]) -> None:
        super().__init__(layers=1)
        self.failure = failure

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if torch.is_grad_enabled():
            x = x + self.failure()
        return super().forward(x, attention_mask)


@torch.compiler.disable
def fail(error: type[Exception], message: str) -> Tensor:
    raise error(message)


TOO_LARGE = 2**50
"""Elements that no machine has memory for."""


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "failure",
    [
        lambda: torch.zeros(TOO_LARGE).sum(),
        lambda: fail(torch.OutOfMemoryError, "CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: fail(MemoryError, "Unable to allocate 7.45 GiB for an array"),
    ],
    ids=["cpu", "gpu", "numpy"],
)
def test_out_of_memory_is_no_missing_gradient(failure: Callable[[], Tensor]) -> None:
    with pytest.raises(torch.OutOfMemoryError, match=r"while measuring sensitivity.*shorter batches.*'budget'"):
        costs_of(FailsWithGradients(failure).eval(), [torch.randn(2, 9, 64)])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("step", ["calibrating", "rounding weights"])
def test_out_of_memory_names_the_step_and_what_takes_less(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def allocate(*_: object, **__: object) -> Tensor:
        return torch.zeros(TOO_LARGE)

    owner, name = (ChannelObserver, "_add_sample") if step == "calibrating" else (deciding, "round_weights")
    monkeypatch.setattr(owner, name, allocate)
    with pytest.raises(
        torch.OutOfMemoryError, match=rf"while {step}.*weight_rounding='nearest' with scale_search=False"
    ):
        micromix.calibrate(make_net(layers=1), [torch.randn(2, 9, 64)], MicroMixConfig(policy="mxfp8"))


@pytest.mark.usefixtures("fresh_compiler")
def test_an_error_that_does_not_speak_of_gradients_is_no_missing_gradient() -> None:
    model = FailsWithGradients(lambda: fail(RuntimeError, "the tokenizer process died")).eval()
    with pytest.raises(RuntimeError, match="the tokenizer process died"):
        costs_of(model, [torch.randn(2, 9, 64)])


@pytest.mark.parametrize(
    "message",
    [
        "element 0 of tensors does not require grad and does not have a grad_fn",
        "derivative for aten::_efficientzerotensor is not implemented",
        "Trying to backward through mylib::op but no autograd formula was registered",
        "one of the variables needed for gradient computation has been modified by an inplace operation",
        "a leaf Variable that requires grad is being used in an in-place operation.",
        "Inference tensors cannot be saved for backward. Please do not use Tensors created in inference mode",
    ],
)
def test_what_torch_says_where_it_cannot_run_backward_is_known(message: str) -> None:
    assert sensitivity.lacks_gradient(RuntimeError(message))
    assert not sensitivity.lacks_gradient(torch.OutOfMemoryError(message))


@pytest.mark.usefixtures("fresh_compiler")
def test_the_one_line_form_follows_a_budget_too() -> None:
    net = make_net(layers=2)
    options = {"policy": "budget", "target_bits": 5.0, "calibration_batches": 2}
    compiled = torch.compile(net, backend="micromix", options=options)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        for _ in range(3):
            out = compiled(x)
        exact = net(x)
    assert 0 < (out - exact).abs().max() < 0.5 * exact.abs().max()


def test_directions_are_gradients_of_a_drawn_token() -> None:
    """Their mean over many draws is zero: E[softmax - one_hot(y)] = 0."""
    logits = torch.randn(1, 5).repeat(20_000, 1).requires_grad_(True)
    assert pull_back({"logits": logits}, None, torch.Generator().manual_seed(0))
    direction = logits.grad
    assert direction is not None
    assert direction.sum(-1).abs().max() < 1e-5
    assert direction.mean(0).abs().max() < 0.02
    assert ((direction < 0).sum(-1) == 1).all()


@pytest.mark.parametrize("output", [torch.ones(2, 3), {"logits": torch.ones(2, 3)}, SimpleNamespace(), 3, ()])
def test_an_output_without_gradient_is_said(output: object) -> None:
    assert not pull_back(output, None, torch.Generator())


def test_tokens_that_are_masked_have_no_direction() -> None:
    hidden = torch.randn(2, 3, 4).requires_grad_(True)
    assert pull_back((hidden,), torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.Generator())
    assert hidden.grad is not None
    assert (hidden.grad.abs().sum(-1) > 0).tolist() == [[True, False, True], [True, True, False]]
    time_first = torch.randn(3, 2, 4).requires_grad_(True)
    assert pull_back((time_first,), torch.tensor([[1, 0, 1], [1, 1, 0]]), torch.Generator())
    assert time_first.grad is not None
    assert (time_first.grad.abs().sum(-1) > 0).tolist() == [[True, True], [False, True], [True, False]]
    assert sensitivity.COST_FORMATS == COST_FORMATS


def test_a_model_whose_output_is_no_number_is_told_so_where_costs_are_measured(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        net[1].weight[3, 5] = float("nan")
    with pytest.raises(ValueError, match="the sensitivity of 0 is not finite: a gradient or an output holds a NaN"):
        micromix.calibrate(net, [torch.randn(2, 64)], BUDGET)
    recipe = micromix.calibrate(net, [torch.randn(2, 64)], dataclasses.replace(BUDGET, policy="mxfp6"))
    recipe.save(tmp_path / "recipe")
    assert micromix.Recipe.load(tmp_path / "recipe").linears.keys() == recipe.linears.keys()

"""What becomes of one call of a group of linears: its input, its outputs, gradients at all of these."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.session.names import Names
from micromix_compile.session.observing import Observation

if TYPE_CHECKING:
    from micromix_compile.session.state import LinearState


def observation(*rows: int, gradients: bool = True) -> tuple[Observation, list[nn.Parameter], list[LinearState]]:
    """What takes costs, and guided moments in a pass backward, of weights (N, 64) of so many rows."""
    names, weights = Names(), [nn.Parameter(torch.randn(n, 64)) for n in rows]
    for i, weight in enumerate(weights):
        names.adopt(weight, f"fc{i}", lambda state, parameter: None)
    made = Observation(names, [MicroMixConfig(policy="budget")])
    made.takes_statistics, made.takes_gradients = False, gradients
    return made, weights, [names.state(weight) for weight in weights]


def test_guided_moments_and_information_are_those_of_the_inputs_that_each_output_was_made_of() -> None:
    """The first linear is called again, on fewer tokens, before the second is; inputs are changed in place later."""
    seen, weights, (first, second) = observation(8, 3)
    x, again, mask = torch.randn(2, 5, 64), torch.randn(2, 4, 64), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    want, leaf, other = torch.zeros(64, 64), x.clone(), again.clone()
    seen.token_mask = mask
    watched = seen.input(leaf, [first, second], [False, False], None, [None, None])
    outputs = [leaf @ weights[0].detach().T]
    seen.output(outputs[0], first, watched)
    seen.token_mask = torch.ones(2, 4)
    also = seen.input(other, [first], [False], None, [None])
    outputs += [other @ weights[0].detach().T, leaf @ weights[1].detach().T]
    seen.output(outputs[1], first, also)
    seen.output(outputs[2], second, watched)
    with torch.no_grad():
        leaf.zero_()
        other.zero_()
    directions = [torch.randn_like(y) for y in outputs]
    torch.autograd.backward([y * 1.0 for y in outputs], directions)
    seen.release_batch()
    for tokens, energy in (
        (x, sum(directions[i].square().sum(-1) for i in (0, 2)) * mask),
        (again, directions[1].square().sum(-1)),
    ):
        want += torch.einsum("bt,btc,btd->cd", energy, tokens, tokens)
    observer = first.observer
    assert observer is not None
    assert observer is second.observer
    assert observer.guided is not None
    torch.testing.assert_close(observer.guided, want, rtol=1e-4, atol=1e-3)
    assert observer.probe is not None
    information = torch.einsum("btn,btc->nc", (directions[2] * mask[..., None]).square(), x.square())
    torch.testing.assert_close(observer.probe._information["fc1"], information, rtol=1e-4, atol=1e-3)


def test_an_input_gets_its_own_gradient_back_and_requires_none_again() -> None:
    seen, weights, known = observation(8)
    leaf, own = torch.randn(5, 64), torch.randn(5, 64)
    leaf.grad = own.clone()
    gradient = leaf.grad
    for _ in range(2):
        watched = seen.input(leaf, known, [False], None, [None])
        y = leaf @ weights[0].detach().T
        seen.output(y, known[0], watched)
        y.backward(torch.ones_like(y))
        assert leaf.requires_grad
        seen.release_batch()
        assert leaf.grad is gradient
        assert torch.equal(gradient, own)
        assert not leaf.requires_grad


def nan_where_masked(mask: Tensor) -> Tensor:
    x = torch.randn(*mask.shape, 64)
    x[mask == 0] = torch.nan
    return x


def test_nans_of_tokens_that_do_not_count_reach_nothing() -> None:
    seen, weights, known = observation(8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    x = nan_where_masked(mask)
    seen.token_mask = mask
    watched = seen.input(x, known, [False], None, [None])
    y = x @ weights[0].detach().T
    seen.output(y, known[0], watched)
    torch.nn.functional.gelu(y).backward(torch.randn_like(y) * mask[..., None])
    observer = known[0].observer
    assert observer is not None
    assert observer.probe is not None
    assert observer.guided is not None
    assert observer.guided.isfinite().all()
    costs = observer.probe.costs({"fc0": weights[0]}, torch.arange(64))  # or it would raise
    assert costs.activations.gt(0).any()
    assert costs.weights.gt(0).any()


@pytest.mark.parametrize("gradients", [True, False])
def test_linears_that_turn_out_to_share_an_input_keep_what_they_saw(gradients: bool) -> None:
    """The first reads x, two others y, then the first and the second z: the third goes with them."""
    x, y, z = (torch.randn(tokens, 64) for tokens in (3, 4, 5))
    calls = {"apart": [(x, [0]), (y, [1, 2]), (z, [0, 1])], "together": [(x, [0, 1, 2])]}
    calls["together"] += [(y, [1, 2]), (z, [0, 1])]
    found = {}
    for kind, of_kind in calls.items():
        torch.manual_seed(1)
        seen, weights, known = observation(8, 3, 2, gradients=gradients)
        outputs = []
        for given, members in of_kind:
            leaf, states = given.clone(), [known[i] for i in members]
            watched = seen.input(leaf, states, [False] * len(states), None, [None] * len(states))
            for i in members if given is not x else [0]:
                outputs.append(leaf @ weights[i].detach().T)
                seen.output(outputs[-1], known[i], watched)
        if gradients:
            torch.autograd.backward(outputs, [torch.ones_like(one) for one in outputs])
        (observer,) = {state.observer for state in known}
        assert observer is not None
        assert observer.probe is not None
        costs = observer.probe.costs({state.name: w for state, w in zip(known, weights, strict=True)}, torch.arange(64))
        found[kind] = costs.activations, costs.weights, observer.guided if gradients else observer.moment
    for got, want in zip(found["apart"], found["together"], strict=True):
        torch.testing.assert_close(got, want)


class Latents(nn.Module):
    """Learned latents go through a linear twice, the second time in part, before another linear reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, 16, 64))
        self.again, self.other = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        once = self.again(self.latents)
        return torch.cat([once, self.again(once[:, :4]), self.other(self.latents), self.other(x)], 1)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_model_with_all_of_this_is_calibrated_and_keeps_its_gradients() -> None:
    model, mask = Latents().eval(), torch.ones(2, 8, dtype=torch.int64)
    mask[1, 5:] = 0
    model.latents.grad = torch.ones(2, 16, 64)
    recipe = micromix.calibrate(model, [{"x": nan_where_masked(mask), "attention_mask": mask}], progress=False)
    assert recipe.linears.keys() == {"again", "other"}
    assert torch.equal(model.latents.grad, torch.ones(2, 16, 64))
    assert model.latents.requires_grad

"""Products of other shapes than a linear's: observed and rewritten as the linears and grouped products they are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.graphs import session_with, trace
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.passes import find_linears

if TYPE_CHECKING:
    from collections.abc import Callable

LEFT = "a part of it is multiplied from the left"
pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]

CONFIG = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False, skip=())
EXPERTS, TOKENS, CHANNELS, OUT = 3, 5, 64, 32
CHOSEN = torch.tensor([2, 0, 0, 2, 2, 0, 2, 2, 0, 0])
"""Nobody chooses the second; two rows are of each token."""
FROM_THE_END = torch.where(CHOSEN == 2, -1, CHOSEN).int()


def copies(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=0)


def for_each(x: Tensor) -> Tensor:
    return (x.repeat(EXPERTS, 1) * torch.ones(EXPERTS * TOKENS, 1)).view(EXPERTS, TOKENS, CHANNELS)


STACK, TRANSPOSED = (EXPERTS, OUT, CHANNELS), (EXPERTS, CHANNELS, OUT)
SHAPES: dict[str, tuple[tuple[int, ...], Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "left": ((OUT, CHANNELS), lambda x, w: w @ x.mT, lambda x, w: (x @ w.T).mT),
    "left, batched": ((OUT, CHANNELS), lambda x, w: torch.matmul(w, x[None].mT), lambda x, w: (x @ w.T).mT[None]),
    "left, transposed": ((CHANNELS, OUT), lambda x, w: w.t() @ x.T, lambda x, w: (x @ w).mT),
    "all": (TRANSPOSED, lambda x, w: torch.bmm(for_each(x), w), lambda x, w: torch.einsum("tc,ecn->etn", x, w)),
    "all, transposed": (
        STACK, lambda x, w: for_each(x) @ w.transpose(1, 2), lambda x, w: torch.einsum("tc,enc->etn", x, w)
    ),
    "all, left": (
        STACK, lambda x, w: torch.bmm(w, for_each(x).mT), lambda x, w: torch.einsum("tc,enc->ent", x, w)
    ),
    "by index": (
        TRANSPOSED, lambda x, w: torch.bmm(copies(x).unsqueeze(1), w[CHOSEN]),
        lambda x, w: torch.einsum("rc,rcn->rn", copies(x), w[CHOSEN])[:, None],
    ),
    "by index, left": (
        STACK, lambda x, w: torch.bmm(w[CHOSEN], copies(x).unsqueeze(-1)),
        lambda x, w: torch.einsum("rc,rnc->rn", copies(x), w[CHOSEN])[..., None],
    ),
    "by index, rows of their own": (
        STACK, lambda x, w: torch.bmm(w[CHOSEN], torch.relu(copies(x)).unsqueeze(-1)),
        lambda x, w: torch.einsum("rc,rnc->rn", torch.relu(copies(x)), w[CHOSEN])[..., None],
    ),
    "by index from the end": (
        TRANSPOSED, lambda x, w: torch.bmm(copies(x).unsqueeze(1), w[FROM_THE_END]),
        lambda x, w: torch.einsum("rc,rcn->rn", copies(x), w[CHOSEN])[:, None],
    ),
    "by index, both transposed": (
        TRANSPOSED, lambda x, w: w.mT[CHOSEN] @ copies(x).unsqueeze(-1),
        lambda x, w: torch.einsum("rc,rcn->rn", copies(x), w[CHOSEN])[..., None],
    ),
}  # fmt: skip
"""By name: the weight's shape, a product with x (T, C), and what it is."""


class Multiplied(nn.Module):
    """One product, and a mask that calibration reads."""

    def __init__(self, shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(shape) / 8)
        self._product = product

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self._product(x, self.weight) + 0


QUICK = ("left", "all", "by index, left", "by index, rows of their own", "by index from the end")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.deep) for name in SHAPES]
)
def test_a_product_of_any_shape_runs_quantized(name: str) -> None:
    shape, product, _ = SHAPES[name]
    model, x = Multiplied(shape, product).eval(), torch.randn(TOKENS, CHANNELS)
    recipe = micromix.calibrate(model, [x], CONFIG, progress=False)
    (linear,) = recipe.linears.values()
    assert linear.shape == ((OUT, CHANNELS) if len(shape) == 2 else STACK)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    with torch.no_grad():
        want, got = model(x), fast(x)
    assert got.shape == want.shape
    assert 0 < (got - want).norm() < 0.06 * want.norm()


@pytest.mark.parametrize("name", SHAPES)
def test_the_costs_of_a_product_of_any_shape_are_those_of_what_it_is(name: str) -> None:
    shape, product, plain = SHAPES[name]
    model, x = Multiplied(shape, product).eval(), torch.randn(TOKENS, CHANNELS)
    twin = Multiplied(shape, plain).eval()
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(x), twin(x))
    budget = MicroMixConfig(policy="budget", skip=())
    (linear,) = micromix.calibrate(model, [x], budget, progress=False).linears.values()
    costs = linear.group.statistics.costs
    assert costs is not None
    assert bool((costs.activations.sum(0) > 0).any())


def test_experts_see_the_tokens_that_were_sent_to_them_and_no_padding() -> None:
    x, mask = torch.randn(TOKENS, CHANNELS), torch.tensor([[1, 1, 1, 0, 1]])
    for name in ("by index", "by index, left", "by index from the end"):
        shape, product, _ = SHAPES[name]
        batch = {"x": x, "attention_mask": mask}
        recipe = micromix.calibrate(Multiplied(shape, product).eval(), [batch], CONFIG, progress=False)
        (linear,) = recipe.linears.values()
        assert linear.expert_tokens == (5, 0, 3), name
        assert linear.runs == 2
    shape, product, _ = SHAPES["all"]
    sent = torch.tensor([[1, 0, 0, 1, 1], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).view(-1, 1)
    model = Multiplied(shape, lambda x, w: torch.bmm((x.repeat(EXPERTS, 1) * sent).view(EXPERTS, TOKENS, CHANNELS), w))
    recipe = micromix.calibrate(model.eval(), [{"x": x, "attention_mask": mask}], CONFIG, progress=False)
    (linear,) = recipe.linears.values()
    assert linear.expert_tokens == (2, 0, 4)
    assert linear.group.statistics.tokens == 6


def chosen_anew(x: Tensor, w: Tensor) -> Tensor:
    """Reads the index, which is written to."""
    chosen = CHOSEN.clone()
    taken = w[chosen]
    chosen.fill_(0)
    return torch.bmm(taken, copies(x).unsqueeze(-1))


@pytest.mark.parametrize(
    ("shape", "product", "reason"),
    [
        (STACK, chosen_anew, f"{LEFT}: a stack"),
        (STACK, lambda x, w: torch.bmm(w[CHOSEN], for_each(x)[:1].expand(10, -1, -1).mT), f"{LEFT}: a stack"),
        (STACK, lambda x, w: w[0] @ x.mT, f"{LEFT}: a stack"),
        ((OUT, CHANNELS), lambda x, w: w[:3] @ x.mT, LEFT),
        ((OUT, CHANNELS), lambda x, w: w[CHOSEN] @ x.mT, LEFT),
        (TRANSPOSED, lambda x, w: torch.matmul(x, w), "its weight has 3 dimensions, not 2"),
        (TRANSPOSED, lambda x, w: torch.matmul(x[None], w), "its weight has 3 dimensions, not 2"),
    ],
)
def test_what_is_none_of_these_stays_and_is_named(
    shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor], reason: str
) -> None:
    model, session = Multiplied(shape, product).eval(), session_with(find_linears)
    _, context, _ = trace(model, torch.randn(TOKENS, CHANNELS), session=session)
    assert not context.sites
    assert [reason in why for why in context.refusals.values()] == [True]


@pytest.mark.parametrize(
    ("shape", "product"),
    [
        (TRANSPOSED, lambda x, w: torch.matmul(x[:1, None], w[CHOSEN])),
        ((CHANNELS, EXPERTS, OUT), lambda x, w: torch.bmm(for_each(x), w.transpose(0, 1))),
        ((OUT, CHANNELS, EXPERTS), lambda x, w: torch.bmm(for_each(x), w.permute(2, 1, 0))),
    ],
    ids=["one row for all", "matrices in the middle", "dimensions turned round"],
)
def test_what_only_looks_like_a_stack_of_matrices_stays(
    shape: tuple[int, ...], product: Callable[[Tensor, Tensor], Tensor]
) -> None:
    _, context, _ = trace(
        Multiplied(shape, product).eval(), torch.randn(TOKENS, CHANNELS), session=session_with(find_linears)
    )
    assert not context.sites


class TwoStacks(nn.Module):
    """Of several numbers of matrices, by one index."""

    def __init__(self) -> None:
        super().__init__()
        self.few = nn.Parameter(torch.randn(EXPERTS, CHANNELS, OUT) / 8)
        self.many = nn.Parameter(torch.randn(2 * EXPERTS, CHANNELS, OUT) / 8)

    def forward(self, x: Tensor) -> Tensor:
        rows = copies(x).unsqueeze(1)
        return torch.bmm(rows, self.few[FROM_THE_END]) + torch.bmm(rows, self.many[FROM_THE_END])


def test_an_index_from_the_end_is_of_each_stack_s_own_end() -> None:
    model, x = TwoStacks().eval(), torch.randn(TOKENS, CHANNELS)
    recipe = micromix.calibrate(model, [x], CONFIG, progress=False)
    assert len(recipe.linears) == 2
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    with torch.no_grad():
        want, got = model(x), fast(x)
    assert 0 < (got - want).norm() < 0.06 * want.norm()

"""What is measured of a product does not depend on how its operands are shaped: it is that of the linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.recipe.types import Recipe

    Product = Callable[[Tensor, Tensor], Tensor]

pytestmark = pytest.mark.versions
functional = nn.functional
INDEX = torch.arange(64) % 2


class Weight(nn.Module):
    """A weight by itself, as models multiply it in ways of their own."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)


class Between(nn.Module):
    """A product of h (2, 32, 96) between two linears."""

    def __init__(self, product: Product, weight: Tensor) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(64, 96), Weight(weight), nn.Linear(64, 40)
        self._product = product

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.silu(self._product(self.first(x).relu(), self.middle.weight)))


def recipe_of(product: Product, shaped: Product) -> Recipe:
    """With default options. shaped: from (the linear's weight (64, 96), two of it) to what `product` multiplies by."""
    torch.manual_seed(0)
    weight = torch.randn(64, 96) / 8
    model = Between(product, shaped(weight, torch.stack([weight, weight]))).eval()
    xs = [torch.randn(2, 32, 64) * torch.linspace(0.1, 5, 64) for _ in range(2)]
    return micromix.calibrate(model, xs, MicroMixConfig(convolutions=True), progress=False)


@pytest.fixture(scope="module")
def linear() -> Recipe:
    return recipe_of(functional.linear, lambda w, both: w)


def check_costs(recipe: Recipe, linear: Recipe) -> None:
    """The middle one's: those of rounding its activations, in all orders and formats, and those of its weight."""
    groups = [one.linears["middle"].group for one in (recipe, linear)]
    got, want = (group.statistics.costs for group in groups)
    assert got is not None
    assert want is not None
    assert torch.equal(groups[0].channel_perm, groups[1].channel_perm)
    for name in ("activations", "weights", "rotated_activations", "rotated_weights"):
        torch.testing.assert_close(getattr(got, name), getattr(want, name), rtol=1e-5, atol=1e-9)
    assert want.activations[0].gt(0).any()


@pytest.mark.parametrize(
    ("product", "shaped"),
    [
        (lambda h, w: (w @ h.mT).mT, lambda w, both: w),
        (lambda h, w: functional.conv1d(h.mT, w).mT, lambda w, both: w[..., None]),
        (
            lambda h, w: functional.conv2d(h.mT.unflatten(2, (4, 8)), w).flatten(2).mT,
            lambda w, both: w[..., None, None],
        ),
    ],
)
def test_turned_products_have_the_costs_and_bytes_of_the_linear(
    product: Product, shaped: Product, linear: Recipe
) -> None:
    recipe = recipe_of(product, shaped)
    assert recipe.config.weight_rounding == "guided"
    check_costs(recipe, linear)
    for name, bits in linear.packed.items():
        assert recipe.linears[name].split == linear.linears[name].split
        assert all(torch.equal(got, want) for got, want in zip(recipe.packed[name], bits, strict=True)), name


def of_one_sequence(product: Product, shaped: Product) -> Recipe:
    """The same of h as one sequence (64, 96), as which rows of experts count."""
    return recipe_of(lambda h, w: product(h.reshape(1, 64, 96).view(64, 96), w).view(2, 32, 64), shaped)


@pytest.fixture(scope="module")
def linear_of_one_sequence() -> Recipe:
    return of_one_sequence(functional.linear, lambda w, both: w)


def by_copies(h: Tensor, w: Tensor) -> Tensor:
    """Each token goes to both experts, and on from one of them."""
    both = torch.bmm(h.repeat_interleave(2, dim=0).unsqueeze(1), w[INDEX.repeat(2)].mT)
    return both.view(64, 2, 64)[torch.arange(64), INDEX]


@pytest.mark.parametrize(
    ("product", "shaped"),
    [
        (lambda h, w: torch.bmm(h.view(2, 32, 96), w), lambda w, both: both.mT.contiguous()),
        (lambda h, w: (w @ h.view(2, 32, 96).mT).mT.reshape(64, 64), lambda w, both: both),
        (lambda h, w: torch.bmm(h.unsqueeze(1), w[INDEX].mT), lambda w, both: both),
        (lambda h, w: torch.bmm(w[INDEX], h.unsqueeze(2)), lambda w, both: both),
        (by_copies, lambda w, both: both),
    ],
)
def test_activations_of_batched_products_cost_what_those_of_the_linear_cost(
    product: Product, shaped: Product, linear_of_one_sequence: Recipe
) -> None:
    """Both matrices are the linear's, and each has its share of the linear's tokens."""
    check_costs(of_one_sequence(product, shaped), linear_of_one_sequence)

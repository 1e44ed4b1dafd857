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

    from micromix_compile.recipe.file import Recipe

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


def activation_costs(recipe: Recipe) -> Tensor:
    costs = recipe.linears["middle"].group.statistics.costs
    assert costs is not None
    return costs.activations


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
    torch.testing.assert_close(activation_costs(recipe), activation_costs(linear), rtol=1e-5, atol=1e-9)
    for name, bits in linear.packed.items():
        assert recipe.linears[name].split == linear.linears[name].split
        assert all(torch.equal(got, want) for got, want in zip(recipe.packed[name], bits, strict=True)), name


@pytest.mark.parametrize(
    ("product", "shaped"),
    [
        (torch.bmm, lambda w, both: both.mT.contiguous()),
        (lambda h, w: (w @ h.mT).mT, lambda w, both: both),
        (lambda h, w: torch.bmm(h.reshape(-1, 1, 96), w[INDEX].mT).view(2, 32, 64), lambda w, both: both),
        (lambda h, w: torch.bmm(w[INDEX], h.reshape(-1, 96, 1)).view(2, 32, 64), lambda w, both: both),
        (
            lambda h, w: (
                torch.bmm(h.reshape(-1, 96).repeat_interleave(2, dim=0).unsqueeze(1), w[INDEX.repeat(2)].mT)
                .view(2, 32, 2, 64)
                .mean(2)
            ),
            lambda w, both: both,
        ),
    ],
)
def test_activations_of_batched_products_cost_what_those_of_the_linear_cost(
    product: Product, shaped: Product, linear: Recipe
) -> None:
    """Both matrices are the linear's, and each has its share of the linear's tokens."""
    torch.testing.assert_close(
        activation_costs(recipe_of(product, shaped)), activation_costs(linear), rtol=1e-5, atol=1e-9
    )

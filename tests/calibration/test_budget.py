"""The budget solver: what holds by construction, and the best choice on cases small enough to try all of them."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.calibration import budget as budgets
from micromix_compile.calibration.assignment import assign
from micromix_compile.calibration.budget import Candidates, allowed_splits, solve_budget
from micromix_compile.config import GRANULARITIES, MicroMixConfig
from micromix_compile.recipe.fingerprint import weight_sample
from micromix_compile.recipe.types import ChannelCosts, ChannelStatistics, GroupRecipe, LinearRecipe, Recipe

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import Split


def random_group(seed: int, blocks: int, outputs: int = 1) -> Candidates:
    """Costs that fall with the bits and rise along the order, as real ones do, with noise."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(32 * blocks, generator=generator, dtype=torch.float64).sort().values * (1 + seed % 7)
    costs = torch.stack([base, base / 8, base / 10]) * (0.5 + torch.rand(3, 1, generator=generator))
    return Candidates(costs=costs, prices=(4.0 * outputs, 6.0 * outputs, 8.0 * outputs))


@st.composite
def problems(draw: st.DrawFn, most_groups: int = 5, most_blocks: int = 12) -> tuple[list[Candidates], int]:
    sizes = draw(
        st.lists(
            st.tuples(st.integers(0, 10**6), st.integers(1, most_blocks), st.integers(1, 9)),
            min_size=1,
            max_size=most_groups,
        )
    )
    return [random_group(*size) for size in sizes], draw(st.sampled_from(GRANULARITIES))


def price(group: Candidates, split: Split) -> float:
    return group.fixed + sum(k * p for k, p in zip(split, group.prices, strict=True))


def cost(group: Candidates, split: Split) -> float:
    parts = group.costs.split(list(split), dim=1)
    return sum(float(part[row].sum()) for row, part in enumerate(parts))


def channels(groups: list[Candidates]) -> float:
    """Prices of one bit a channel."""
    return sum(group.costs.shape[1] * group.prices[0] / 4 for group in groups)


def splits_of(channels: int, granularity: int, pairs: bool = False) -> list[Split]:
    return [(k4, k6, k8) for k4, k6, k8 in allowed_splits(channels, granularity, pairs_mxfp6=pairs).tolist()]


def plain_hull(group: Candidates, granularity: int) -> list[tuple[float, float, Split]]:
    """(price, cost, split), one split after the other in Python's numbers."""
    tables = []
    for costs in (group.costs, group.rotated):
        if costs is not None:
            upto = torch.cat((costs.new_zeros(3, 1, dtype=torch.float64), costs.double().cumsum(1)), dim=1)
            tables.append(upto.tolist())
    channels, points = group.costs.shape[1], []
    counts = list(range(0, channels + 1, 32))
    for k8, k6 in itertools.product(counts, counts):
        k4 = channels - k6 - k8
        is_whole = all(k % granularity == 0 or k == most for k, most in ((k8, channels), (k6, channels - k8)))
        if k4 < 0 or not is_whole or (group.pairs_mxfp6 and k6 % 64):
            continue
        cost = min(
            four[k4] + (six[k4 + k6] - six[k4]) + (eight[channels] - eight[k4 + k6]) for four, six, eight in tables
        )
        points.append((sum(k * p for k, p in zip((k4, k6, k8), group.prices, strict=True)), cost, (k4, k6, k8)))
    hull: list[tuple[float, float, Split]] = []
    for price, cost, split in sorted(points):
        if hull and cost >= hull[-1][1]:
            continue
        while len(hull) >= 2 and (hull[-2][1] - hull[-1][1]) * (price - hull[-2][0]) <= (hull[-2][1] - cost) * (
            hull[-1][0] - hull[-2][0]
        ):
            hull.pop()
        hull.append((price, cost, split))
    return hull


@given(problems(most_groups=1), st.booleans(), st.booleans(), st.booleans())
def test_the_hull_is_the_one_of_splits_taken_one_after_the_other_to_the_last_bit(
    problem: tuple[list[Candidates], int], rotates: bool, pairs: bool, ties: bool
) -> None:
    (group,), granularity = problem
    costs = (group.costs * 4).round() if ties else group.costs
    rotated = costs.flip(0) if rotates else None
    prices = (4.0, 4.0, 8.0) if ties else (4 / 3, 6 / 7, 8 * 0.1)
    group = dataclasses.replace(group, costs=costs, rotated=rotated, prices=prices, pairs_mxfp6=pairs)
    hull = [
        (point.price, point.cost, point.split) for point in budgets._lower_hull(budgets._points(group, granularity))
    ]
    assert hull == plain_hull(group, granularity)


@given(problems(), st.floats(4, 9))
def test_splits_sum_to_k_in_granules_within_the_budget(problem: tuple[list[Candidates], int], bits: float) -> None:
    groups, granularity = problem
    budget = bits * channels(groups)
    splits = solve_budget(groups, budget, granularity)
    assert sum(price(g, s) for g, s in zip(groups, splits, strict=True)) <= budget * (1 + 1e-9)
    for group, split in zip(groups, splits, strict=True):
        assert sum(split) == group.costs.shape[1]
        assert split in splits_of(sum(split), granularity)
        assert min(split) >= 0
        assert all(k % 32 == 0 for k in split)
        assert sum(k % granularity != 0 for k in split) <= 2  # as for the thresholds: one count takes what is left


@given(problems(), st.floats(4, 9))
def test_mxfp6_gets_even_numbers_of_blocks_where_pairs_are_asked_for(
    problem: tuple[list[Candidates], int], bits: float
) -> None:
    groups = [dataclasses.replace(group, pairs_mxfp6=True) for group in problem[0]]
    budget = bits * channels(groups)
    splits = solve_budget(groups, budget, problem[1])
    assert all(k6 % 64 == 0 for _, k6, _ in splits)
    assert sum(price(g, s) for g, s in zip(groups, splits, strict=True)) <= budget * (1 + 1e-9)


@given(problems(), st.floats(4, 9), st.floats(4, 9))
def test_a_larger_budget_never_takes_bits_from_a_group(
    problem: tuple[list[Candidates], int], a: float, b: float
) -> None:
    groups, granularity = problem
    low, high = (solve_budget(groups, bits * channels(groups), granularity) for bits in sorted((a, b)))
    for group, less, more in zip(groups, low, high, strict=True):
        assert price(group, less) <= price(group, more)
        assert cost(group, less) >= cost(group, more) - 1e-12


@given(problems(), st.floats(4, 9))
def test_the_result_is_the_same_every_time(problem: tuple[list[Candidates], int], bits: float) -> None:
    groups, granularity = problem
    budget = bits * channels(groups)
    assert solve_budget(groups, budget, granularity) == solve_budget(list(groups), budget, granularity)


@given(problems(most_groups=3, most_blocks=3), st.floats(4, 9))
def test_no_other_choice_of_the_same_price_costs_less(problem: tuple[list[Candidates], int], bits: float) -> None:
    groups, granularity = problem
    splits = solve_budget(groups, bits * channels(groups), granularity)
    spent = sum(price(g, s) for g, s in zip(groups, splits, strict=True))
    found = sum(cost(g, s) for g, s in zip(groups, splits, strict=True))
    for other in itertools.product(*(splits_of(g.costs.shape[1], granularity) for g in groups)):
        if sum(price(g, s) for g, s in zip(groups, other, strict=True)) <= spent:
            assert sum(cost(g, s) for g, s in zip(groups, other, strict=True)) >= found - 1e-9 * (1 + found)


def test_bits_go_where_they_matter() -> None:
    dear, cheap = random_group(3, 4), random_group(3, 4)
    dear = dataclasses.replace(dear, costs=100 * dear.costs)
    first, second = solve_budget([dear, cheap], 6 * channels([dear, cheap]), 32)
    assert price(dear, first) > price(cheap, second)


def test_a_budget_below_the_smallest_formats_is_refused() -> None:
    group = random_group(1, 2)
    with pytest.raises(ValueError, match="a budget of 255 is below 256"):
        solve_budget([group], 255, 32)


def make_recipe(config: MicroMixConfig) -> Recipe:
    """Two groups, one of two linears and with a number of channels that is no multiple of 32."""
    linears = {}
    for name, c, outputs in (("a", 90, (64, 32)), ("b", 256, (48,))):
        group = GroupRecipe(
            name=f"{name}.0",
            channel_perm=torch.cat((torch.full((-c % 32,), -1), torch.randperm(c))).int(),
            split=(c + -c % 32, 0, 0),
            statistics=ChannelStatistics(
                abs_mean=torch.rand(c),
                abs_max=torch.rand(c),
                elements=10 * c,
                tokens=10,
                batches=1,
                below={},
                costs=ChannelCosts(
                    activations=torch.rand(1, c) * torch.tensor([[1.0], [0.1], [0.2], [0.05]]),
                    weights=torch.rand(1, c) * torch.tensor([[1.0], [0.1], [0.2], [0.05]]),
                    measured=True,
                ),
            ),
        )
        for i, n in enumerate(outputs):
            fqn = f"{name}.{i}"
            sample = weight_sample(torch.randn(n, c))
            linears[fqn] = LinearRecipe(fqn=fqn, in_features=c, out_features=n, group=group, weight_sample=sample)
    return Recipe(config=config, model_id="Net", linears=linears)


@given(st.floats(4.6, 8), st.sampled_from(("same", "mxfp4")), st.sampled_from(GRANULARITIES))
def test_a_recipe_keeps_its_target_in_element_or_stored_bits(target: float, weights: str, granularity: int) -> None:
    torch.manual_seed(0)
    plain = MicroMixConfig(policy="budget", weights=weights, granularity=granularity)
    recipe = make_recipe(plain)
    element = assign(recipe, dataclasses.replace(plain, target_bits=target, target_kind="element"))
    assert 4 <= element.element_bits <= target + 1e-9
    stored = assign(recipe, dataclasses.replace(plain, target_bits=target + 1.5, target_kind="stored"))
    assert stored.stored_bits <= target + 1.5 + 1e-9
    assert len({linear.split for linear in element.linears.values()}) <= 2
    assert element.linears["a.0"].group is element.linears["a.1"].group


@given(st.floats(4, 8), st.sampled_from(GRANULARITIES))
def test_a_budget_of_time_pays_for_mxfp6_what_mxfp8_takes(target: float, granularity: int) -> None:
    torch.manual_seed(0)
    plain = MicroMixConfig(policy="budget", granularity=granularity)
    timed = assign(make_recipe(plain), dataclasses.replace(plain, target_bits=target, target_kind="time"))
    taken = sum((4 * k4 + 8 * (k6 + k8)) * linear.in_features * linear.out_features / (k4 + k6 + k8)
                for linear in timed.linears.values() for k4, k6, k8 in [linear.split])  # fmt: skip
    assert taken <= target * timed.parameters * (1 + 1e-9)
    assert all(k6 == 0 for _, k6, _ in (linear.split for linear in timed.linears.values()))  # MXFP8 is better


def test_with_mxfp4_weights_activations_cost_no_storage() -> None:
    config = MicroMixConfig(policy="budget", weights="mxfp4", target_bits=6.0, target_kind="stored")
    assert {
        linear.split[2]
        for linear in assign(make_recipe(config), dataclasses.replace(config, seed=1, lam=2.0)).linears.values()
    } == {96, 256}


def test_costs_that_were_not_taken_are_named() -> None:
    config = MicroMixConfig(policy="budget")
    recipe = make_recipe(config)
    group = recipe.linears["a.0"].group
    bare = dataclasses.replace(group, statistics=dataclasses.replace(group.statistics, costs=None))
    linears = {fqn: dataclasses.replace(linear, group=bare) for fqn, linear in recipe.linears.items()}
    with pytest.raises(ValueError, match=r"policy 'budget' needs the costs of formats, .* not take for a.0"):
        assign(dataclasses.replace(recipe, linears=linears), dataclasses.replace(config, target_bits=5.0))


def test_a_target_that_cannot_be_had_is_named() -> None:
    config = MicroMixConfig(policy="budget", target_bits=4.1, target_kind="stored")
    with pytest.raises(ValueError, match=r"target_bits=4.1 of kind 'stored' cannot be had"):
        assign(make_recipe(config), dataclasses.replace(config, lam=2.0))

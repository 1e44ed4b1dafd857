"""Splits of all groups at once: the least predicted divergence that a budget of bits can buy.

Each group of linears offers candidates, splits with a cost (predicted divergence) and a price (bits). On the lower
convex hull of a group's candidates, more bits buy ever less; the steps of all hulls, best bargain first, are one fixed
sequence, and a budget pays for a prefix of it. Hence, by construction: the budget holds, a larger one never gives a
group fewer bits, the result does not depend on chance, and no other choice of splits at the same price costs less
(the Lagrangian argument: every step taken is a better bargain than every step left).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.calibration.costs import costs_in_order, rotated_costs
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import segment_bits

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import GroupRecipe, Recipe


PAIRED_FROM: Final = 2048
"""Channels from which on, as in experts, MXFP6 gets even numbers of blocks: `targets.gluon_tiles` takes no others.

There a block is a sixty-fourth of the channels or less. A smaller linear has more to lose, and less to gain by speed.
"""


def split_by_budget(recipe: Recipe) -> dict[str, Split]:
    """The split of every group that the config's `target_bits` buy.

    Raises ValueError if calibration did not measure costs, or if not even the smallest formats fit.
    """
    config = recipe.config
    stored = config.target_kind == "stored"
    outputs = dict.fromkeys(recipe.groups, 0.0)
    of_experts = {linear.group.name for linear in recipe.linears.values() if linear.experts is not None}
    for linear in recipe.linears.values():
        outputs[linear.group.name] += linear.out_features * ((linear.experts or 1) if stored else linear.runs)
    candidates = [
        replace(
            _candidates(group, outputs[name], config),
            pairs_mxfp6=name in of_experts or group.channel_perm.numel() >= PAIRED_FROM,
        )
        for name, group in recipe.groups.items()
    ]
    budget = float(config.target_bits) * (recipe.parameters if stored else recipe.macs)
    try:
        splits = solve_budget(candidates, budget, config.granularity)
    except ValueError as error:
        raise ValueError(
            f"target_bits={config.target_bits} of kind {config.target_kind!r} cannot be had: {error}"
        ) from error
    return dict(zip(recipe.groups, splits, strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """What one group can be given. costs: (3, K) float64, of each channel of the sorted order in MXFP4, 6 and 8.

    rotated: the same in rotated blocks, None if there are to be none; a split takes what is less.
    prices: of one channel in each format, in any unit that is the same for all groups. fixed: what the group's prices
    leave out (such as scales), in that unit. pairs_mxfp6: whether only even numbers of MXFP6 blocks are offered.
    """

    costs: Tensor
    rotated: Tensor | None = None
    prices: tuple[float, float, float]
    fixed: float = 0.0
    pairs_mxfp6: bool = False


@dataclass(frozen=True, slots=True)
class _Point:
    """A split with its price and cost."""

    price: float
    cost: float
    split: Split


@dataclass(frozen=True, slots=True)
class _Step:
    """From one hull point to the next: `gain` of cost per unit of price."""

    gain: float
    group: int
    index: int
    price: float


def _candidates(group: GroupRecipe, outputs: float, config: MicroMixConfig) -> Candidates:
    """What one group offers to the budget; `outputs` is the sum of N over its linears.

    Where bytes count, those of each expert; where multiply-accumulates do, those of the experts that a token runs.
    """
    costs = costs_in_order(group, config)
    rotated = rotated_costs(group, config)
    channels, in_features = group.channel_perm.numel(), group.statistics.abs_mean.numel()
    bits = segment_bits(config.fp6)
    if config.target_kind != "stored":
        spent = bits if config.target_kind == "element" else (bits[0], bits[2], bits[2])
        four, six, eight = (each * outputs * in_features / channels for each in spent)
        return Candidates(costs=costs, rotated=rotated, prices=(four, six, eight))
    four, six, eight = (float(each * outputs) for each in (bits if config.weights == "same" else (bits[0],) * 3))
    fixed = channels * (outputs * 8 / BLOCK_SIZE + 8 * 4)  # scales, and the order's int32
    return Candidates(costs=costs, rotated=rotated, prices=(four, six, eight), fixed=fixed)


def solve_budget(groups: Sequence[Candidates], budget: float, granularity: int) -> list[Split]:
    """A split for every group, of the least total cost found whose total price is at most `budget`.

    Raises ValueError if not even the cheapest splits fit.
    """
    hulls = [_lower_hull(_points(group, granularity)) for group in groups]
    spent = sum(group.fixed for group in groups) + sum(hull[0].price for hull in hulls)
    if spent > budget * (1 + 1e-12):
        raise ValueError(f"a budget of {budget:.6g} is below {spent:.6g}, what the smallest formats take")
    chosen = [0] * len(hulls)
    for step in sorted(_steps(hulls), key=lambda step: (-step.gain, step.group, step.index)):
        spent += step.price
        if spent > budget * (1 + 1e-12):
            break
        chosen[step.group] = step.index
    return [hull[index].split for hull, index in zip(hulls, chosen, strict=True)]


def _steps(hulls: Sequence[Sequence[_Point]]) -> Iterator[_Step]:
    for group, hull in enumerate(hulls):
        for index in range(1, len(hull)):
            low, high = hull[index - 1], hull[index]
            price = high.price - low.price
            gain = float("inf") if price <= 0 else (low.cost - high.cost) / price
            yield _Step(gain, group, index, price)


def allowed_splits(channels: int, granularity: int, *, pairs_mxfp6: bool = False) -> Tensor:
    """(S, 3) int64: all splits of K = `channels`: k8 and k6 whole granules, or all that is left; MXFP4 takes the rest.

    In ascending order. pairs_mxfp6: see `Candidates`.
    """
    step = 2 * BLOCK_SIZE if pairs_mxfp6 else BLOCK_SIZE
    splits = []
    for k8 in _counts(channels, granularity).tolist():
        k6 = _counts(channels - k8, granularity)
        k6 = k6[k6 % step == 0]
        splits.append(torch.stack((channels - k6 - k8, k6, torch.full_like(k6, k8)), dim=1))
    every = torch.cat(splits)
    return every[torch.argsort(every[:, 0] * (channels + 1) + every[:, 1])]


def _counts(most: int, granularity: int) -> Tensor:
    whole = torch.arange(0, most + 1, granularity, device="cpu")
    return whole if most % granularity == 0 else torch.cat((whole, torch.tensor([most], device="cpu")))


def _points(group: Candidates, granularity: int) -> list[_Point]:
    """What a group offers, by ascending price: where cost falls; of equal points the first."""
    channels = group.costs.shape[1]
    assert channels % BLOCK_SIZE == 0, "the order is padded to whole blocks"
    tables = [_upto(costs) for costs in (group.costs, group.rotated) if costs is not None]
    splits = allowed_splits(channels, granularity, pairs_mxfp6=group.pairs_mxfp6)
    cost = torch.stack([_cost(upto, splits) for upto in tables]).amin(0)
    four, six, eight = (k.to(torch.float64) * price for k, price in zip(splits.T, group.prices, strict=True))
    price = four + six + eight
    order = torch.argsort(cost, stable=True)
    order = order[torch.argsort(price[order], stable=True)]
    lowest = torch.cat((cost.new_full((1,), torch.inf), cost[order].cummin(0).values[:-1]))
    order = order[cost[order] < lowest]
    found = zip(price[order].tolist(), cost[order].tolist(), splits[order].tolist(), strict=True)
    return [_Point(price, cost, (k4, k6, k8)) for price, cost, (k4, k6, k8) in found]


def _upto(costs: Tensor) -> Tensor:
    """(3, K + 1) float64: for each format, what all channels before one cost together."""
    costs = costs.to("cpu", torch.float64)
    return torch.cat((costs.new_zeros(3, 1), costs.cumsum(1)), dim=1)


def _cost(upto: Tensor, splits: Tensor) -> Tensor:
    """(S,) float64."""
    four, six, eight = upto
    k4, k6, k8 = splits.T
    cost: Tensor = four[k4] + (six[k4 + k6] - six[k4]) + (eight[k4 + k6 + k8] - eight[k4 + k6])
    return cost


def _lower_hull(points: Sequence[_Point]) -> list[_Point]:
    """The vertices of the lower convex hull of points by ascending price and falling cost."""
    hull: list[_Point] = []
    for point in points:
        while len(hull) >= 2 and _is_above(hull[-1], hull[-2], point):
            hull.pop()
        hull.append(point)
    return hull


def _is_above(middle: _Point, low: _Point, high: _Point) -> bool:
    """Whether `middle` lies on or above the segment from `low` to `high`."""
    return (low.cost - middle.cost) * (high.price - low.price) <= (low.cost - high.cost) * (middle.price - low.price)

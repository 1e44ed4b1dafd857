"""The table of policies: how each splits channels, and what it wants calibration to measure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from micromix_compile.calibration.budget import split_by_budget
from micromix_compile.calibration.orders import order_by_size, order_of_one_format
from micromix_compile.calibration.thresholds import split_by_thresholds, thresholds_to_count
from micromix_compile.config import ADDED_POLICIES, THRESHOLD_POLICIES, UNIFORM_POLICIES, MicroMixConfig
from micromix_compile.numerics.layout import padded_channels

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import ChannelStatistics, Recipe, Threshold


def _nothing(config: MicroMixConfig) -> tuple[Threshold, ...]:
    return ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy:
    """One row of the table.

    split: the splits of a recipe's groups by name, from their statistics, orders and the recipe's config; it raises
        ValueError where calibration did not take what it needs.
    order: the channels (C,) int64 in the order in which they share blocks, from an activation's statistics.
    counted: the thresholds below which calibration counts elements. needs_costs: calibration measures what each format
        costs, for which the first batches also run backward.
    """

    split: Callable[[Recipe], dict[str, Split]]
    order: Callable[[ChannelStatistics, MicroMixConfig], Tensor]
    counted: Callable[[MicroMixConfig], tuple[Threshold, ...]] = _nothing
    needs_costs: bool = False


def split_in_one_format(recipe: Recipe) -> dict[str, Split]:
    """All channels of every group in the format that the config's policy names."""
    position = UNIFORM_POLICIES.index(recipe.config.policy)
    splits: dict[str, Split] = {}
    for name, group in recipe.groups.items():
        channels = padded_channels(group.statistics.abs_mean.numel())
        k4, k6, k8 = (channels if i == position else 0 for i in range(3))
        splits[name] = k4, k6, k8
    return splits


_BY_THRESHOLDS: Final = Policy(split=split_by_thresholds, order=order_by_size, counted=thresholds_to_count)
_IN_ONE_FORMAT: Final = Policy(split=split_in_one_format, order=order_of_one_format)

POLICIES: Final[dict[str, Policy]] = {
    "budget": Policy(split=split_by_budget, order=order_by_size, needs_costs=True),
    **dict.fromkeys(THRESHOLD_POLICIES, _BY_THRESHOLDS),
    **dict.fromkeys(UNIFORM_POLICIES, _IN_ONE_FORMAT),
}


def policy_of(config: MicroMixConfig) -> Policy:
    """The row of the config's policy."""
    return POLICIES[config.policy]


def add_policy(name: str, policy: Policy) -> Callable[[], None]:
    """Let `MicroMixConfig(policy=name)` split channels by `policy`. Returns what takes it back.

    Raises ValueError if the name is taken.
    """
    if name in POLICIES:
        raise ValueError(f"there is a policy {name!r} already")
    POLICIES[name] = policy
    ADDED_POLICIES.append(name)

    def remove() -> None:
        if POLICIES.pop(name, None) is not None:
            ADDED_POLICIES.remove(name)

    return remove

"""Orders and splits that tensor parallelism can cut (see `numerics.shards`), for any policy.

Each shard of an activation is an activation of its own to a policy: it gets an order and a split from its own
statistics. Then the shards of an activation become one order and one split again, and keep their splits beside it.
"""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatch
from typing import TYPE_CHECKING

from torch import nn

from micromix_compile.linear.convolution import POINTWISE, why_not_pointwise
from micromix_compile.linear.experts import expert_shapes, is_experts, why_not_packed
from micromix_compile.numerics.shards import check_cut, joined_order, total
from micromix_compile.recipe.parts import split_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import ChannelCosts, ChannelStatistics, GroupRecipe, LinearRecipe, Recipe


def is_cut(fqn: str, config: MicroMixConfig) -> bool:
    """Whether ranks cut this linear, or what it is a part of, along its input channels, and shards are asked for."""
    names = (fqn, split_name(fqn)[0])
    return config.shards > 1 and any(fnmatch(name, pattern) for pattern in config.row_parallel for name in names)


def check_model(modules: Mapping[str, nn.Module], config: MicroMixConfig) -> None:
    """Raise ValueError for what can't be cut as `config` asks, of linears, convolutions that count as such and experts:
    at once, not after calibration."""
    channels = {name: module.in_features for name, module in modules.items() if isinstance(module, nn.Linear)}
    for holder, module in modules.items():
        if config.convolutions and isinstance(module, POINTWISE) and why_not_pointwise(module) is None:
            channels[holder] = module.in_channels
        if is_experts(module) and why_not_packed(module) is None:
            channels |= {f"{holder}.{name}": shape[2] for name, shape in expert_shapes(module).items()}
    for name, count in channels.items():
        if is_cut(name, config) and config.why_skipped([name]) is None:
            check_cut(count, config.shards, name)


def in_shards(recipe: Recipe) -> Recipe:
    """The recipe with a group, and a linear, for each shard of those that are cut; all others stay.

    Raises ValueError, with both numbers, for channels that cannot be cut so.
    """
    config = recipe.config
    cut = {linear.group.name for fqn, linear in recipe.linears.items() if is_cut(fqn, config)}
    for fqn, linear in recipe.linears.items():
        if linear.group.name in cut:
            check_cut(linear.in_features, config.shards, fqn)
    groups = {name: _shards(group, config.shards) for name, group in recipe.groups.items() if name in cut}
    linears: dict[str, LinearRecipe] = {}
    for fqn, linear in recipe.linears.items():
        for group in groups.get(linear.group.name, [linear.group]):
            name = fqn + group.name.removeprefix(linear.group.name)
            channels = group.statistics.abs_mean.numel()
            linears[name] = dataclasses.replace(linear, fqn=name, group=group, in_features=channels)
    return dataclasses.replace(recipe, linears=linears)


def joined(recipe: Recipe, orders: Mapping[str, Tensor], splits: Mapping[str, Split]) -> dict[str, GroupRecipe]:
    """The groups of `recipe` with what was decided for those of `in_shards(recipe)`, by their names."""
    groups: dict[str, GroupRecipe] = {}
    for name, group in recipe.groups.items():
        names = [name] if name in splits else [_name(name, i) for i in range(recipe.config.shards)]
        shards = tuple(splits[one] for one in names)
        groups[name] = dataclasses.replace(
            group,
            channel_perm=joined_order([orders[one] for one in names], shards),
            split=total(shards),
            shards=shards if len(shards) > 1 else (),
        )
    return groups


def _name(group: str, shard: int) -> str:
    return f"{group} (shard {shard})"


def _shards(group: GroupRecipe, count: int) -> list[GroupRecipe]:
    """A group a shard. Orders and splits are still open."""
    width = group.statistics.abs_mean.numel() // count
    return [
        dataclasses.replace(
            group,
            name=_name(group.name, i),
            channel_perm=group.channel_perm[:width],
            split=(0, 0, width),
            statistics=_part(group.statistics, slice(i * width, (i + 1) * width)),
        )
        for i in range(count)
    ]


def _part(statistics: ChannelStatistics, channels: slice) -> ChannelStatistics:
    """Of some channels. Thresholds were counted over all channels together: each part is taken to be like the whole."""
    costs = statistics.costs
    return dataclasses.replace(
        statistics,
        abs_mean=statistics.abs_mean[channels],
        abs_max=statistics.abs_max[channels],
        costs=None if costs is None else _part_of_costs(costs, channels),
    )


def _part_of_costs(costs: ChannelCosts, channels: slice) -> ChannelCosts:
    names = ("activations", "weights", "rotated_activations", "rotated_weights")
    tables = {name: table[:, channels] for name in names if (table := getattr(costs, name)) is not None}
    return dataclasses.replace(costs, **tables)

"""Recipes with the same shares of channels per format in every linear."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.shards import joined_order, total

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile import Recipe
    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import GroupRecipe

Shares = tuple[float, float, float]
"""In MXFP4, MXFP6 and MXFP8, in sum 1."""


def with_shares(recipe: Recipe, shares: Shares) -> Recipe:
    """The recipe with whole blocks of each format in every linear, as near to the shares as that goes.

    Where ranks cut a linear's channels, each shard has them so, in the model's order.
    """
    groups = {}
    for name, group in recipe.groups.items():
        channels, count = group.channel_perm.numel(), len(group.shards)
        if not count:
            groups[name] = replace(group, split=_split(channels, shares))
            continue
        each = (_split(channels // count, shares),) * count
        perm = joined_order([torch.arange(channels // count, dtype=torch.int32)] * count, each)
        groups[name] = replace(group, channel_perm=perm, split=total(each), shards=each)
    return _with_groups(recipe, groups)


def _split(channels: int, shares: Shares) -> Split:
    k8 = round(shares[2] * channels / BLOCK_SIZE) * BLOCK_SIZE
    k6 = min(round(shares[1] * channels / BLOCK_SIZE) * BLOCK_SIZE, channels - k8)
    return channels - k6 - k8, k6, k8


def with_activations(recipe: Recipe, activations: str, *, rotate: bool) -> Recipe:
    """The recipe with activations of another format, and all blocks rotated or none."""
    groups = {name: replace(group, rotated=sum(group.split) * rotate) for name, group in recipe.groups.items()}
    config = replace(recipe.config, activations=activations, rotate="all" if rotate else "none")
    return _with_groups(replace(recipe, config=config), groups)


def _with_groups(recipe: Recipe, groups: Mapping[str, GroupRecipe]) -> Recipe:
    linears = {name: replace(linear, group=groups[linear.group.name]) for name, linear in recipe.linears.items()}
    return replace(recipe, linears=linears)

"""Recipes with the same shares of channels per format in every linear."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from micromix_compile.numerics.formats import BLOCK_SIZE

if TYPE_CHECKING:
    from micromix_compile import Recipe

Shares = tuple[float, float, float]
"""In MXFP4, MXFP6 and MXFP8, in sum 1."""


def with_shares(recipe: Recipe, shares: Shares) -> Recipe:
    """The recipe with whole blocks of each format in every linear, as near to the shares as that goes."""
    groups = {}
    for name, group in recipe.groups.items():
        channels = group.channel_perm.numel()
        k8 = round(shares[2] * channels / BLOCK_SIZE) * BLOCK_SIZE
        k6 = min(round(shares[1] * channels / BLOCK_SIZE) * BLOCK_SIZE, channels - k8)
        groups[name] = replace(group, split=(channels - k6 - k8, k6, k8))
    linears = {name: replace(linear, group=groups[linear.group.name]) for name, linear in recipe.linears.items()}
    return replace(recipe, linears=linears)

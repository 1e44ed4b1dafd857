"""Recipes and statistics without a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.recipe.types import ChannelStatistics, GroupRecipe, LinearRecipe, Recipe

if TYPE_CHECKING:
    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.types import Threshold


def statistics(
    below: dict[Threshold, int] | None = None, elements: int = 1000, abs_mean: torch.Tensor | None = None
) -> ChannelStatistics:
    mean = torch.arange(64.0) if abs_mean is None else abs_mean
    return ChannelStatistics(
        abs_mean=mean, abs_max=mean.clone(), elements=elements, tokens=10, batches=1, below=below or {}
    )


def one_linear(seen: ChannelStatistics, config: MicroMixConfig) -> Recipe:
    """A recipe of one linear with 32 outputs, all its channels in MXFP8."""
    channels = seen.abs_mean.numel()
    perm = torch.cat((torch.full((-channels % 32,), -1), torch.arange(channels))).int()
    group = GroupRecipe(name="fc", channel_perm=perm, split=(0, 0, perm.numel()), statistics=seen)
    linear = LinearRecipe(fqn="fc", in_features=channels, out_features=32, group=group, weight_sample=torch.zeros(32))
    return Recipe(config=config, model_id="Net", linears={"fc": linear})

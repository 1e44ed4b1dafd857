"""From statistics to a recipe: the order and the split of every group under a config."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

from micromix_compile.calibration.costs import rotated_channels
from micromix_compile.calibration.orders import padded
from micromix_compile.calibration.policies import policy_of
from micromix_compile.calibration.sharding import in_shards, joined
from micromix_compile.config import THRESHOLD_POLICIES, check_config
from micromix_compile.recipe.types import check_recipe

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.types import ChannelStatistics, GroupRecipe, Recipe

logger = logging.getLogger("micromix_compile")

NUMERIC_OPTIONS = (
    "policy",
    "target_bits",
    "target_kind",
    "lam",
    "fp6",
    "weights",
    "activations",
    "rotate",
    "scale_rounding",
    "weight_rounding",
    "scale_search",
    "uniform_order",
    "granularity",
    "shards",
    "row_parallel",
)
"""Options that change orders, splits or packed weights; a recipe stays as it is while these do."""

ROUNDING = ("weight_rounding", "scale_search")


def channel_order(statistics: ChannelStatistics, config: MicroMixConfig) -> Tensor:
    """channel_perm: (K,) int32, the order of the config's policy. Padding comes first."""
    return padded(policy_of(config).order(statistics, config))


def decided(config: MicroMixConfig, activations: str) -> MicroMixConfig:
    """The config with "auto" replaced: by "same" for the policies of the paper, else by `activations`."""
    if config.activations != "auto":
        return config
    return dataclasses.replace(config, activations="same" if config.policy in THRESHOLD_POLICIES else activations)


def assign(recipe: Recipe, config: MicroMixConfig) -> Recipe:
    """The recipe solved again under `config` from its own statistics. Activations that are "auto" stay as they were.

    Linears that the config's `skip` names are dropped first; those that calibration skipped stay out. Only a model
    tells which are convolutions, or have other names, too: what is not wanted of these is dropped where it is met.
    Weights that calibration rounded are dropped if an option they depend on changes; the new recipe's are rounded to
    nearest, which its config and the log say. Raises ValueError if `config` needs statistics that calibration did not
    take, shards that don't fit the channels or convolutions that the recipe leaves out, or skips all; TypeError for
    what is no recipe or no config.
    """
    check_recipe(recipe)
    check_config(config)
    if config.convolutions and not recipe.config.convolutions:
        raise ValueError(
            f"convolutions must be False for the recipe of {recipe.model_id}, which leaves them out, got True: "
            f"calibrate again with convolutions=True"
        )
    recipe = without(recipe, {fqn: why for fqn in recipe.linears if (why := config.why_skipped([fqn])) is not None})
    config = decided(config, recipe.config.activations)
    if (config.weight_rounding, recipe.config.weight_rounding) == ("guided", "gptq"):  # there were no gradients
        config = dataclasses.replace(config, weight_rounding="gptq")
    if all(getattr(config, name) == getattr(recipe.config, name) for name in NUMERIC_OPTIONS):
        return dataclasses.replace(recipe, config=config)
    if (
        recipe.packed
        and config.rounds_weights
        and all(getattr(config, n) == getattr(recipe.config, n) for n in ROUNDING)
    ):
        logger.warning("the weights of %s were rounded for other options: now to nearest", recipe.model_id)
        config = dataclasses.replace(config, weight_rounding="nearest", scale_search=False)
    return _solved(dataclasses.replace(recipe, config=config, packed={}))


def without(recipe: Recipe, skipped: Mapping[str, str]) -> Recipe:
    """The recipe without these linears, name -> why. How much its model has besides is not known of it then.

    Raises ValueError if none is left.
    """
    if not skipped:
        return recipe
    linears = {fqn: linear for fqn, linear in recipe.linears.items() if fqn not in skipped}
    if not linears:
        fqn, why = next(iter(skipped.items()))
        raise ValueError(f"no linear of the recipe of {recipe.model_id} is left: {fqn} is left out, for {why}")
    return dataclasses.replace(
        recipe,
        linears=linears,
        refused={**recipe.refused, **skipped},
        packed={fqn: weight for fqn, weight in recipe.packed.items() if fqn in linears},
        left_alone=None,
    )


def _solved(recipe: Recipe) -> Recipe:
    """The recipe with the orders, splits and rotations that its config asks for. Raises as `assign` does."""
    config, parts = recipe.config, in_shards(recipe)
    orders = {name: channel_order(group.statistics, config) for name, group in parts.groups.items()}
    ordered = {name: dataclasses.replace(group, channel_perm=orders[name]) for name, group in parts.groups.items()}
    groups = joined(recipe, orders, policy_of(config).split(_with_groups(parts, ordered)))
    rotated = {name: rotated_channels(group, group.split, config) for name, group in groups.items()}
    return _with_groups(
        recipe, {name: dataclasses.replace(group, rotated=rotated[name]) for name, group in groups.items()}
    )


def _with_groups(recipe: Recipe, groups: Mapping[str, GroupRecipe]) -> Recipe:
    linears = {
        fqn: dataclasses.replace(linear, group=groups[linear.group.name]) for fqn, linear in recipe.linears.items()
    }
    return dataclasses.replace(recipe, linears=linears)

"""The part of `quantize_` that is about experts: which modules become `MicroMixExperts`, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.linear.experts import (
    ExpertsWeight,
    expert_shapes,
    in_place_of,
    is_experts,
    is_transposed,
    weight_names,
    why_not_packed,
)
from micromix_compile.ops.pack import packed_weight

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from micromix_compile.linear.experts import MicroMixExperts
    from micromix_compile.recipe.types import LinearRecipe, Recipe


def why_not_in_experts(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why the weight `name`, a Parameter of three dimensions, can't be packed, or None if it can."""
    holder, _, child = name.rpartition(".")
    module = modules[holder]
    if not is_experts(module):
        return f"it is a Parameter that {type(module).__name__} reads directly, not of experts as transformers has them"
    if child not in weight_names(module):
        return f"it is none of the weights {' and '.join(weight_names(module))} of {type(module).__name__}"
    return why_not_packed(module)


def packed_experts(
    places: Mapping[str, LinearRecipe], modules: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, nn.Module]:
    """The packed experts, by the names of the modules whose places they take. places: both weights of each."""
    holders = dict.fromkeys(name.rpartition(".")[0] for name in places)
    return {holder: _pack(modules[holder], holder, places, recipe) for holder in holders}


def _pack(module: nn.Module, holder: str, places: Mapping[str, LinearRecipe], recipe: Recipe) -> MicroMixExperts:
    linears = {name: places[f"{holder}.{name}".lstrip(".")] for name in weight_names(module)}
    weights = {
        name: ExpertsWeight(linear.out_features, linear.in_features, linear.split, linear.group.rotated)
        for name, linear in linears.items()
    }
    made = in_place_of(module, weights, recipe.config)
    with torch.no_grad():
        for name, linear in linears.items():
            weight = module.get_parameter(name).detach()
            _, n, channels = expert_shapes(module)[name]
            assert (n, channels) == weights[name][:2], "the recipe is for this weight"
            matrices = weight.mT if is_transposed(module) else weight
            made.load_packed(name, packed_weight(matrices, linear, recipe), linear.group.channel_perm.to(weight.device))
    return made

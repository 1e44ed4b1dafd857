"""What a recipe is made of holds tensors, whose comparison is a tensor: its parts are equal to themselves only."""

from __future__ import annotations

import copy
import dataclasses
import inspect

import torch

from micromix_compile.recipe import types
from micromix_compile.recipe.types import ChannelCosts, ChannelStatistics, GroupRecipe, Threshold


def test_parts_of_a_recipe_compare_and_hash_by_identity() -> None:
    parts = [
        kind for _, kind in inspect.getmembers(types, dataclasses.is_dataclass) if kind.__module__ == types.__name__
    ]
    assert {kind.__name__ for kind in parts if kind.__eq__ is not object.__eq__} == {"Threshold"}
    ones = torch.ones(4, 32)
    costs = ChannelCosts(activations=ones, weights=ones, measured=True)
    seen = ChannelStatistics(abs_mean=ones[0], abs_max=ones[0], elements=32, tokens=1, batches=1, below={}, costs=costs)
    group = GroupRecipe(name="g", channel_perm=torch.arange(32).int(), split=(0, 0, 32), statistics=seen)
    assert group != copy.copy(group)
    assert {group: 1}[group] == 1


def test_thresholds_are_looked_up_by_what_they_say() -> None:
    assert {Threshold(ratio=0.5): 3}[Threshold(ratio=0.5, signed=False)] == 3

"""What a recipe's file says of activations' formats and of rotations, and what files of before don't."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from support.recipe_files import Fields, Tensors, forge, make_recipe

from micromix_compile.recipe.types import ChannelCosts, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.parametrize("costs", [False, True])
def test_a_file_of_before_activations_had_formats_is_as_its_weights(tmp_path: Path, costs: bool) -> None:
    path, recipe = tmp_path / "r.safetensors", make_recipe()
    if costs:
        recipe = with_costs(recipe)
    plain = dataclasses.replace(recipe, config=dataclasses.replace(recipe.config, activations="same", rotate="none"))
    plain.save(path)

    def make_older(fields: Fields, tensors: Tensors) -> None:
        del fields["config"]["activations"], fields["config"]["rotate"], fields["groups"][0]["rotated"]
        for name in [name for name in tensors if ".rotated_" in name]:
            del tensors[name]

    forge(path, make_older)
    loaded = Recipe.load(path)
    assert loaded.config == plain.config
    group = loaded.linears["layers.0.q"].group
    assert group.rotated == 0
    assert not costs or (group.statistics.costs is not None and group.statistics.costs.rotated_weights is None)


def with_costs(recipe: Recipe) -> Recipe:
    group = recipe.linears["layers.0.q"].group
    tables = [torch.rand(4, 90) for _ in range(4)]
    costs = ChannelCosts(
        activations=tables[0],
        weights=tables[1],
        measured=True,
        rotated_activations=tables[2],
        rotated_weights=tables[3],
    )
    group = dataclasses.replace(group, statistics=dataclasses.replace(group.statistics, costs=costs))
    linears = {fqn: dataclasses.replace(linear, group=group) for fqn, linear in recipe.linears.items()}
    return dataclasses.replace(recipe, linears=linears)


def test_costs_of_rotated_blocks_survive_the_file(tmp_path: Path) -> None:
    recipe = with_costs(make_recipe())
    recipe.save(tmp_path / "r.safetensors")
    before, after = (r.linears["layers.0.q"].group.statistics.costs for r in
                     (recipe, Recipe.load(tmp_path / "r.safetensors")))  # fmt: skip
    for name in ("activations", "weights", "rotated_activations", "rotated_weights"):
        assert torch.equal(getattr(before, name), getattr(after, name))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda f: f["groups"][0].update(rotated=33), "rotated must be a multiple of 32 up to 96, got 33"),
        (lambda f: f["groups"][0].update(rotated=128), "rotated must be a multiple of 32 up to 96, got 128"),
        (lambda f: f["config"].update(activations="auto"), "must be one of same, fp8, mxfp6 in a file, got 'auto'"),
        (lambda f: f["config"].update(activations="int8"), "activations must be one of auto, same, fp8, mxfp6, got"),
    ],
)
def test_rotations_and_activations_that_no_recipe_has_are_refused(
    tmp_path: Path, edit: Callable[[Fields], None], message: str
) -> None:
    make_recipe().save(tmp_path / "r.safetensors")
    forge(tmp_path / "r.safetensors", lambda fields, _: edit(fields))
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "r.safetensors")

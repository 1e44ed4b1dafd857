"""What a report is about: the numbers of recipes, and what is neither a recipe nor a packed checkpoint."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.reports import layered_recipe

from micromix_compile.calibration.costs import costs_in_order, rotated_costs
from micromix_compile.config import MicroMixConfig
from micromix_compile.recipe.types import GroupRecipe, LinearRecipe, Recipe
from micromix_compile.report.facts import of_recipe, read

if TYPE_CHECKING:
    from pathlib import Path


@st.composite
def recipes(draw: st.DrawFn) -> Recipe:
    """Any number of groups of any size and split, each with one linear or two."""
    config = MicroMixConfig(
        weights=draw(st.sampled_from(("same", "mxfp4"))), fp6=draw(st.sampled_from(("e2m3", "e3m2")))
    )
    base = layered_recipe(config, layers=1).linears["layers.0.q"]
    linears: dict[str, LinearRecipe] = {}
    for number in range(draw(st.integers(1, 4))):
        k4, k6, k8 = (32 * draw(st.integers(0, 3)) for _ in range(3))
        k4 = k4 or 32
        channels = k4 + k6 + k8 - draw(st.integers(0, 31))
        perm = torch.cat((torch.full((k4 + k6 + k8 - channels,), -1), torch.arange(channels))).int()
        seen = dataclasses.replace(base.group.statistics, abs_mean=torch.rand(channels), costs=None)
        group = GroupRecipe(name=f"g{number}", channel_perm=perm, split=(k4, k6, k8), statistics=seen)
        for name in draw(st.sampled_from((("a",), ("a", "b")))):
            linears[f"g{number}.{name}"] = dataclasses.replace(
                base,
                fqn=f"g{number}.{name}",
                in_features=channels,
                out_features=draw(st.integers(1, 99)),
                expert_tokens=draw(st.none() | st.lists(st.integers(0, 99), min_size=1, max_size=4).map(tuple)),
                runs=draw(st.sampled_from((1.0, 2.5))),
                group=group,
            )
    left = draw(st.none() | st.tuples(st.integers(0, 10**6), st.integers(0, 10**7)))
    return Recipe(config=config, model_id="Net", linears=linears, left_alone=left)


@given(recipes())
def test_the_numbers_are_the_recipes(recipe: Recipe) -> None:
    facts = of_recipe(recipe, "r")
    for name in ("parameters", "element_bits", "stored_bytes", "stored_bits", "model_bits", "left_alone"):
        assert getattr(facts, name) == getattr(recipe, name), name
    assert sum(facts.bytes_by_part.values()) == recipe.stored_bytes
    for linear in facts.linears:
        original = recipe.linears[linear.fqn]
        assert linear.stored_bytes == recipe.stored_bytes_of(original)
        assert linear.element_bits == original.element_bits
        starved = original.starved if recipe.config.rounds_weights else ()
        assert (linear.fqn in facts.refused) == bool(starved)
        assert all(str(expert) in facts.refused[linear.fqn] for expert in starved)


def test_magnitudes_stand_in_the_stored_order_and_padding_is_zero() -> None:
    recipe = layered_recipe()
    group = recipe.linears["layers.1.k"].group
    (found,) = (one for one in of_recipe(recipe, "r").groups if one.name == group.name)
    assert found.magnitudes is not None
    assert found.fqns == ("layers.1.q", "layers.1.k")
    expected = [0.0 if c < 0 else float(group.statistics.abs_mean[c]) for c in group.channel_perm.tolist()]
    assert found.magnitudes.tolist() == expected


def test_a_predicted_cost_is_that_of_the_formats_and_the_rotation_that_were_chosen() -> None:
    recipe = layered_recipe()
    facts = of_recipe(recipe, "r")
    for group in facts.groups:
        original = recipe.groups[group.name]
        table = rotated_costs(original, recipe.config) if group.rotated else costs_in_order(original, recipe.config)
        assert table is not None
        formats = [row for row, channels in enumerate(group.split) for _ in range(channels)]
        assert group.predicted == pytest.approx(sum(float(table[row, i]) for i, row in enumerate(formats)))
    assert facts.predicted == pytest.approx(sum(group.predicted or 0 for group in facts.groups))
    assert facts.measured is True


def test_without_measured_costs_nothing_is_predicted() -> None:
    recipe = layered_recipe(layers=1)
    linears = {}
    for name, linear in recipe.linears.items():
        seen = dataclasses.replace(linear.group.statistics, costs=None)
        linears[name] = dataclasses.replace(linear, group=dataclasses.replace(linear.group, statistics=seen))
    facts = of_recipe(dataclasses.replace(recipe, linears=linears), "r")
    assert (facts.measured, facts.predicted, {group.predicted for group in facts.groups}) == (None, None, {None})


def write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content), "utf-8")
    return path


def test_what_is_neither_is_refused_with_what_is_accepted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no recipe and no packed checkpoint at .*missing"):
        read(tmp_path / "missing")
    with pytest.raises(ValueError, match=r"no recipe, and no directory .*a\.txt: not a whole safetensors file"):
        read(write(tmp_path / "a.txt", "hello"))
    with pytest.raises(ValueError, match=r"must be a recipe's file or a packed checkpoint, and has no config\.json"):
        read(tmp_path)
    write(tmp_path / "config.json", {"model_type": "llama", "quantization_config": {"quant_method": "fp8"}})
    with pytest.raises(ValueError, match=r"its quantization_config is not of micromix; micromix convert"):
        read(tmp_path)
    write(tmp_path / "config.json", {"quantization_config": {"quant_method": "micromix", "schema_version": 9}})
    with pytest.raises(ValueError, match=r"schema_version must be 1 or 2, got 9"):
        read(tmp_path)

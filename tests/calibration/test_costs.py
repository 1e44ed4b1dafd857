"""What channels cost under a config, which blocks are rotated for it, and what activations are."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import make_net
from support.recipes import one_linear, statistics

import micromix_compile as micromix
from micromix_compile.calibration.assignment import assign
from micromix_compile.calibration.costs import COMPENSATED, costs_in_order, rotated_channels, rotated_costs
from micromix_compile.config import THRESHOLD_POLICIES, MicroMixConfig
from micromix_compile.recipe.types import COST_FORMATS, ChannelCosts, GroupRecipe, Recipe
from micromix_compile.targets.target import Device, Row, Target, register_target, target_for

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import Split

PLAIN = MicroMixConfig(activations="same", rotate="auto", target_bits=5.0, weight_rounding="nearest")


def recipe_with_costs(config: MicroMixConfig, *, rotated: float | None = 0.5, channels: int = 70) -> Recipe:
    """One linear whose costs in rotated blocks are `rotated` times those in others."""
    torch.manual_seed(0)
    base = torch.rand(channels).sort().values
    table = base * torch.tensor([[1.0], [0.1], [0.2], [0.05]])
    costs = ChannelCosts(
        activations=table,
        weights=2 * table,
        measured=True,
        rotated_activations=None if rotated is None else rotated * table,
        rotated_weights=None if rotated is None else 2 * rotated * table,
    )
    seen = dataclasses.replace(statistics(abs_mean=base), costs=costs)
    return one_linear(seen, config)


def group_of(recipe: Recipe) -> GroupRecipe:
    return recipe.linears["fc"].group


@pytest.mark.parametrize(
    ("activations", "formats"),
    [("same", "e2m1 e2m3 e4m3"), ("mxfp6", "e2m3 e2m3 e4m3"), ("fp8", "e4m3 e4m3 e4m3")],
)
def test_activations_cost_what_they_will_be(activations: str, formats: str) -> None:
    config = dataclasses.replace(PLAIN, activations=activations)
    group = group_of(recipe_with_costs(config))
    costs = group.statistics.costs
    assert costs is not None
    rows = [COST_FORMATS.index(name) for name in formats.split()]
    weights = costs.weights[[COST_FORMATS.index(name) for name in ("e2m1", "e2m3", "e4m3")]]
    expected = torch.nn.functional.pad(costs.activations[rows] + weights, (26, 0)).double()
    assert torch.allclose(costs_in_order(group, config), expected)
    rounded = dataclasses.replace(config, weight_rounding="gptq")
    compensated = torch.nn.functional.pad(costs.activations[rows] + COMPENSATED * weights, (26, 0)).double()
    assert torch.allclose(costs_in_order(group, rounded), compensated)


@pytest.mark.parametrize(("factor", "expected"), [(0.5, 96), (2.0, 0), (None, 0)])
def test_blocks_are_rotated_where_that_costs_less(factor: float | None, expected: int) -> None:
    recipe = recipe_with_costs(PLAIN, rotated=factor)
    decided = assign(recipe, dataclasses.replace(PLAIN, seed=1, target_bits=5.5))
    assert group_of(decided).rotated == expected
    assert (rotated_costs(group_of(recipe), PLAIN) is None) == (factor is None)


@pytest.mark.parametrize(
    ("policy", "rotate", "expected"),
    [("budget", "none", 0), ("budget", "all", 96), ("mxfp4", "auto", 96), ("mxfp8", "auto", 0), ("mxfp8", "all", 96)]
    + [(policy, "auto", 0) for policy in THRESHOLD_POLICIES],
)
def test_the_config_says_whether_blocks_are_rotated(policy: str, rotate: str, expected: int) -> None:
    config = dataclasses.replace(PLAIN, policy=policy, rotate=rotate)
    split: Split = (32, 32, 32)
    assert rotated_channels(group_of(recipe_with_costs(config)), split, config) == expected


def test_a_budget_counts_on_the_rotation_that_it_gets() -> None:
    """Where rotated MXFP4 is free, and nothing else is cheap, all is rotated MXFP4, whatever the budget."""
    recipe = recipe_with_costs(PLAIN, rotated=0.0)
    config = dataclasses.replace(PLAIN, target_bits=7.0)
    assert group_of(assign(recipe, config)).split == (96, 0, 0)
    without = assign(recipe, dataclasses.replace(config, rotate="none"))
    assert group_of(without).split[0] < 96


@pytest.mark.parametrize("preferred", ["same", "fp8"])
@pytest.mark.usefixtures("fresh_compiler")
def test_what_activations_are_follows_from_device_and_policy(preferred: str, caplog: pytest.LogCaptureFixture) -> None:
    target = dataclasses.replace(target_for(Device(type="cpu", model="cpu")), activations=preferred)
    remove = register_target(Row(serves=lambda device: device.type == "cpu", target=lambda _: target))
    try:
        configs = [MicroMixConfig(policy=name) for name in ("mxfp8", *THRESHOLD_POLICIES)]
        batches = [torch.randn(2, 9, 64)]
        with caplog.at_level("INFO", "micromix_compile"):
            found = [r.config for r in micromix.calibrate_each(make_net(layers=1), batches, configs, progress=False)]
    finally:
        remove()
    assert [config.activations for config in found] == [preferred, "same", "same", "same"]
    speed = "faster" if preferred == "same" else "no faster"
    assert f"activations of Net: {preferred}, because {target.name} multiplies MXFP4 {speed} than FP8" in caplog.text
    again = assign(Recipe(config=found[0], model_id="Net", linears={}), MicroMixConfig(policy="mxfp4"))
    assert again.config.activations == preferred


def test_only_devices_that_multiply_mxfp4_faster_keep_it_for_activations() -> None:
    gpus = {capability: Device(type="cuda", model="GPU", capability=capability) for capability in
            ((8, 0), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1))}  # fmt: skip
    assert {c: target_for(gpu).activations for c, gpu in gpus.items()} == {
        (8, 0): "fp8", (9, 0): "fp8", (10, 0): "same", (10, 3): "same", (12, 0): "same", (12, 1): "fp8",
    }  # fmt: skip
    assert Target(name="unknown").activations == "fp8"

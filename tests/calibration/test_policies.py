"""The table of policies."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import make_net
from support.recipes import one_linear, statistics

import micromix_compile as micromix
from micromix_compile import config as config_module
from micromix_compile.calibration.assignment import channel_order
from micromix_compile.calibration.orders import order_by_size
from micromix_compile.calibration.policies import POLICIES, Policy, add_policy, split_in_one_format
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Iterator

    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import Recipe


def test_every_policy_of_the_config_has_a_row() -> None:
    assert set(POLICIES) == set(config_module.POLICY_NAMES)


@pytest.mark.parametrize(("policy", "position"), [("mxfp4", 0), ("mxfp6", 1), ("mxfp8", 2)])
def test_uniform_policies_use_one_format_in_the_models_order(policy: str, position: int) -> None:
    config = MicroMixConfig(policy=policy, uniform_order="model")
    seen = statistics(abs_mean=torch.rand(70))
    split = split_in_one_format(one_linear(seen, config))["fc"]
    assert split[position] == sum(split) == 96
    assert channel_order(seen, config).tolist() == [-1] * 26 + list(range(70))


def test_configs_are_hashable_and_comparable() -> None:
    assert len({MicroMixConfig(), MicroMixConfig(), dataclasses.replace(MicroMixConfig(), lam=2.0)}) == 2


def half_and_half(recipe: Recipe) -> dict[str, Split]:
    """MXFP4 and MXFP8, in halves of whole blocks."""
    channels = {name: group.channel_perm.numel() for name, group in recipe.groups.items()}
    return {name: (k // 64 * 32, 0, k - k // 64 * 32) for name, k in channels.items()}


@pytest.fixture
def half() -> Iterator[str]:
    """A policy that is not ours, for the time of a test."""
    remove = add_policy("half", Policy(split=half_and_half, order=order_by_size))
    yield "half"
    for _ in range(2):  # the second time is of no effect
        remove()
    assert "half" not in POLICIES


def test_a_policy_from_outside_splits_a_model(half: str) -> None:
    """CONTRIBUTING, "Add a policy"."""
    config = MicroMixConfig(policy=half)
    recipe = micromix.calibrate(make_net(layers=1), [torch.randn(2, 9, 64)], config, progress=False)
    assert {linear.split for linear in recipe.linears.values()} >= {(32, 0, 32)}


def test_a_name_that_is_taken_is_refused(half: str) -> None:
    for name in ("budget", half):
        with pytest.raises(ValueError, match=f"there is a policy '{name}' already"):
            add_policy(name, Policy(split=half_and_half, order=order_by_size))


def test_a_policy_that_nobody_added_is_refused() -> None:
    with pytest.raises(ValueError, match=r"policy must be one of budget, .*, got 'half'"):
        MicroMixConfig(policy="half")

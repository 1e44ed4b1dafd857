"""What experts see of calibration, how they count in a budget, how they are rounded, what a recipe's file keeps."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from support.grouped import expert_of_rows
from support.recipes import one_linear, statistics
from support.strategies import Routing, routings

from micromix_compile.calibration.budget import split_by_budget
from micromix_compile.calibration.experts import ExpertObserver, Routed
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import pack_weight, packed_weight, round_experts, round_weights
from micromix_compile.recipe.fingerprint import Checksums, weight_sample
from micromix_compile.recipe.types import FEW_TOKENS, ChannelCosts, LinearRecipe, Recipe

if TYPE_CHECKING:
    from pathlib import Path

    from micromix_compile.numerics.layout import PackedWeight


@given(routings(6, 3))
def test_each_expert_counts_the_rows_that_it_reads_and_that_are_no_padding(routing: Routing) -> None:
    x, keep = torch.randn(6, 8), torch.tensor([True, False, True, True, True, False])
    observer, routed = ExpertObserver(3), Routed.of(routing.offs, routing.rows, keep)
    observer.update(routed, 4)
    observer.update_moments(x, routed)
    owners = expert_of_rows(*routing)
    pairs = [
        (e, t, row)
        for row, (e, t) in enumerate(zip(owners, routing.rows.tolist(), strict=True))
        if e is not None and keep[t]
    ]
    assert observer.tokens == [sum(e == expert for e, *_ in pairs) for expert in range(3)]
    assert observer.runs == len(pairs) / 4
    moments, guided = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    slope = torch.randn(len(owners), 5)
    observer.update_guided(x, slope, routed)
    for expert, token, row in pairs:
        moments[expert] += torch.outer(x[token], x[token])
        guided[expert] += torch.outer(x[token], x[token]) * slope[row].square().sum()
    torch.testing.assert_close(observer.moments_for("gptq", "w"), moments)
    torch.testing.assert_close(observer.moments_for("guided", "w"), guided)
    if pairs:
        assert observer.guided is not None
        observer.guided[0, 1, 1] = torch.inf
        with pytest.raises(ValueError, match=r"outputs of w are not finite.*weight_rounding='gptq'"):
            observer.moments_for("guided", "w")
    observer.forget_moments()
    assert observer.moments_for("gptq", "w") is None


CONFIG = MicroMixConfig(activations="fp8", weight_rounding="gptq", rotate="none")


def recipe_of_experts(weight: torch.Tensor, tokens: tuple[int, ...], packed: PackedWeight | None = None) -> Recipe:
    one = one_linear(statistics(elements=640), CONFIG)
    group = dataclasses.replace(one.linears["fc"].group, name="w", split=(32, 0, 32))
    experts, n, channels = weight.shape
    linear = LinearRecipe(
        fqn="w", in_features=channels, out_features=n, group=group, weight_sample=weight_sample(weight),
        weight_checksums=Checksums.of(weight.flatten(0, 1)), expert_tokens=tokens, runs=sum(tokens) / 10,
    )  # fmt: skip
    assert linear.experts == experts
    return dataclasses.replace(one, linears={"w": linear}, packed={} if packed is None else {"w": packed})


def test_each_expert_is_rounded_by_its_own_inputs_and_a_starved_one_to_nearest() -> None:
    weight, x = torch.randn(3, 32, 64), torch.randn(3, 90, 64) * torch.rand(3, 1, 64)
    recipe = recipe_of_experts(weight, (90, 90, FEW_TOKENS - 1))
    linear, moments = recipe.linears["w"], x.mT @ x
    assert linear.starved == (2,)
    got = round_experts(weight, linear.group, moments, linear.starved, CONFIG)
    for expert in range(2):
        want = round_weights({"": weight[expert]}, linear.group, moments[expert], CONFIG)[""]
        assert all(torch.equal(part[expert], own) for part, own in zip(got, want, strict=True))
    nearest = pack_weight(weight, linear.group, CONFIG)
    assert all(torch.equal(part[2], own[2]) for part, own in zip(got, nearest, strict=True))
    assert not torch.equal(got.w4[0], nearest.w4[0])


def test_a_file_keeps_experts(tmp_path: Path) -> None:
    weight = torch.randn(3, 32, 64)
    recipe = recipe_of_experts(weight, (5, 0, 90))
    packed = pack_weight(weight, recipe.linears["w"].group, CONFIG)
    recipe = dataclasses.replace(recipe, packed={"w": packed})
    recipe.save(tmp_path / "recipe")
    read = Recipe.load(tmp_path / "recipe")
    linear = read.linears["w"]
    assert (linear.expert_tokens, linear.runs, linear.shape) == ((5, 0, 90), 9.5, (3, 32, 64))
    got = packed_weight(weight, linear, read)
    assert all(torch.equal(a, b) for a, b in zip(got, packed, strict=True))


def test_bytes_count_every_expert_and_multiplications_those_that_a_token_runs() -> None:
    recipe = recipe_of_experts(torch.randn(4, 32, 64), (10, 5, 5, 0))
    linear = recipe.linears["w"]
    assert (linear.parameters, recipe.parameters) == (4 * 32 * 64, 4 * 32 * 64)
    assert (linear.macs, recipe.macs) == (32 * 64 * 2, 32 * 64 * 2)
    assert recipe.stored_bytes_of(linear) == sum(part.numel() for part in pack_weight(
        torch.randn(4, 32, 64), linear.group, CONFIG
    ))  # fmt: skip


@pytest.mark.parametrize(("kind", "cheaper"), [("element", "experts"), ("stored", "dense")])
def test_a_budget_pays_for_what_its_kind_counts(kind: str, cheaper: str) -> None:
    """Both gain alike from bits; of 16 experts of a quarter of the dense size a token runs 2: half of it, four times
    its bytes."""
    config = dataclasses.replace(CONFIG, policy="budget", target_bits=5.5, target_kind=kind, rotate="none")
    falling = torch.tensor([8.0, 4.0, 4.0, 0.0])[:, None].expand(4, 64).contiguous()
    costs = ChannelCosts(activations=torch.zeros(4, 64), weights=falling, measured=True)
    base = one_linear(dataclasses.replace(statistics(), costs=costs), config)
    fc = base.linears["fc"]
    groups = {name: dataclasses.replace(fc.group, name=name) for name in ("dense", "experts")}
    dense = dataclasses.replace(fc, fqn="dense", group=groups["dense"], out_features=128)
    experts = dataclasses.replace(
        fc, fqn="experts", group=groups["experts"], out_features=32, expert_tokens=(40,) * 16, runs=2.0
    )
    splits = split_by_budget(dataclasses.replace(base, linears={"dense": dense, "experts": experts}))
    bits = {name: 4 * k4 + 6 * k6 + 8 * k8 for name, (k4, k6, k8) in splits.items()}
    assert max(bits, key=lambda name: bits[name]) == cheaper
    assert bits["dense"] != bits["experts"]

"""Recipes whose orders ranks can cut: every policy, what they cost, their files, and what cannot be cut."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import TYPE_CHECKING

import pytest
import torch
from support.experts import model_of_experts
from support.llama import llama, token_batches
from support.recipe_files import Fields, Tensors, forge
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile.calibration.assignment import assign
from micromix_compile.config import POLICY_NAMES, MicroMixConfig
from micromix_compile.linear.gradient import packed_product
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.numerics.shards import Cut, total
from micromix_compile.recipe.orders import check_order
from micromix_compile.recipe.types import Recipe
from micromix_compile.verbs.calibrate import calibrate_each

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from torch import Tensor, nn

    from micromix_compile.numerics.layout import Split

DOWN = "model.layers.1.mlp.down_proj"
CUT = ("o_proj", "down_proj")


def config(policy: str = "budget", **options: object) -> MicroMixConfig:
    return MicroMixConfig(policy=policy, weight_rounding="nearest", scale_search=False, shards=2, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return llama(intermediate_size=256)


@pytest.fixture(scope="module")
def recipes(model: nn.Module) -> dict[str, Recipe]:
    """By policy, from one calibration."""
    torch.manual_seed(0)
    configs = [config(policy, target_bits=5.0) for policy in POLICY_NAMES]
    return dict(zip(POLICY_NAMES, calibrate_each(model, token_batches(), configs, progress=False), strict=True))


@pytest.mark.parametrize("policy", POLICY_NAMES)
def test_every_policy_orders_what_ranks_cut_shard_by_shard_and_nothing_else(
    recipes: dict[str, Recipe], policy: str
) -> None:
    recipe = recipes[policy]
    for fqn, linear in recipe.linears.items():
        group = linear.group
        assert len(group.shards) == (2 if fqn.endswith(CUT) else 0)
        check_order(group.channel_perm, linear.in_features, fqn, group.shards)
        if group.shards:
            assert {sum(shard) for shard in group.shards} == {linear.in_features // 2}
            assert total(group.shards) == group.split
    if policy == "budget":
        assert recipe.element_bits <= 5.0


def test_shards_of_other_costs_get_other_splits() -> None:
    """Half of the channels of an activation hold all that is large."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)).eval()
    with torch.no_grad():
        net[0].weight[64:] *= torch.exp2(torch.randint(0, 9, (64, 1)))
    wanted = config(row_parallel=("1",), skip=("0",), target_bits=6)
    group = micromix.calibrate(net, [torch.randn(16, 64)], wanted, progress=False).linears["1"].group
    assert group.shards[0] != group.shards[1]
    check_order(group.channel_perm, 128, "1", group.shards)


def test_a_rank_computes_its_part_from_what_the_recipe_lists(model: nn.Module, recipes: dict[str, Recipe]) -> None:
    packed = micromix.quantize_(llama(intermediate_size=256), assign_to(model, recipes["budget"]))
    linear, shards = packed.get_submodule(DOWN), shards_of(recipes, DOWN)
    assert isinstance(linear, MicroMixLinear)
    x = torch.randn(3, 256)
    weight = PackedWeight(linear.weight_q4, linear.weight_q6, linear.weight_q8, linear.weight_scale)
    sums = torch.zeros(3, linear.out_features)
    for rank in range(2):
        cut = Cut(shards, rank, 2)
        layout = linear.layout._replace(
            k4=cut.split[0], k6=cut.split[1], k8=cut.split[2], rotated=cut.rotated(linear.layout.rotated)
        )
        own = x[:, 128 * rank : 128 * (rank + 1)]
        order = cut.order(linear.order.channel_perm)
        sums += packed_product(own, None, order, tuple(cut.weight(weight)), layout)
    assert torch.allclose(sums, linear(x), atol=1e-5)


def assign_to(model: nn.Module, recipe: Recipe) -> Recipe:
    """The recipe with activations whose blocks have scales of their own: rows of ranks have each a scale of theirs."""
    return assign(recipe, dataclasses.replace(recipe.config, activations="same"))


def test_one_device_loads_a_checkpoint_that_ranks_can_cut(
    model: nn.Module, recipes: dict[str, Recipe], tmp_path: Path
) -> None:
    packed = micromix.quantize_(copy.deepcopy(model), recipes["budget"])
    packed.save_pretrained(tmp_path)  # type: ignore[operator]
    tokens = token_batches(1)[0]
    with torch.no_grad():
        assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path)(tokens).logits, packed(tokens).logits)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text("utf-8"))
    assert config["quantization_config"]["linears"][DOWN]["shards"] == [list(s) for s in shards_of(recipes, DOWN)]
    config["quantization_config"]["linears"][DOWN]["shards"][0] = [0, 0, 0]
    path.write_text(json.dumps(config), "utf-8")
    micromix.seal(tmp_path)
    with pytest.raises(ValueError, match=r"down_proj'\].shards must be splits of one width that sum to"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_checkpoint_whose_order_no_ranks_can_cut_is_refused(
    model: nn.Module, recipes: dict[str, Recipe], tmp_path: Path
) -> None:
    packed = micromix.quantize_(copy.deepcopy(model), recipes["budget"])
    order = packed.get_submodule(f"{DOWN}.order")
    order.channel_perm = order.channel_perm.flip(0)  # type: ignore[operator, union-attr]
    packed.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(ValueError, match=r"down_proj.order.channel_perm must have the channels of shard 0 of 2 in its"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def shards_of(recipes: dict[str, Recipe], fqn: str) -> tuple[Split, ...]:
    return recipes["budget"].linears[fqn].group.shards


def test_shards_that_do_not_divide_the_channels_are_refused_with_both_numbers(recipes: dict[str, Recipe]) -> None:
    recipe = recipes["budget"]
    with pytest.raises(ValueError, match=r"o_proj has 128 input channels, which shards=8 do not cut into whole blocks"):
        assign(recipe, dataclasses.replace(recipe.config, shards=8))


def test_a_model_that_cannot_be_cut_is_refused_before_it_is_calibrated(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"layers.0.self_attn.o_proj has 128 input channels, which shards=3 do not"):
        micromix.calibrate(model, never(), dataclasses.replace(config(), shards=3))
    skipping = dataclasses.replace(config(), shards=3, skip=("*o_proj",))
    with pytest.raises(ValueError, match=r"layers.0.mlp.down_proj has 256 input channels, which shards=3 do not"):
        micromix.calibrate(model, never(), skipping)


def test_experts_that_cannot_be_cut_are_refused_before_they_are_calibrated() -> None:
    model = model_of_experts("mixtral")
    with pytest.raises(
        ValueError, match=r"mlp.experts.down_proj has 96 input channels, which shards=2 do not cut into"
    ):
        micromix.calibrate(model, never(), config())


@pytest.mark.parametrize("kernel_size", [1, 3])
def test_convolutions_that_cannot_be_cut_are_refused_like_linears(kernel_size: int) -> None:
    """Those that count as such."""
    net = torch.nn.Sequential(torch.nn.Conv1d(96, 64, kernel_size), torch.nn.Linear(8, 32)).eval()
    wanted = dataclasses.replace(config(), convolutions=True, row_parallel=("0",))
    if kernel_size == 3:
        assert list(micromix.calibrate(net, [torch.randn(1, 96, 10)], wanted).linears) == ["1"]
        return
    with pytest.raises(ValueError, match="0 has 96 input channels, which shards=2 do not cut into whole blocks of 32"):
        micromix.calibrate(net, never(), wanted)


class Halves(torch.nn.Module):
    """The rows of a weight in two products."""

    def __init__(self) -> None:
        super().__init__()
        self.o_proj = torch.nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.o_proj.weight.chunk(2)
        return torch.nn.functional.linear(x, first) + torch.nn.functional.linear(x, second)


def test_parts_of_a_weight_are_cut_as_it_is() -> None:
    recipe = micromix.calibrate(Halves().eval(), [torch.randn(4, 64)], config("mxfp8"), progress=False)
    assert {fqn: len(linear.group.shards) for fqn, linear in recipe.linears.items()} == {
        "o_proj[0:64]": 2,
        "o_proj[64:128]": 2,
    }


def never() -> Iterator[Tensor]:
    raise AssertionError("a batch was asked for")
    yield


def test_a_recipe_is_solved_again_for_other_shards(recipes: dict[str, Recipe]) -> None:
    recipe = recipes["budget"]
    four = assign(recipe, dataclasses.replace(recipe.config, shards=4))
    none = assign(recipe, dataclasses.replace(recipe.config, shards=1))
    assert len(four.linears[DOWN].group.shards) == 4
    assert none.linears[DOWN].group.shards == ()


def test_shards_survive_the_file(recipes: dict[str, Recipe], tmp_path: Path) -> None:
    recipes["budget"].save(tmp_path / "r")
    loaded = Recipe.load(tmp_path / "r")
    assert {n: g.shards for n, g in loaded.groups.items()} == {n: g.shards for n, g in recipes["budget"].groups.items()}
    assert loaded.config == recipes["budget"].config


def uneven(fields: Fields, tensors: Tensors) -> None:
    group = group_of(fields)
    (a4, *rest), (b4, *others) = group["shards"]
    group["shards"] = [[a4 + 32, *rest], [b4 - 32, *others]]


def of_another_sum(fields: Fields, tensors: Tensors) -> None:
    group_of(fields)["shards"] = [[0, 0, 128], [0, 0, 160]]


def swapped(fields: Fields, tensors: Tensors) -> None:
    order = tensors[f"{DOWN}.channel_perm"]
    first, second = int((order == 0).nonzero()), int((order == 255).nonzero())
    order[first], order[second] = 255, 0


def single(fields: Fields, tensors: Tensors) -> None:
    group = group_of(fields)
    group["shards"] = [group["split"]]


def group_of(fields: Fields) -> Fields:
    return next(group for group in fields["groups"] if group["name"] == DOWN)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (uneven, "shards must be splits of one width that sum to"),
        (of_another_sum, "shards must be splits of one width that sum to"),
        (single, "must be a list of two or more splits, each three multiples of 32"),
        (swapped, "must have the channels of shard 0 of 2 in its places"),
    ],
)
def test_shards_that_fit_no_order_are_refused(
    recipes: dict[str, Recipe], tmp_path: Path, edit: Callable[[Fields, Tensors], None], message: str
) -> None:
    recipes["budget"].save(tmp_path / "r")
    forge(tmp_path / "r", edit)
    with pytest.raises(ValueError, match=message):
        Recipe.load(tmp_path / "r")

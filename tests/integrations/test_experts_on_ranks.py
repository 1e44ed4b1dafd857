"""Packed experts on several ranks: transformers' tensor parallelism and its expert parallelism.

Both on two processes that talk over gloo, and, for every way in which transformers keeps experts, rank by rank here.
"""

from __future__ import annotations

import functools
import itertools
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from support.experts import model_of_experts
from support.rank_jobs import IDS, run_ranks
from support.strategies import splits
from torch import nn

import micromix_compile as micromix
from micromix_compile.integrations import own_parts, tensor_parallel
from micromix_compile.integrations.tensor_parallel import Dealing, Ranks
from micromix_compile.linear.experts import ExpertsWeight, expert_shapes, in_place_of
from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.numerics.shards import joined_order, total

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from micromix_compile.linear.experts import MicroMixExperts
    from micromix_compile.numerics.layout import Split

ULPS = 2e-6
"""Of float32 sums of a few hundred terms, in another order, as a part of the largest."""

CHECKPOINTS: Final[dict[str, tuple[str, dict[str, Any], dict[str, Any]]]] = {
    "mixtral": ("mixtral", {"intermediate_size": 256}, {"shards": 2}),
    "qwen3_moe": ("qwen3_moe", {"moe_intermediate_size": 128}, {"shards": 2, "rotate": "all", "weights": "mxfp4"}),
    "gpt_oss": ("gpt_oss", {}, {"shards": 2, "row_parallel": ("*o_proj",)}),
    "three": ("mixtral", {}, {"shards": 3, "row_parallel": ("*experts.down_proj",)}),
}
"""By their names: the model, its sizes, and options of the config."""


def packed(path: Path, kind: str, sizes: dict[str, Any], options: dict[str, Any]) -> str:
    """A checkpoint of a model whose channels are of very different sizes."""
    model = model_of_experts(kind, **sizes)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("layernorm.weight"):
                parameter *= torch.exp(2 * torch.randn_like(parameter))
            if name.endswith("gate_up_proj"):
                parameter *= torch.exp(2 * torch.randn(parameter.shape[1], 1))
    common = {"weight_rounding": "nearest", "scale_search": False, "activations": "same", "rotate": "none"}
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**{**common, **options}), progress=False)
    micromix.quantize_(model, recipe).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The checkpoints."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: packed(root / name, *row) for name, row in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def answers(made: dict[str, str]) -> dict[str, list[Any]]:
    """What each job came to on each of two ranks."""
    jobs = {
        "tensors of mixtral": {"job": "numbers", "checkpoint": made["mixtral"]},
        "tensors of qwen3_moe": {"job": "numbers", "checkpoint": made["qwen3_moe"]},
        "experts of mixtral": {"job": "numbers", "checkpoint": made["mixtral"], "ep_size": 2},
        "experts of gpt_oss": {"job": "numbers", "checkpoint": made["gpt_oss"], "ep_size": 2},
        "experts of other batches": {
            "job": "numbers", "checkpoint": made["qwen3_moe"], "ep_size": 2, "fsdp_size": 2, "tp_plan": None
        },
        "parts": {"job": "experts", "checkpoint": made["mixtral"]},
        "whole parts": {"job": "experts", "checkpoint": made["qwen3_moe"], "ep_size": 2},
        "three": {"job": "numbers", "checkpoint": made["three"]},
        "handed": {"job": "handed", "checkpoint": made["mixtral"]},
    }  # fmt: skip
    return dict(zip(jobs, run_ranks(2, *jobs.values()), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "tensors of mixtral", "tensors of qwen3_moe", "experts of mixtral", "experts of gpt_oss",
        "experts of other batches",
    ],
)  # fmt: skip
def test_two_ranks_compute_what_one_does(answers: dict[str, list[Any]], name: str) -> None:
    for found in answers[name]:
        assert found["logits"] < ULPS, found
        assert found["gradient"] < 100 * ULPS  # differences of terms that the norms' gains make large
        assert found["tokens"]


@pytest.mark.deep  # half a minute of two processes
def test_packed_experts_that_are_dealt_to_ranks_compile(made: dict[str, str]) -> None:
    cut = {"job": "compiled", "checkpoint": made["mixtral"]}
    for found in itertools.chain(*run_ranks(2, cut, {**cut, "ep_size": 2})):
        assert found["logits"] < ULPS
        assert found["calls"]["micromix::mixed_mx_mm"] == 4
        assert found["calls"]["micromix::grouped_mx_mm"] == 2


@pytest.mark.parametrize(
    ("name", "up", "down"),
    [("parts", [4, 256, 64], [4, 64, 128]), ("whole parts", [2, 256, 64], [2, 64, 128])],
)
def test_a_rank_keeps_its_part_of_the_experts_and_nothing_else(
    answers: dict[str, list[Any]], name: str, up: list[int], down: list[int]
) -> None:
    for found in answers[name]:
        assert [part["shape"] for part in found.values()] == [up, down]
        for part in found.values():
            assert part["equal"], found
            assert part["bytes"] <= part["needed"] + 4 * 256  # each tensor begins on a boundary


def test_transformers_puts_the_ranks_parts_into_the_model_and_never_a_whole_tensor(
    answers: dict[str, list[Any]],
) -> None:
    for found in answers["handed"]:
        assert found["given"] == found["own"]
        assert len(found["own"]) == 4 * (4 + 2)  # of four linears, and two weights of experts


def test_ranks_that_do_not_divide_the_shards_of_experts_are_refused_with_both_numbers(
    answers: dict[str, list[Any]],
) -> None:
    assert all("experts.down_proj is ordered for shards=3, which 2 ranks do not divide" in a for a in answers["three"])


class Kind:
    """Experts of transformers in a place called `experts`, empty, and the plans of the model that has them."""

    def __init__(self, module: str, experts: str, config: Any) -> None:
        made = getattr(__import__(f"transformers.models.{module}", fromlist=["_"]), experts)
        self.batched = experts == "Llama4TextExperts"
        with torch.device("meta"):
            self.original = made(config)
        self.tp_plan, self.ep_plan = (
            {name[name.index("experts") :]: style for name, style in (plan or {}).items() if ".experts" in name}
            for plan in (config.base_model_tp_plan, config.base_model_ep_plan)
        )

    def packed(self, whole: Mapping[str, PackedWeight], shards: Mapping[str, tuple[Split, ...]]) -> nn.Module:
        """A model of packed experts that hold these."""
        weights = {
            name: ExpertsWeight(n, c, total(shards[name])) for name, (_, n, c) in expert_shapes(self.original).items()
        }
        made = in_place_of(self.original, weights, micromix.MicroMixConfig(activations="same", rotate="none"))
        for name, weight in whole.items():
            width = sum(shards[name][0])
            generator = torch.Generator().manual_seed(width)
            orders = [torch.randperm(width, generator=generator) for _ in shards[name]]
            made.load_packed(name, weight, joined_order(orders, shards[name]).int())
        return nn.ModuleDict({"experts": made})


KINDS: Final = ("gate above the rest", "no gate", "transposed", "batched")
"""Every way in which transformers keeps experts that its plans cut."""


@functools.cache
def kind_of(name: str) -> Kind:
    """One of `KINDS`."""
    sizes: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 128}
    if name == "gate above the rest":
        mixtral = transformers.MixtralConfig(num_local_experts=4, **sizes)
        return Kind("mixtral.modeling_mixtral", "MixtralExperts", mixtral)
    if name == "no gate":
        nemotron = transformers.NemotronHConfig(n_routed_experts=4, moe_latent_size=None, **sizes)
        return Kind("nemotron_h.modeling_nemotron_h", "NemotronHExperts", nemotron)
    if name == "transposed":
        return Kind("aria.modeling_aria", "AriaExperts", transformers.AriaTextConfig(moe_num_experts=4, **sizes))
    llama4 = transformers.Llama4TextConfig(num_local_experts=4, **sizes)
    return Kind("llama4.modeling_llama4", "Llama4TextExperts", llama4)


LINEARS: Final = {
    "layers.3.mlp.experts.gate_up_proj": {
        "experts": 4, "out_features": 256, "in_features": 64, "split": [64, 0, 0], "group": "up"
    },
    "layers.3.mlp.experts.down_proj": {
        "experts": 4, "out_features": 64, "in_features": 128, "split": [128, 0, 0], "group": "down"
    },
}  # fmt: skip
"""What a checkpoint's config says of experts whose orders no ranks can cut."""

PLAN: Final = {
    "layers.*.mlp.experts": "moe_tp_experts",
    "layers.*.mlp.experts.gate_up_proj": "packed_colwise",
    "layers.*.mlp.experts.down_proj": "rowwise",
}
EP_PLAN: Final = {
    "layers.*.mlp.experts": "ep_dispatch_experts",
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
}


@pytest.mark.parametrize(
    ("plan", "ep_plan", "reason"),
    [
        (PLAN, {}, r"^layers\.3\.mlp\.experts\.down_proj is ordered for shards=1, which 3 ranks do not divide"),
        (
            {**PLAN, "layers.*.mlp.experts.gate_up_proj": "colwise"}, {},
            r"gate_up_proj: its style in tp_plan must be 'packed_colwise' for packed experts, got 'colwise'",
        ),
        (
            {"layers.*.mlp.experts.gate_up_proj": "packed_colwise"}, {},
            r"mlp\.experts: its style in tp_plan must be 'moe_tp_experts' for packed experts, got None",
        ),
        (PLAN, EP_PLAN, r"^layers\.3\.mlp\.experts has 4 experts, which ep_size=3 does not divide"),
        (
            PLAN, {"layers.*.mlp.experts": "ep_dispatch_experts"},
            r"gate_up_proj: its style in ep_plan must be 'grouped_gemm' for packed experts, got None",
        ),
    ],
)  # fmt: skip
def test_experts_that_cannot_be_dealt_are_refused_by_name(
    plan: dict[str, str], ep_plan: dict[str, str], reason: str
) -> None:
    modules = {"layers.3.mlp.experts": kind_of("gate above the rest").original}
    with pytest.raises(ValueError, match=reason):
        tensor_parallel.parts_of(modules, LINEARS, Dealing(Ranks(3, 1, plan), Ranks(3, 1, ep_plan)), w_fp4=False)


def test_experts_with_biases_are_dealt_whole_only() -> None:
    modules = {"layers.3.mlp.experts": model_of_experts("gpt_oss").model.layers[0].mlp.experts}
    plan = {**PLAN, "layers.*.mlp.experts.gate_up_proj": "rowwise"}
    with pytest.raises(ValueError, match=r"mlp\.experts: packed experts with biases are dealt whole only: set ep_size"):
        tensor_parallel.parts_of(modules, LINEARS, Dealing(Ranks(2, 0, plan), Ranks(1, 0, {})), w_fp4=False)
    dealing = Dealing(Ranks(2, 0, plan), Ranks(2, 0, EP_PLAN))
    parts = tensor_parallel.parts_of(modules, LINEARS, dealing, w_fp4=False)
    assert [cut.experts for cut in parts.values()] == 2 * [slice(0, 2)]


def test_experts_that_no_plan_names_stay_whole_on_each_rank() -> None:
    modules = {"layers.3.mlp.experts": kind_of("gate above the rest").original}
    for plan in ({}, dict.fromkeys(PLAN, "replicate")):
        assert not tensor_parallel.parts_of(modules, LINEARS, Dealing(Ranks(2, 0, plan), Ranks(1, 0, {})), w_fp4=False)


def test_a_transformers_that_would_not_sum_what_packed_experts_compute_is_named(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tensor_parallel.transformers, "__version__", "5.22.0")
    for sizes in ({"tp_size": 2}, {"ep_size": 2, "tp_size": 2, "tp_plan": {}}):
        model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(**sizes)))
        with pytest.raises(
            ValueError, match=r"^packed experts run on 2 ranks with transformers 5\.23 or newer, this is"
        ):
            tensor_parallel.dealing_of(model, LINEARS)


def test_transformers_is_not_left_with_rules_that_name_nothing_any_more() -> None:
    rule = "layers.*.mlp.experts.gate_up_proj"
    asked = SimpleNamespace(
        config=SimpleNamespace(distributed_config=SimpleNamespace(tp_plan={rule: "packed_colwise"}))
    )
    for model, left in (
        (asked, {"layers.*.mlp.experts", rule}),
        (SimpleNamespace(config=None), {"layers.*.mlp.experts"}),
    ):
        plan = dict(PLAN)
        tensor_parallel.forget_rules(model, plan, LINEARS)
        assert plan.keys() == left


def test_what_takes_a_ranks_part_finds_its_tensors_by_any_prefix_and_no_others() -> None:
    linear = {"out_features": 8, "in_features": 64, "split": [32, 0, 32], "group": "g"}
    linears = {**LINEARS, "model.layers.11.fc": linear}
    modules = {"layers.3.mlp.experts": kind_of("gate above the rest").original}
    plan = {"model.layers.*.fc": "colwise"}
    parts = tensor_parallel.parts_of(modules, linears, Dealing(Ranks(2, 1, plan), Ranks(2, 1, EP_PLAN)), w_fp4=False)
    stored = own_parts.stored_parts(linears, parts, micromix.MicroMixConfig(), "weight")
    converter = own_parts.converter(stored, "model")
    assert converter.force_cpu  # not on the rank's device, where only its part is to be
    names = {"model.layers.11.fc.weight_q4", "layers.11.fc.weight", "layers.3.mlp.experts.down_proj_q8", *stored}
    assert all(converter.rename_source_key(name) == (name, converter.source_patterns[0]) for name in names)
    others = ("layers.11.fc.weight_q4x", "layers.11.fc.bias", "layers.11.xfc.weight", "layers.11.fc.order.channel_perm")
    assert all(converter.rename_source_key(name) == (name, None) for name in others)
    (keep,) = converter.operations
    for name, shape, own in (
        ("model.layers.11.fc.weight_q4", (8, 16), (4, 16)),
        ("model.layers.11.fc.weight_q4", (9, 16), (9, 16)),  # what it should not be, `_check_loaded` names
        ("layers.3.mlp.experts.down_proj", (4, 64, 4), (2, 64, 4)),
        ("elsewhere", (2, 2), (2, 2)),
    ):
        ((key, tensor),) = keep.convert({"any": [torch.zeros(shape)]}, full_layer_name=name).items()
        assert (key, tuple(tensor.shape)) == (name, own)


@st.composite
def shards_of_128(draw: st.DrawFn) -> tuple[Split, ...]:
    count = draw(st.sampled_from((2, 4)))
    return tuple(draw(splits(128 // count)) for _ in range(count))


def random_experts(shape: tuple[int, int, int], split: Split, generator: torch.Generator) -> PackedWeight:
    """(E, N, C) of random values."""
    count, n, channels = shape
    matrices = torch.randn(count, n, channels, generator=generator) / channels**0.5
    quantized = [reference.reorder_quantize(m, torch.arange(channels), split, fp6="e2m3") for m in matrices]
    each = [PackedWeight(q4, packing.pack_fp6(q6, "e2m3"), q8, scale) for q4, q6, q8, scale in quantized]
    return PackedWeight(*(torch.stack(parts) for parts in zip(*each, strict=True)))


def described(shape: tuple[int, int, int], shards: tuple[Split, ...]) -> dict[str, Any]:
    """What a checkpoint's config says of a weight of experts."""
    sizes = dict(zip(("experts", "out_features", "in_features"), shape, strict=True))
    cut = {"shards": [list(split) for split in shards]} if len(shards) > 1 else {}
    return {**sizes, "split": list(total(shards)), "group": "g", **cut}


@settings(max_examples=40)
@given(
    kind=st.sampled_from(KINDS), up=splits(64), down=shards_of_128(), by_experts=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)  # fmt: skip
def test_what_the_ranks_experts_compute_sums_to_what_whole_ones_do(
    kind: str, up: Split, down: tuple[Split, ...], by_experts: bool, seed: int
) -> None:
    """By transformers' own plans: the ranks' outputs are added in another order, and nothing else is other."""
    case, ranks = kind_of(kind), len(down)
    by_experts = by_experts and not case.batched  # for which transformers has no plan of that kind
    generator = torch.Generator().manual_seed(seed)
    shapes = expert_shapes(case.original)
    shards = dict(zip(shapes, ((up,), down), strict=True))
    linears = {f"experts.{name}": described(shape, shards[name]) for name, shape in shapes.items()}
    weights = {name: random_experts(shape, total(shards[name]), generator) for name, shape in shapes.items()}
    x = torch.randn(12, 64, generator=generator)
    index = torch.rand(12, 4, generator=generator).topk(2).indices
    routing = torch.rand(12, 2, generator=generator)
    arguments = (x,) if case.batched else (x, index, routing)
    want = case.packed(weights, shards)["experts"](*arguments)
    outputs, held = [], 0
    for rank in range(ranks):
        alone = Ranks(1, 0, {})
        shared = Ranks(ranks, rank, case.ep_plan if by_experts else case.tp_plan)
        dealing = Dealing(alone, shared) if by_experts else Dealing(shared, alone)
        parts = tensor_parallel.parts_of({"experts": case.original}, linears, dealing, w_fp4=False)
        assert set(parts) == set(linears)
        model = case.packed(weights, shards)
        experts: MicroMixExperts = model["experts"]  # type: ignore[assignment]
        tensor_parallel.keep_own_experts(experts, "experts", parts)
        tensor_parallel.keep_own_orders(model, parts)
        experts.compact()
        held += sum(t.numel() for name in shapes for t in experts.packed(name))
        of_rank = _of_rank(arguments, rank, 4 // ranks) if by_experts else arguments
        outputs.append(experts(*of_rank))
    assert held == sum(t.numel() for weight in weights.values() for t in weight)
    assert (torch.stack(outputs).sum(0) - want).abs().max() <= ULPS * want.abs().max()


def _of_rank(arguments: tuple[Any, ...], rank: int, each: int) -> tuple[Any, ...]:
    """As transformers hands tokens to a rank: experts elsewhere are number `each`, and weigh nothing."""
    x, index, routing = arguments
    elsewhere = index // each != rank
    return x, torch.where(elsewhere, each, index % each), routing.masked_fill(elsewhere, 0.0)

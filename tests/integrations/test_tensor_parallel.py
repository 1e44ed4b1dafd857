"""Packed checkpoints on two processes that talk over gloo: tensor parallelism of transformers, and FSDP2."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.llama import llama
from support.rank_jobs import IDS, run_ranks

import micromix_compile as micromix
from micromix_compile.integrations import tensor_parallel
from micromix_compile.integrations.tensor_parallel import Dealing, Ranks

if TYPE_CHECKING:
    from pathlib import Path

CHECKPOINTS = {
    "same": {"shards": 2, "activations": "same", "rotate": "none"},
    "rotated": {"shards": 4, "activations": "same", "rotate": "all", "weights": "mxfp4"},
    "fp8": {"shards": 2, "activations": "fp8", "rotate": "none"},
    "three": {"shards": 3, "activations": "same", "rotate": "none"},
}
"""Configs of checkpoints by their names."""

ULPS = 2e-6
"""Of float32 sums of a few hundred terms, in another order, as a part of the largest."""


def packed(path: Path, **options: Any) -> str:
    """A checkpoint whose linears have biases, and channels of very different sizes."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 384, "intermediate_size": 768, "num_hidden_layers": 1}
    model = llama(**sizes, vocab_size=64, attention_bias=True, mlp_bias=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
            if name.endswith("layernorm.weight"):
                parameter *= torch.exp(2 * torch.randn_like(parameter))
    config = micromix.MicroMixConfig(weight_rounding="nearest", **options)
    micromix.quantize_(model, micromix.calibrate(model, [IDS], config, progress=False)).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: packed(root / name, **options) for name, options in CHECKPOINTS.items()}


@pytest.fixture(scope="module")
def answers(checkpoints: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each job came to on each of two ranks."""
    jobs = {
        "same": {"job": "numbers", "checkpoint": checkpoints["same"]},
        "rotated": {"job": "numbers", "checkpoint": checkpoints["rotated"]},
        "fp8": {"job": "numbers", "checkpoint": checkpoints["fp8"]},
        "plan": {"job": "numbers", "checkpoint": checkpoints["same"], "tp_plan": PLAN},
        "parts": {"job": "parts", "checkpoint": checkpoints["same"]},
        "three": {"job": "numbers", "checkpoint": checkpoints["three"]},
        "saved": {"job": "saved", "checkpoint": checkpoints["same"], "folder": str(tmp_path_factory.mktemp("part"))},
        "fsdp": {"job": "sharded", "checkpoint": checkpoints["same"], "as_parameters": True},
        "fsdp of buffers": {"job": "sharded", "checkpoint": checkpoints["same"], "as_parameters": False},
        "stages": {"job": "numbers", "checkpoint": checkpoints["same"], "tp_plan": None, "pp_size": 2},
    }
    return dict(zip(jobs, run_ranks(2, *jobs.values()), strict=True))


PLAN = {
    "model.layers.*.mlp.gate_proj": "colwise_gather_output",
    "model.layers.*.mlp.up_proj": "replicate",
    "model.layers.*.mlp.down_proj": "rowwise_split_input",
}
"""Of a model whose MLP hands whole activations from linear to linear."""


@pytest.mark.parametrize("name", ["same", "rotated", "plan"])
def test_two_ranks_compute_what_one_does(answers: dict[str, list[Any]], name: str) -> None:
    for found in answers[name]:
        assert found["logits"] < ULPS, found
        assert found["gradient"] < 100 * ULPS  # differences of terms that the norms' gains make large
        assert found["tokens"]


def test_with_one_scale_a_row_each_rank_scales_its_part(answers: dict[str, list[Any]]) -> None:
    """So activations of the linears that ranks cut along their inputs are rounded in other places: by E4M3's 2**-4."""
    for found in answers["fp8"]:
        assert ULPS < found["logits"] < 2**-4


def test_a_rank_keeps_its_part_of_each_weight_and_nothing_else(answers: dict[str, list[Any]]) -> None:
    shapes = {"q": [192, 384], "k": [96, 384], "v": [96, 384], "o": [384, 192]}
    shapes |= {"gate": [384, 384], "up": [384, 384], "down": [384, 384]}
    for found in answers["parts"]:
        assert len(found) == len(shapes)
        for name, part in found.items():
            assert part["equal"], name
            assert part["shape"] == shapes[name.rpartition(".")[2].removesuffix("_proj")]
            assert part["bytes"] <= part["needed"] + 4 * 256, name  # each tensor begins on a boundary


@pytest.mark.parametrize(("name", "share"), [("fsdp", 0.5), ("fsdp of buffers", 1.0)])
def test_fsdp_shards_packed_weights_where_they_are_parameters(
    answers: dict[str, list[Any]], name: str, share: float
) -> None:
    for found in answers[name]:
        assert found["share"] == share, found
        assert found["logits"] == 0
        assert found["gradient"] == 0
        assert found["state"]
        assert "LlamaForCausalLM is sharded over processes, of which each holds a part" in found["saving"]


@pytest.mark.deep  # half a minute of two processes
def test_a_packed_model_that_is_dealt_to_ranks_compiles(checkpoints: dict[str, str]) -> None:
    for found in run_ranks(2, {"job": "compiled", "checkpoint": checkpoints["same"]})[0]:
        assert found["logits"] < ULPS
        assert found["calls"]["micromix::mixed_mx_mm"] == 7


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("three", "down_proj is ordered for shards=3, which 2 ranks do not divide: calibrate with shards=2 or a"),
        ("saved", "LlamaForCausalLM is dealt to 2 ranks, of which each holds a part: load it on one"),
        ("stages", "pp_size must be 1 for a packed model, got 2: use tp_size"),
    ],
)
def test_what_ranks_cannot_do_is_said(answers: dict[str, list[Any]], name: str, reason: str) -> None:
    assert all(reason in found for found in answers[name]), answers[name]


def test_a_plan_that_packed_linears_have_no_part_for_is_refused() -> None:
    linear = {"in_features": 64, "out_features": 2, "split": [64, 0, 0], "group": "g"}
    plans = {
        "packed_colwise": "its style in tp_plan must be one of colwise, .*, replicate for a packed linear, got 'pack",
        "colwise": "layers.3.fc has 2 outputs, which 4 ranks can't share",
        "rowwise": "layers.3.fc is ordered for shards=1, which 4 ranks do not divide",
    }
    for style, message in plans.items():
        dealing = Dealing(Ranks(4, 0, {"layers.*.fc": style}), Ranks(1, 0, {}))
        with pytest.raises(ValueError, match=message):
            tensor_parallel.parts_of({}, {"layers.3.fc": linear}, dealing, w_fp4=False)


def test_a_transformers_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_parallel.transformers, "__version__", "5.9.1")
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    with pytest.raises(ValueError, match=r"on 2 ranks with transformers 5\.19 or newer, this is 5\.9\.1"):
        tensor_parallel.dealing_of(model, {})


def test_expert_parallelism_alone_deals_out_no_linears() -> None:
    model = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(ep_size=2, tp_plan={})))
    assert tensor_parallel.dealing_of(model, {}) is None

"""vLLM's engine runs packed checkpoints: the numbers are those of transformers, and bad checkpoints are refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.llama import llama, token_batches
from support.vllm_jobs import Job, Result, differences, prompts_of_any_length, run_jobs
from transformers import AutoModelForCausalLM, GptOssConfig, Phi3Config, Qwen2Config, Qwen3MoeConfig

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from micromix_compile.recipe.types import Recipe

pytestmark = pytest.mark.usefixtures("vllm")

SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
WIDE = {"initializer_range": 0.1, **SIZES}
"""Weights of a size at which what tokens follow depends on the prompt."""

SUMS, ROUNDED = 1e-4, 0.5
"""Differences of log-probabilities that come from sums in another order: as they are, and where one carries an
activation over a rounding boundary, so that it moves by a whole step of its format."""


def random_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        return llama(**WIDE)
    sizes = {"num_hidden_layers": 2, "vocab_size": 256, "max_position_embeddings": 128, "pad_token_id": 0, **WIDE}
    kinds = {
        "qwen2": Qwen2Config,
        "phi3": Phi3Config,
        "qwen3_moe": partial(Qwen3MoeConfig, num_experts=4, moe_intermediate_size=128, head_dim=32),
        "gpt_oss": partial(GptOssConfig, num_local_experts=4, head_dim=32, layer_types=2 * ["full_attention"]),
    }
    return AutoModelForCausalLM.from_config(kinds[kind](**sizes, num_experts_per_tok=2)).eval()


def recipe_for(model: nn.Module, **options: Any) -> Recipe:
    config = MicroMixConfig(weight_rounding="nearest", scale_search=False, **options)
    return micromix.calibrate(model, token_batches(), config, progress=False)


def with_groups_apart(recipe: Recipe) -> Recipe:
    """k of each layer has a group of its own, in the opposite order and all in MXFP8."""
    linears = {}
    for fqn, linear in recipe.linears.items():
        if fqn.endswith("k_proj"):
            order = linear.group.channel_perm.flip(0)
            group = dataclasses.replace(linear.group, name=fqn, channel_perm=order, split=(0, 0, order.numel()))
            linear = dataclasses.replace(linear, group=group)
        linears[fqn] = linear
    return dataclasses.replace(recipe, linears=linears)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Packed checkpoints of small models."""
    root = tmp_path_factory.mktemp("packed")
    kinds = {
        "llama": ("llama", {}),
        "same": ("llama", {"activations": "same", "policy": "mxfp8-anchor", "lam": 1.5, "keep_expanded": True}),
        "apart": ("llama", {}),
        "mxfp4": ("llama", {"weights": "mxfp4", "shards": 2}),
        "shards": ("llama", {"shards": 2}),
        "qwen2": ("qwen2", {}),
        "phi3": ("phi3", {}),
        "experts": ("qwen3_moe", {"shards": 2}),
        "gpt_oss": ("gpt_oss", {}),
    }
    for name, (kind, options) in kinds.items():
        model = random_model(kind)
        recipe = recipe_for(model, **options)
        micromix.quantize_(model, with_groups_apart(recipe) if name == "apart" else recipe)
        model.save_pretrained(root / name)
    return {name: root / name for name in kinds}


def assert_like_transformers(job: Job, result: Result | str) -> None:
    """Every token is transformers' best, or as good as the best within what rounding explains."""
    assert isinstance(result, Result), result
    model = AutoModelForCausalLM.from_pretrained(job.checkpoint, dtype=torch.float32)
    off, behind = differences(model, job, result)
    assert off.median() < SUMS
    assert off.max() < ROUNDED
    assert bool((behind <= 2 * off.max()).all())
    assert (behind == 0).float().mean() > 0.95


def test_tokens_are_those_of_transformers(checkpoints: dict[str, Path]) -> None:
    """20 prompts of unequal lengths, of which four run at once: others join whenever one ends."""
    torch.manual_seed(1)
    prompts = prompts_of_any_length(20, 256)
    paths = [path for name, path in checkpoints.items() if name != "gpt_oss"]
    jobs = [Job(path, prompts, options={"max_num_seqs": 4}) for path in paths]
    results, _ = run_jobs(*jobs)
    for job, result in zip(jobs, results, strict=True):
        assert_like_transformers(job, result)


def test_vllm_compiles_the_operations_into_its_graph(checkpoints: dict[str, Path]) -> None:
    torch.manual_seed(2)
    prompts = prompts_of_any_length(6, 256)
    eager = Job(checkpoints["llama"], prompts)
    compiled = eager._replace(options={"enforce_eager": False})
    (first, second), log = run_jobs(eager, compiled)
    assert_like_transformers(compiled, second)
    assert isinstance(first, Result)
    assert isinstance(second, Result)
    assert first.tokens == second.tokens
    assert "DYNAMO_TRACE_ONCE" in log


def test_targets_that_fold_multiply_folded_operands(checkpoints: dict[str, Path]) -> None:
    """As a Hopper GPU does for bfloat16 models, here by plain PyTorch."""
    torch.manual_seed(4)
    prompts = prompts_of_any_length(6, 256)
    exact = [Job(checkpoints[name], prompts, 1, {"dtype": "bfloat16"}) for name in ("same", "experts")]
    results, _ = run_jobs(*exact, *(job._replace(folds=True) for job in exact))
    for first, second in zip(results[:2], results[2:], strict=True):
        assert isinstance(first, Result)
        assert isinstance(second, Result)
        assert first.folded == 0
        assert second.folded > 0
        pairs = zip(first.logprobs, second.logprobs, strict=True)
        off = [abs(a[0][token] - value) for a, b in pairs for token, value in b[0].items() if token in a[0]]
        assert torch.tensor(off).median() < 0.05


def test_two_ranks_share_what_was_ordered_for_two_and_refuse_the_rest(checkpoints: dict[str, Path]) -> None:
    torch.manual_seed(3)
    prompts, two = prompts_of_any_length(6, 256), {"tensor_parallel_size": 2}
    jobs = [Job(checkpoints[name], prompts, 8, two) for name in ("shards", "mxfp4", "experts", "llama")]
    (*cut, whole), log = run_jobs(*jobs)
    for job, result in zip(jobs[:-1], cut, strict=True):
        assert_like_transformers(job, result)
    assert isinstance(whole, str)
    assert "o_proj is ordered for shards=1, which 2 ranks do not divide: calibrate with shards=2" in log


def test_two_ranks_that_hold_half_of_the_experts_each_need_no_shards_of_them(checkpoints: dict[str, Path]) -> None:
    torch.manual_seed(5)
    options = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    job = Job(checkpoints["experts"], prompts_of_any_length(6, 256), 8, options)
    (result,), _ = run_jobs(job)
    assert_like_transformers(job, result)


def test_experts_that_work_otherwise_are_refused_by_layer(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """And a checkpoint that lacks a tensor of them, or has another shape."""
    missing, misshapen = (Path(shutil.copytree(checkpoints["experts"], tmp_path / name)) for name in ("a", "b"))
    up = "model.layers.1.mlp.experts.gate_up_proj"
    edit_tensors(missing, lambda tensors: tensors.pop(f"{up}_order.channel_perm"))
    edit_tensors(misshapen, lambda tensors: tensors.update({up: tensors[up][:, 1:].contiguous()}))
    (biased, first, second), _ = run_jobs(*(Job(path, [[1]]) for path in (checkpoints["gpt_oss"], missing, misshapen)))
    assert (
        "model.layers.0.mlp.experts has packed experts, and vLLM loads its experts by a GptOssRoutedExperts: "
        in str(biased)
    )
    assert f"the checkpoint has no {up}_order.channel_perm: it is not whole" in str(first)
    assert f"{up} must be uint8 (4, 256, 4) by config.json, got torch.uint8 (4, 255, 4)" in str(second)


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    edit(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    micromix.seal(directory)


def test_damaged_checkpoints_and_others_schemas_are_refused(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    newer, damaged, partly = (
        Path(shutil.copytree(checkpoints["llama"], tmp_path / name)) for name in ("newer", "damaged", "partly")
    )
    edit_config(newer, lambda quantization: quantization.update(schema_version=3))
    data = bytearray((damaged / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(data)
    edit_config(partly, lambda quantization: quantization["linears"].pop("model.layers.0.self_attn.v_proj"))
    micromix.seal(partly)
    (first, second, third), _ = run_jobs(*(Job(path, [[1]]) for path in (newer, damaged, partly)))
    assert "schema_version must be 1 or 2, got 3" in str(first)
    assert "was changed after the checkpoint was written" in str(second)
    assert "v_proj is not packed and model.layers.0.self_attn.q_proj is: all or none must be" in str(third)


def edit_config(directory: Path, edit: Any) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    edit(config["quantization_config"])
    path.write_text(json.dumps(config), "utf-8")

"""Experts: calibrated, compiled both ways, packed, saved, loaded; what does not fit is refused by name."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.architectures import ARCHITECTURES
from support.experts import MODELS, GroupedExperts, ListedExperts, model_of_experts
from support.targets import FOLDING, served_by
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.cli.show import summary
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.experts import MicroMixBatchedExperts, MicroMixExperts, sorted_by_expert
from micromix_compile.lowering.torch_private.operators import GROUPED_MM
from micromix_compile.passes.manager import counted

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

versions = pytest.mark.versions
"""Not of transformers' models in float32: torch 2.11 traces grouped products in bfloat16 only."""

QUICK = MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False)
CASES = [(name, {}) for name in ("mixtral", "gpt_oss")]
DEEP = [(name, {"policy": "budget"}) for name in MODELS]


@pytest.mark.parametrize(("name", "options"), [*CASES, *(pytest.param(*case, marks=pytest.mark.deep) for case in DEEP)])
def test_a_model_of_experts_runs_the_same_compiled_packed_saved_and_loaded(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    model, tokens = model_of_experts(name), torch.randint(0, 96, (2, 24))
    recipe = micromix.calibrate(
        model, [tokens], MicroMixConfig(**{"policy": "mxfp8-anchor", **options}), progress=False
    )
    held = {fqn: linear for fqn, linear in recipe.linears.items() if linear.experts}
    assert set(held) == {name for name, p in model.named_parameters() if "experts" in name and p.dim() == 3}
    assert all(sum(linear.expert_tokens or ()) == 2 * 48 and linear.runs == 2 for linear in held.values())
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    assert not packed.micromix_refused
    with torch.no_grad():
        want = packed(tokens).logits
        tolerance = 1e-3 * float(want.max() - want.min())
        for compiled in (
            torch.compile(model, backend="micromix", options={"recipe": recipe}),
            torch.compile(packed, backend="micromix"),
        ):
            assert (compiled(tokens).logits - want).abs().max() < tolerance
        packed.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, want)
        loaded.save_pretrained(tmp_path / "again")
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "again")
        assert torch.equal(again(tokens).logits, want)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # transformers' own
@pytest.mark.parametrize("name", ["qwen3_moe", *(pytest.param(name, marks=pytest.mark.deep) for name in MODELS)])
def test_what_experts_made_of_a_token_is_summed_by_one_operation(name: str, fresh_compiler: None) -> None:
    """With and without packing, where the device has the pass. The last of a model's layers has experts."""
    model, tokens = model_of_experts(name, torch.bfloat16), torch.randint(0, 96, (2, 24))
    recipe = micromix.calibrate(model, [tokens], QUICK, progress=False)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    with served_by(FOLDING), torch.no_grad():
        for compiled in (
            torch.compile(model, backend="micromix", options={"recipe": recipe}),
            torch.compile(packed, backend="micromix"),
        ):
            with counted() as counts:
                compiled(tokens)
            assert counts["sum_experts"] == 1


def test_a_checkpoint_of_other_experts_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_of_experts("mixtral")
    recipe = micromix.calibrate(model, [torch.randint(0, 96, (2, 24))], QUICK, progress=False)
    micromix.quantize_(model, recipe).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    linears = config["quantization_config"]["linears"]
    fqn = "model.layers.0.mlp.experts.down_proj"
    for change, message in (
        ({"experts": 5}, r"down_proj must be \(E, N, C\) = \(4, 64, 96\), got \(5, 64, 96\)"),
        ({"split": [0, 0, 64]}, "down_proj: split must sum to 96"),
    ):
        changed = {**linears, fqn: {**linears[fqn], **change}}
        edited = {**config, "quantization_config": {**config["quantization_config"], "linears": changed}}
        path.write_text(json.dumps(edited))
        micromix.seal(tmp_path)
        with pytest.raises(ValueError, match=message):
            AutoModelForCausalLM.from_pretrained(tmp_path)
    del edited["quantization_config"]
    path.write_text(json.dumps(edited))
    with pytest.raises(RuntimeError, match="size"):  # as one who does not know our format would load it
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_of_which_one_weight_has_no_recipe_stay_as_they_are() -> None:
    model = model_of_experts("mixtral")
    config = MicroMixConfig(
        policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False, skip=("*lm_head", "*gate", "*down_proj")
    )
    recipe = micromix.calibrate(model, [torch.randint(0, 96, (2, 24))], config, progress=False)
    micromix.quantize_(model, recipe)
    why = "down_proj, the other weight of the same experts, stays as it is"
    assert model.micromix_refused == {"model.layers.0.mlp.experts.gate_up_proj": why}
    assert not any(isinstance(module, MicroMixExperts) for module in model.modules())


@versions
def test_experts_of_plain_torch_run_quantized_when_compiled_exact_and_folded() -> None:
    torch.manual_seed(0)
    model, x = GroupedExperts().eval(), torch.randn(40, 64).bfloat16()
    recipe = micromix.calibrate(model, [x], QUICK, progress=False)
    shapes = {fqn: linear.shape for fqn, linear in recipe.linears.items()}
    assert shapes == {"w_in": (3, 96, 64), "w_out": (3, 64, 96)}
    with torch.no_grad():
        want = model(x)
        exact = torch.compile(model, backend="micromix", options={"recipe": recipe})(x)
        torch._dynamo.reset()
        with served_by(FOLDING):
            folded = torch.compile(model, backend="micromix", options={"recipe": recipe})(x)
    scale = want.float().norm()
    assert 0 < (exact - want).float().norm() / scale < 0.1
    assert (folded - exact).float().norm() / scale < 0.02
    micromix.quantize_(model, recipe)
    reason = "it is a Parameter that GroupedExperts reads directly"
    assert all(why.startswith(reason) for why in model.micromix_refused.values())  # type: ignore[union-attr]


def test_experts_that_no_token_reaches_are_named_and_run(caplog: pytest.LogCaptureFixture) -> None:
    model, tokens = model_of_experts("mixtral"), torch.randint(0, 96, (1, 40))
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight[2] = -100 * model.model.layers[0].mlp.gate.weight[0]
    recipe = micromix.calibrate(model, [tokens], MicroMixConfig(policy="mxfp6"), progress=False)
    linear = recipe.linears["model.layers.0.mlp.experts.down_proj"]
    assert linear.starved
    assert recipe.starved["model.layers.0.mlp.experts.down_proj"] == linear.starved
    named = ", ".join(map(str, linear.starved))
    said = f"experts of {linear.fqn} saw fewer than 32 calibration tokens and are rounded to nearest: {named}"
    assert said in caplog.text
    assert f"{2 * len(linear.starved)} matrices of experts rounded to nearest" in summary(recipe)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    with torch.no_grad():
        want, got = model(tokens).logits, packed(tokens).logits
    assert (got - want).norm() < 0.1 * want.norm()


def test_padding_reaches_no_expert() -> None:
    model, tokens = model_of_experts("mixtral"), torch.randint(0, 96, (2, 24))
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, 15:] = 0
    recipe = micromix.calibrate(model, [{"input_ids": tokens, "attention_mask": mask}], QUICK, progress=False)
    up, down = (linear for linear in recipe.linears.values() if linear.experts)
    assert up.group.statistics.tokens == 39
    assert down.group.statistics.tokens == 2 * 39
    assert up.expert_tokens == down.expert_tokens
    assert sum(up.expert_tokens or ()) == 2 * 39
    assert up.runs == down.runs == 2
    assert recipe.macs < recipe.parameters


def changed(name: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A Mixtral whose experts' weight `name` is another one."""
    model = model_of_experts("mixtral")
    experts = model.model.layers[0].mlp.experts
    setattr(experts, name, nn.Parameter(change(getattr(experts, name).detach())))
    return model


@pytest.mark.parametrize(
    ("change", "shape"),
    [(lambda w: torch.cat([w, w[:1]]), "(5, 64, 96)"), (lambda w: w[:, :, :64], "(4, 64, 64)")],
    ids=["an expert more", "other channels"],
)
def test_a_recipe_of_other_experts_is_refused(change: Callable[[Tensor], Tensor], shape: str) -> None:
    tokens = torch.randint(0, 96, (2, 24))
    recipe = micromix.calibrate(model_of_experts("mixtral"), [tokens], QUICK, progress=False)
    said = re.escape(f"model.layers.0.mlp.experts.down_proj is (4, 64, 96) there and {shape} here")
    with pytest.raises(ValueError, match=said):
        micromix.quantize_(changed("down_proj", change), recipe)


class Sent(nn.Module):
    """Experts, and a router that is the caller: indices of 3 and more are of no expert."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 64, 32).bfloat16() / 8)

    def forward(self, x: Tensor, to: Tensor) -> Tensor:
        order, rows, offs = sorted_by_expert(to, len(self.w))
        return GROUPED_MM(x[rows], self.w, offs=offs)[order.argsort()]


def test_a_router_that_sends_nothing_to_any_expert_leaves_zeros_and_says_who_starved(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, x = Sent().eval(), torch.randn(6, 64).bfloat16()
    none, some = torch.full((6, 2), 3), torch.randint(0, 3, (6, 2))
    for sent in ([none], [none, some]):
        batches = [{"x": x, "to": to} for to in sent]
        recipe = micromix.calibrate(model, batches, MicroMixConfig(policy="mxfp6"), progress=False)
        assert sum(recipe.linears["w"].expert_tokens or ()) == 12 * (len(sent) - 1)
        assert "3 of 3 experts of w saw fewer than 32 calibration tokens" in caplog.text
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    with torch.no_grad():
        assert not fast(x, none).any()
        assert 0 < (fast(x, some) - model(x, some)).norm() < 0.1 * model(x, some).norm()
        assert fast(x[:0], some[:0]).shape == (0, 32)


def test_experts_that_share_a_forward_are_packed_saved_and_loaded(tmp_path: Path) -> None:
    """Those of Llama 4: every expert multiplies all tokens, most of them zeros."""
    from transformers import AutoModelForCausalLM

    llama_4 = ARCHITECTURES["Llama 4, text"]
    model, tokens = llama_4.model(llama_4.tiny_config()), llama_4.inputs()["input_ids"]
    plain = model(tokens).logits
    recipe = micromix.calibrate(model, [tokens], QUICK, progress=False)
    held = {fqn: linear for fqn, linear in recipe.linears.items() if linear.experts}
    assert [sum(linear.expert_tokens or ()) for linear in held.values()] == [tokens.numel()] * 2
    packed = micromix.quantize_(model, recipe)
    assert type(model.model.layers[1].feed_forward.experts) is MicroMixBatchedExperts
    assert not packed.micromix_refused
    with torch.no_grad():
        want = packed(tokens).logits
        assert 0 < (want - plain).norm() < 0.1 * plain.norm()
        packed.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert torch.equal(loaded(tokens).logits, want)


@pytest.mark.deep
def test_experts_in_a_list_are_linears_and_one_without_tokens_is_named() -> None:
    torch.manual_seed(0)
    model, x = ListedExperts().eval(), torch.randn(40, 64)
    recipe = micromix.calibrate(model, [x], MicroMixConfig(policy="mxfp8"), progress=False)
    assert set(recipe.linears) == {f"experts.{expert}.{layer}" for expert in (0, 1) for layer in ("up", "down")}
    assert recipe.refused == {f"experts.2.{layer}": "calibration did not reach it" for layer in ("up", "down")}
    assert [recipe.linears[f"experts.{e}.up"].group.statistics.tokens for e in (0, 1)] == [
        int((x[:, 0] <= 0).sum()), int((x[:, 0] > 0).sum()),
    ]  # fmt: skip
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, backend="micromix", options={"recipe": recipe})(x)
        packed = micromix.quantize_(copy.deepcopy(model), recipe)(x)
    torch.testing.assert_close(compiled, packed)
    assert 0 < (packed - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("name", ["mixtral", pytest.param("gpt_oss", marks=pytest.mark.deep)])
def test_experts_of_batched_products_are_those_of_grouped_ones(name: str) -> None:
    model, tokens = model_of_experts(name), torch.randint(0, 96, (2, 24))
    mask = (torch.arange(24) < torch.tensor([[24], [15]])).long()
    batch = {"input_ids": tokens, "attention_mask": mask}
    recipe = micromix.calibrate(model, [batch], MicroMixConfig(policy="budget"), progress=False)
    model.set_experts_implementation("batched_mm")  # as `generate` does to decode on a GPU
    again = micromix.calibrate(model, [batch], MicroMixConfig(policy="budget"), progress=False)
    for fqn, linear in recipe.linears.items():
        other = again.linears[fqn]
        assert (other.split, other.expert_tokens, other.runs) == (linear.split, linear.expert_tokens, linear.runs)
        assert torch.equal(other.group.channel_perm, linear.group.channel_perm)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    with torch.no_grad():
        want = packed(tokens).logits
        got = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})(tokens).logits
    assert (got - want).abs().max() < 1e-3 * (want.max() - want.min())


@versions
@pytest.mark.deep
def test_experts_in_a_loop_are_named_with_what_to_do() -> None:
    model = model_of_experts("mixtral")
    model.set_experts_implementation("eager")
    recipe = micromix.calibrate(model, [torch.randint(0, 96, (2, 8))], QUICK, progress=False)
    reasons = [why for name, why in recipe.refused.items() if "experts" in name]
    assert len(reasons) == 2
    assert all('model.set_experts_implementation("grouped_mm")' in why for why in reasons)


class Routed(nn.Module):
    """Experts of transformers behind a router of its own, and a linear."""

    def __init__(self) -> None:
        super().__init__()
        model = model_of_experts("mixtral")
        self.experts = model.model.layers[0].mlp.experts
        self.config = self.experts.config
        self.head = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = x[:, :4].softmax(-1).topk(2)
        return self.head(self.experts(x, chosen, weights))


@versions
@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # transformers' own
def test_experts_that_are_set_to_a_loop_later_are_named_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    model, x = Routed().eval().bfloat16(), torch.randn(16, 64).bfloat16()
    recipe = micromix.calibrate(model, [x], QUICK, progress=False)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    strict = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})
    with torch.no_grad():
        strict(x)
        model.config._experts_implementation = "eager"
        fast(x)
        said = "experts.gate_up_proj has a recipe and runs unquantized in a part of the model: a matrix of it is taken"
        assert caplog.text.count(said) == 1
        assert 'model.set_experts_implementation("grouped_mm")' in caplog.text
        with pytest.raises(BackendCompilerFailed, match=f"strict=True: {said}"):
            strict(x)

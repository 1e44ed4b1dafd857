"""Quantize while loading, and the way back: the same bytes as from `quantize_`, and no more memory than that takes."""

from __future__ import annotations

import weakref
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.experts import model_of_experts
from support.llama import llama, token_batches
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Llama4TextConfig
from transformers.pytorch_utils import Conv1D

import micromix_compile as micromix
from micromix_compile.integrations import on_load
from micromix_compile.integrations.dequantizing import dequantize_
from micromix_compile.linear.experts import MicroMixExperts

if TYPE_CHECKING:
    from pathlib import Path

NEAREST = {"weight_rounding": "nearest", "scale_search": False}
IDS = torch.arange(24).reshape(2, 12)


def plain(name: str) -> Any:
    """A model of random weights."""
    if name == "llama":
        return llama(num_hidden_layers=1, attention_bias=True)
    if name == "gpt2":
        config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64, n_positions=32)
        return AutoModelForCausalLM.from_config(config).eval()
    if name == "llama4":
        sizes = {"hidden_size": 64, "intermediate_size": 64, "intermediate_size_mlp": 64, "vocab_size": 64}
        heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 32, "attention_chunk_size": 32}
        layers = {"num_hidden_layers": 1, "interleave_moe_layer_step": 1, "num_local_experts": 2}
        model = AutoModelForCausalLM.from_config(Llama4TextConfig(**sizes, **heads, **layers, pad_token_id=0)).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.05)
        return model
    return model_of_experts(name).eval()


def load(path: Path, **options: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, **options)


def assert_equal_tensors(actual: nn.Module, expected: nn.Module) -> None:
    ours, wanted = actual.state_dict(), expected.state_dict()
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(ours[name], tensor), name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("llama", {"weight_rounding": "gptq"}, marks=pytest.mark.deep),
        pytest.param("llama", {**NEAREST, "weights": "mxfp4", "rotate": "all"}, marks=pytest.mark.versions),
        pytest.param("gpt2", NEAREST, marks=pytest.mark.versions),
        pytest.param("qwen3_moe", NEAREST, marks=pytest.mark.deep),
        ("gpt_oss", {"weight_rounding": "gptq"}),
    ],
)
def test_a_model_that_is_quantized_while_loading_is_that_of_quantize(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    """It can be saved, loaded and dequantized, too."""
    model = plain(name)
    model.save_pretrained(tmp_path / "plain")
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**options), progress=False)
    recipe.save(tmp_path / "recipe")
    expected = micromix.quantize_(load(tmp_path / "plain"), recipe)
    for given in (recipe, tmp_path / "recipe"):
        packed = load(tmp_path / "plain", quantization_config=micromix.MicroMixQuantConfig(given))
        assert_equal_tensors(packed, expected)
    with torch.no_grad():
        assert torch.equal(packed(IDS).logits, expected(IDS).logits)
    packed.save_pretrained(tmp_path / "packed")
    assert_equal_tensors(load(tmp_path / "packed"), expected)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("gpt2", marks=pytest.mark.versions),
        "gpt_oss",
        *(pytest.param(name, marks=pytest.mark.deep) for name in ("llama", "qwen3_moe")),
    ],
)
def test_a_dequantized_model_is_a_plain_one_with_the_packed_weights(name: str, tmp_path: Path) -> None:
    model = plain(name)
    classes = {name: type(module) for name, module in model.named_modules()}
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST), progress=False)
    micromix.quantize_(model, recipe).save_pretrained(tmp_path / "packed")
    packed = load(tmp_path / "packed")
    weights = {n: m.weight + 0 for n, m in packed.named_modules() if isinstance(m, micromix.MicroMixLinear)}
    experts = {n: m for n, m in packed.named_modules() if isinstance(m, MicroMixExperts)}
    back = packed.dequantize()
    assert back is packed
    assert {name: type(module) for name, module in back.named_modules()} == classes
    for name, weight in weights.items():
        own = back.get_submodule(name).weight
        assert torch.equal(own.T if isinstance(back.get_submodule(name), Conv1D) else own, weight)
    with torch.no_grad():
        for name, module in experts.items():
            x, index, share = torch.randn(6, 64), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
            ours = back.get_submodule(name)(x, index, share)  # whose activations are not rounded
            assert (ours - module(x, index, share)).norm() < 0.1 * ours.norm()
        logits = back(IDS).logits
    back.save_pretrained(tmp_path / "back")
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "back")(IDS).logits, logits)


def test_nothing_packed_is_left_in_a_dequantized_model(tmp_path: Path) -> None:
    """Though packed tensors were Parameters, as FSDP shards them."""
    model = plain("llama")
    names = set(model.state_dict())
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST), progress=False)
    micromix.quantize_(model, recipe).save_pretrained(tmp_path / "packed")
    packed = load(tmp_path / "packed")
    micromix.packed_as_parameters_(packed)
    assert set(packed.dequantize().state_dict()) == names


def test_one_original_weight_at_a_time_is_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what is loaded: with weights that are a small part each, less than 1.2 times that."""
    model = llama(num_hidden_layers=8, vocab_size=16)
    model.save_pretrained(tmp_path)
    recipe = micromix.calibrate(model, token_batches(1, 16), micromix.MicroMixConfig(**NEAREST), progress=False)
    originals: list[weakref.ref[Tensor]] = []
    most = 0
    convert = on_load._Pack.convert

    def watched(self: on_load._Pack, input_dict: dict[str, list[Tensor]], **kwargs: Any) -> Any:
        nonlocal most
        originals.extend(weakref.ref(tensor) for (tensor,) in input_dict.values())
        result = convert(self, input_dict, **kwargs)
        most = max(most, sum(t.nbytes for one in originals if (t := one()) is not None))
        return result

    monkeypatch.setattr(on_load._Pack, "convert", watched)
    packed = load(tmp_path, quantization_config=micromix.MicroMixQuantConfig(recipe))
    assert len(originals) == 8 * 7
    assert most == 4 * 224 * 128
    assert most < 0.2 * sum(tensor.nbytes for tensor in packed.state_dict().values())


@pytest.mark.versions
def test_what_cannot_be_quantized_while_loading_is_said(tmp_path: Path) -> None:
    model = plain("llama")
    model.save_pretrained(tmp_path / "plain")
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST), progress=False)
    config = micromix.MicroMixQuantConfig(recipe)
    with pytest.raises(TypeError, match="recipe must be a Recipe or the path of one, got int"):
        micromix.MicroMixQuantConfig(4)  # type: ignore[arg-type]
    other = llama(num_hidden_layers=1, attention_bias=True, intermediate_size=96)
    other.save_pretrained(tmp_path / "shape")
    with pytest.raises(ValueError, match=r"its weight must be \(224, 128\), got \(96, 128\)"):
        load(tmp_path / "shape", quantization_config=config)
    plain("llama").save_pretrained(tmp_path / "values")
    with pytest.raises(ValueError, match="has other weights here"):
        load(tmp_path / "values", quantization_config=config)
    plain("gpt2").save_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=r"the recipe was made for LlamaForCausalLM.* is GPT2LMHeadModel.*: it has no mo"
    ):
        load(tmp_path / "model", quantization_config=config)
    dealt = SimpleNamespace(config=SimpleNamespace(distributed_config=SimpleNamespace(tp_size=2)))
    with pytest.raises(ValueError, match="tp_size must be 1 to quantize while loading, got 2: save the packed model"):
        on_load._check_one_process(dealt)


def test_a_tied_head_of_the_recipe_is_quantized_after_loading(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1, tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST, skip=()), progress=False)
    with pytest.raises(ValueError, match=r"lm_head shares its weight with model\.embed_tokens\.weight: load the model"):
        load(tmp_path, quantization_config=micromix.MicroMixQuantConfig(recipe))


def test_a_model_that_is_quantized_while_loading_may_be_spread_over_devices(tmp_path: Path) -> None:
    model = llama(num_hidden_layers=1)
    model.save_pretrained(tmp_path / "plain")
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST))
    places, config = {"model": "cpu", "lm_head": "disk"}, micromix.MicroMixQuantConfig(recipe)
    spread = load(tmp_path / "plain", quantization_config=config, device_map=places, offload_folder=tmp_path / "disk")
    with torch.no_grad():
        assert torch.equal(spread(IDS).logits, micromix.quantize_(model, recipe)(IDS).logits)


def test_experts_of_llama_4_are_quantized_while_loading_and_dequantized(tmp_path: Path) -> None:
    model = plain("llama4")
    model.save_pretrained(tmp_path)
    recipe = micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST), progress=False)
    packed = load(tmp_path, quantization_config=micromix.MicroMixQuantConfig(recipe))
    assert_equal_tensors(packed, micromix.quantize_(model, recipe))
    experts, x = packed.model.layers[0].feed_forward.experts, torch.randn(6, 64)
    with torch.no_grad():
        ours = experts(x)
        assert packed.dequantize() is packed
        back = packed.model.layers[0].feed_forward.experts(x)
    assert (ours - back).norm() < 0.1 * back.norm()


def test_a_model_that_cannot_be_dequantized_stays_packed() -> None:
    model = llama(num_hidden_layers=2)
    packed = micromix.quantize_(model, micromix.calibrate(model, [IDS], micromix.MicroMixConfig(**NEAREST)))
    modules = dict(packed.named_modules())
    packed.config.num_hidden_layers = 1  # so that nothing is made for the second layer
    with pytest.raises(AttributeError):
        dequantize_(packed)
    assert dict(packed.named_modules()) == modules

"""Hugging Face models: calls per decoder layer, logits against the eager fake-quantized model, generate."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.llama import LAYERS, calls_of, llama, token_batches
from support.models import EXACT_DTYPE, fake_quantized
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

import micromix_compile as micromix

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def test_a_decoder_layer_quantizes_four_activations_two_of_them_behind_its_norms() -> None:
    model = llama()
    recipe = micromix.calibrate(model, token_batches())
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        fast(ids)
        calls = calls_of(lambda: fast(ids))
    assert calls == {
        "micromix::reorder_quantize": 2 * LAYERS,
        "micromix::rms_norm_reorder_quantize": 2 * LAYERS,
        "micromix::mixed_mx_mm": 7 * LAYERS,
    }


@pytest.mark.parametrize("policy", ["mxfp8-anchor", "mxfp4"])
def test_float32_logits_stay_within_a_thousandth_of_the_eager_models_range(policy: str) -> None:
    model = llama(tie_word_embeddings=True)
    recipe = micromix.calibrate(model, token_batches(), micromix.MicroMixConfig(policy=policy))
    twin = fake_quantized(model, recipe)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    with torch.inference_mode():
        for shape in ((2, 16), (1, 40)):
            ids = torch.randint(0, 256, shape)
            expected, actual = twin(ids).logits, fast(ids).logits
            spread = expected.max() - expected.min()
            assert (actual - expected).abs().max() <= 1e-3 * spread


def test_generate_with_a_static_cache_gives_the_tokens_of_the_eager_packed_model() -> None:
    model = llama(EXACT_DTYPE)
    recipe = micromix.calibrate(model, token_batches())
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    ids = torch.randint(0, 256, (1, 9))
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "cache_implementation": "static"}
    expected = packed.generate(ids, **options)
    model.forward = torch.compile(model.forward, backend="micromix", options={"recipe": recipe})
    assert torch.equal(model.generate(ids, **options), expected)
    calls = calls_of(lambda: model.generate(ids, **options))
    assert calls["micromix::mixed_mx_mm"] == 12 * 7 * LAYERS


def test_generate_of_a_model_compiled_in_place_runs_quantized() -> None:
    model, ids = llama(), torch.randint(0, 256, (1, 9))
    model.compile(backend="micromix", options={"recipe": micromix.calibrate(model, token_batches())})

    def generate_two() -> None:
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)

    generate_two()  # compiles
    calls = calls_of(generate_two)
    assert calls["micromix::mixed_mx_mm"] == 2 * 7 * LAYERS


def test_logits_are_eager_s_to_the_bit_where_all_but_linears_is_called_as_eager_does() -> None:
    model = llama()
    recipe = micromix.calibrate(model, token_batches())
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe, "fallback_by_default": True})
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, packed(ids).logits)


class Projected(nn.Module):
    """A linear, and a product and a sum that Inductor would make one operation of."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64, dtype=torch.bfloat16)
        self.register_buffer("w", torch.randn(64, 48, dtype=torch.bfloat16))
        self.register_buffer("b", torch.randn(48, dtype=torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.linear(x) @ self.w + self.b)


def test_no_pattern_is_replaced_where_all_but_linears_is_called_as_eager_does() -> None:
    net, x = Projected().eval(), torch.randn(9, 64, dtype=torch.bfloat16)
    recipe = micromix.calibrate(net, [x])
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    fast = torch.compile(net, backend="micromix", options={"recipe": recipe, "fallback_by_default": True})
    with torch.no_grad():
        assert torch.equal(fast(x), packed(x))


def test_padding_of_a_tokenized_batch_does_not_reach_the_statistics() -> None:
    model = llama()
    ids = torch.randint(1, 256, (2, 10))
    mask = torch.ones_like(ids)
    mask[0, 6:] = 0
    recipe = micromix.calibrate(model, [{"input_ids": ids, "attention_mask": mask, "use_cache": False}])
    assert {linear.group.statistics.tokens for linear in recipe.linears.values()} == {16}
    changed = ids.clone()
    changed[0, 6:] = 7  # other padding, same statistics
    again = micromix.calibrate(model, [{"input_ids": changed, "attention_mask": mask, "use_cache": False}])
    first, second = (r.linears["model.layers.1.mlp.down_proj"].group.statistics for r in (recipe, again))
    torch.testing.assert_close(first.abs_mean, second.abs_mean)


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=256, n_positions=64),
        Qwen2Config(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=256,
            max_position_embeddings=64,
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_other_architectures_run_their_linears_quantized(config: Any) -> None:
    model = AutoModelForCausalLM.from_config(config).eval()
    recipe = micromix.calibrate(model, token_batches(2))
    twin = fake_quantized(model, recipe)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    ids = torch.randint(0, 256, (2, 12))
    with torch.no_grad():
        expected, actual = twin(ids).logits, fast(ids).logits
    assert len(recipe.linears) >= 4
    assert (actual - expected).abs().max() <= 1e-3 * (expected.max() - expected.min())

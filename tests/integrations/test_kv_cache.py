"""The static cache of bytes in transformers' models: what it holds, its size, generation, compiled code, refusals."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch._inductor.utils import run_and_get_code
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
    T5Config,
)

import micromix_compile as micromix
from micromix_compile.integrations.kv_cache import SCALE_ROUNDING, QuantizedStaticCache, QuantizedStaticLayer
from micromix_compile.numerics import reference
from micromix_compile.numerics.kv_cache import CACHE_FORMATS, block_of

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]

SIZES = {
    "hidden_size": 128, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
NAMES = ("keys", "key_scale", "values", "value_scale", "recent_keys", "recent_values", "recent_position")
BATCH, PROMPT, LENGTH, HEAD, RECENT = 2, 9, 24, 32, 4


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **changes})).to(dtype).eval()


def prompt() -> Tensor:
    return torch.randint(0, 64, (BATCH, PROMPT), generator=torch.Generator().manual_seed(1))


def quantized(model: Any, cache_format: str = "fp8", recent: int = RECENT) -> QuantizedStaticCache:
    """One that reads most tokens from bytes."""
    return QuantizedStaticCache(model.config, LENGTH, cache_format=cache_format, recent=recent)


def held(cache: Any) -> list[Tensor]:
    """All that a quantized cache holds."""
    return [getattr(layer, name) for layer in cache.layers for name in NAMES]


def decode(model: Any, cache: Any, tokens: Tensor) -> Tensor:
    """Logits of the prompt, then of one token a step."""
    parts = [tokens[:, :PROMPT], *tokens[:, PROMPT:].split(1, dim=1)]
    with torch.no_grad():
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in parts], dim=1)


def steps() -> Tensor:
    return torch.cat([prompt(), torch.randint(0, 64, (BATCH, 6), generator=torch.Generator().manual_seed(2))], dim=1)


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_holds_the_bytes_of_what_the_model_wrote_in_the_size_that_they_have(
    cache_format: str, dtype: torch.dtype
) -> None:
    """The first layer's keys and values do not depend on the cache: the other's are what was to be quantized."""
    model = llama(dtype)
    cache, plain = (
        quantized(model, cache_format),
        StaticCache(model.config, LENGTH),
    )
    assert cache.nbytes == 0
    decode(model, cache, steps())
    decode(model, plain, steps())
    layer, expected = cache.layers[0], plain.layers[0]
    for states, q, scale in (
        (expected.keys, layer.keys, layer.key_scale), (expected.values, layer.values, layer.value_scale)
    ):  # fmt: skip
        size = block_of(cache_format, HEAD)
        codes, byte = reference.quantize(states, "e4m3", scale_rounding=SCALE_ROUNDING, block_size=size)
        assert torch.equal(q, codes)
        assert torch.equal(scale, byte)
    assert int(cache.get_seq_length()) == steps().shape[1]
    one_head = LENGTH * (HEAD + (1 if cache_format == "fp8" else HEAD // 32)) + RECENT * HEAD * dtype.itemsize
    assert cache.nbytes == 2 * SIZES["num_hidden_layers"] * BATCH * SIZES["num_key_value_heads"] * one_head


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_logits_stay_near_those_of_transformers_cache(cache_format: str) -> None:
    """Those of the prompt are the same: a call reads its own tokens as they came."""
    model = llama()
    got = decode(model, quantized(model, cache_format), steps())
    want = decode(model, StaticCache(model.config, LENGTH), steps())
    assert torch.equal(got[:, :PROMPT], want[:, :PROMPT])
    assert 0 < (got - want).norm() < 0.03 * want.norm()


@pytest.mark.parametrize("recent", [0, 1, 3, LENGTH + 1])
def test_recent_tokens_are_read_as_they_came(recent: int) -> None:
    """If all are, nothing differs from transformers' cache, whatever the steps; fewer are worse."""
    model = llama()
    want = decode(model, StaticCache(model.config, LENGTH), steps())
    got = decode(model, quantized(model, recent=recent), steps())
    assert torch.equal(got, want) == (recent > LENGTH)
    assert recent > LENGTH or (got - want).norm() > (decode(model, quantized(model, recent=10), steps()) - want).norm()


def test_a_prompt_in_parts_and_sequences_of_other_lengths() -> None:
    """Padding on the left is masked as ever, and parts leave the same bytes in the first layer as all at once."""
    model, mask = llama(), torch.ones(BATCH, PROMPT, dtype=torch.long)
    mask[0, :4] = 0
    whole, parts = (quantized(model) for _ in range(2))
    with torch.no_grad():
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        want = model(prompt(), attention_mask=mask, position_ids=positions, past_key_values=whole).logits
        alone = model(prompt()[:1, 4:], past_key_values=quantized(model)).logits
        got = [
            model(prompt()[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part],
                  past_key_values=parts).logits
            for part in (slice(0, 5), slice(5, PROMPT))
        ]  # fmt: skip
    assert (want[:1, 4:] - alone).norm() < 1e-5 * alone.norm()
    assert (torch.cat(got, 1)[:, 4:] - want[:, 4:]).norm() < 0.03 * want[:, 4:].norm()
    assert all(torch.equal(a, b) for a, b in zip(held(parts)[:4], held(whole)[:4], strict=True))


@pytest.mark.parametrize(
    ("backend", "early"),
    [
        ("micromix", True),
        pytest.param("micromix", False, marks=pytest.mark.deep),
        pytest.param("inductor", True, marks=pytest.mark.deep),
        pytest.param("inductor", False, marks=pytest.mark.deep),
    ],
)
def test_compiled_steps_are_one_graph_each_and_write_in_place(backend: str, early: bool) -> None:
    """micromix compiles a packed model. early: the cache has its memory before the first call, as CUDA graphs want."""
    model = llama(num_hidden_layers=1)
    if backend == "micromix":
        config = micromix.MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
        micromix.quantize_(model, micromix.calibrate(model, [prompt()], config, progress=False))
    fast = torch.compile(model, backend=backend, fullgraph=True)
    cache, eager = quantized(model), quantized(model)
    if early:
        cache.early_initialization(BATCH, SIZES["num_key_value_heads"], HEAD, torch.float32, torch.device("cpu"))
    memory = [part.data_ptr() for part in held(cache)] if early else []
    got = decode(fast, cache, steps())
    with torch.compiler.set_stance("fail_on_recompile"), torch.no_grad():  # neither a longer context nor a new token
        fast(input_ids=steps()[:, -1:], past_key_values=cache)
    want = decode(model, eager, steps())
    assert (got - want).norm() < 1e-4 * want.norm()
    assert not early or [part.data_ptr() for part in held(cache)] == memory
    assert int(cache.get_seq_length()) == steps().shape[1] + 1


def test_compiled_code_writes_to_the_cache_itself() -> None:
    """Not to a copy that it copies back, which takes the time of the whole cache at each step."""
    layer, states = QuantizedStaticLayer(LENGTH, "fp8", RECENT), torch.randn(BATCH, 2, 1, HEAD)
    layer.lazy_initialization(states, states)
    with torch.no_grad():
        _, code = run_and_get_code(torch.compile(layer.update, fullgraph=True), states, states.clone())
    operands = [call.split(", ")[3:7] for call in re.findall(r"micromix\.write_kv\.default\((.*)\)", code[0])]
    assert len(operands) == 1
    assert all(re.fullmatch(r"arg\d+_1", operand) for operand in operands[0])


def test_generation_by_tokens_and_beams_and_again_after_a_reset() -> None:
    model = llama()
    cache = quantized(model)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "past_key_values": cache}
    first = model.generate(prompt(), **options)
    assert first.shape == (BATCH, PROMPT + 8)
    cache.reset()
    assert int(cache.get_seq_length()) == 0
    assert not any((part + (part == -1)).any() for part in held(cache)), "all is zero or no position"
    assert torch.equal(model.generate(prompt(), **options), first)
    beams = {**options, "past_key_values": quantized(model), "num_beams": 2}
    plain = {**options, "past_key_values": StaticCache(model.config, LENGTH), "num_beams": 2}
    assert torch.equal(model.generate(prompt(), **beams), model.generate(prompt(), **plain))


def test_windows_that_hold_the_whole_cache_are_quantized() -> None:
    torch.manual_seed(0)
    model = MistralForCausalLM(MistralConfig(**SIZES, sliding_window=LENGTH)).eval()
    cache = quantized(model)
    assert all(isinstance(layer, QuantizedStaticLayer) for layer in cache.layers)
    assert cache.is_sliding == [True, True]
    got, want = decode(model, cache, steps()), decode(model, StaticCache(model.config, LENGTH), steps())
    assert 0 < (got - want).norm() < 0.03 * want.norm()


def test_shorter_windows_stay_as_they_are_and_are_named(caplog: pytest.LogCaptureFixture) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Gemma3TextConfig(**{**SIZES, "num_hidden_layers": 3}, layer_types=kinds, sliding_window=8, head_dim=HEAD)
    with caplog.at_level(logging.WARNING, logger="micromix_compile"):
        cache = QuantizedStaticCache(config, LENGTH)
    assert [isinstance(layer, QuantizedStaticLayer) for layer in cache.layers] == [False, True, False]
    assert "2 of 3 layers keep keys and values in the model's dtype" in caplog.text
    assert "shorter than max_cache_len, 24: layers 0, 2" in caplog.text


def test_layers_that_have_no_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"config must be of a decoder, got the encoder-decoder T5Config"):
        QuantizedStaticCache(T5Config(), LENGTH)
    with pytest.raises(ValueError, match=r"no layer of this model keeps 24 tokens .* use transformers' StaticCache"):
        QuantizedStaticCache(MistralConfig(**SIZES, sliding_window=8), LENGTH)


def test_bad_arguments_are_named() -> None:
    config = LlamaConfig(**SIZES)
    with pytest.raises(ValueError, match=r"cache_format must be one of fp8, mxfp8, got 'int4'"):
        QuantizedStaticCache(config, LENGTH, cache_format="int4")
    with pytest.raises(ValueError, match=r"recent must be a number of tokens, 0 or more, got -1"):
        QuantizedStaticCache(config, LENGTH, recent=-1)
    for length in (0, 2.5):
        with pytest.raises(ValueError, match=rf"max_cache_len must be a number of tokens, 1 or more, got {length}"):
            QuantizedStaticCache(config, length)  # type: ignore[arg-type]


def test_heads_that_mxfp8_does_not_divide_are_refused_at_the_first_token() -> None:
    model = llama(head_dim=48)
    with torch.no_grad():
        with pytest.raises(ValueError, match=r"'mxfp8' takes heads of a multiple of 32 channels, got 48"):
            model(prompt(), past_key_values=QuantizedStaticCache(model.config, LENGTH, cache_format="mxfp8"))
        model(prompt(), past_key_values=quantized(model))


def test_more_tokens_than_the_cache_holds_are_an_error() -> None:
    model = llama()
    with torch.no_grad(), pytest.raises(ValueError, match=r"max_cache_len is 8, but 9 tokens came at once"):
        model(prompt(), past_key_values=QuantizedStaticCache(model.config, 8))
    with pytest.raises(ValueError, match=r"position must be from 0 to 8, got 9: the cache holds 9 tokens"):
        decode(model, QuantizedStaticCache(model.config, PROMPT), steps())


def test_training_through_it_is_refused() -> None:
    model = llama()
    with pytest.raises(RuntimeError, match=r"has no gradient: call the model under torch.no_grad\(\)"):
        model(prompt(), past_key_values=quantized(model))


def test_no_tokens_change_nothing_and_cropping_is_refused_with_advice() -> None:
    model = llama()
    cache = quantized(model)
    with torch.no_grad():
        model(prompt(), past_key_values=cache)
        layer = cache.layers[0]
        before = [getattr(layer, name).clone() for name in NAMES]
        nothing = torch.zeros(BATCH, SIZES["num_key_value_heads"], 0, HEAD)
        keys, values = layer.update(nothing, nothing)
    assert keys.shape == values.shape == (BATCH, SIZES["num_key_value_heads"], LENGTH, HEAD)
    assert int(layer.get_seq_length()) == PROMPT
    assert all(torch.equal(getattr(layer, name), old) for name, old in zip(NAMES, before, strict=True))
    with pytest.raises(NotImplementedError, match="can't be cropped, as assisted generation does: use transformers' D"):
        cache.crop(-1)
    for wrong in ({"recent": True}, {"max_cache_len": True}):
        with pytest.raises(ValueError, match=r"must be a number of tokens, . or more, got True"):
            QuantizedStaticCache(model.config, **{"max_cache_len": 8, **wrong})

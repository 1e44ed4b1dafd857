"""Packed modules: memory, state, checkpoints."""

from __future__ import annotations

import copy
import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import save as serialize
from support.models import fake_quantized, make_net
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPTJConfig,
    LlamaConfig,
)

import micromix_compile as micromix
import micromix_compile.integrations.hf
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import pack_weight

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.versions


def storages(model: nn.Module) -> int:
    tensors = [*model.parameters(), *model.buffers()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


@pytest.mark.parametrize(
    "config", [MicroMixConfig(), MicroMixConfig(weights="mxfp4", fp6="e3m2", scale_rounding="even")]
)
def test_packed_modules_equal_the_fake_quantized_twin_and_hold_what_the_recipe_says(config: MicroMixConfig) -> None:
    net = make_net(layers=2, channels=128, hidden=224)
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 128)], config)
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    x = torch.randn(3, 7, 128)
    with torch.no_grad():
        expected, actual = fake_quantized(net, recipe)(x), packed(x)
        assert (actual - expected).abs().max() <= 1e-5 * expected.abs().max()
    padding = storages(packed) - (storages(net) - 4 * recipe.parameters + recipe.stored_bytes)
    assert 0 <= padding < 256 * 4 * len(recipe.linears)  # before the next part of a weight, for alignment


def test_linears_of_a_group_hold_one_order() -> None:
    net = make_net(layers=1)
    block = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 6, 64)])).layers[0]
    assert block.gate.order is block.up.order is not block.down.order
    block.to(torch.device("meta"))
    assert block.gate.order.channel_perm is block.up.order.channel_perm
    assert "mxfp4=" in repr(block.gate)


def test_a_state_dict_round_trip_keeps_the_outputs() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)])
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    state = packed.state_dict()
    serialize(state)  # which refuses tensors that share memory
    other = micromix.quantize_(copy.deepcopy(net), recipe)
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(state)
    x = torch.randn(2, 6, 64)
    assert torch.equal(other(x), packed(x))


def small_llama(dtype: torch.dtype) -> nn.Module:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64, tie_word_embeddings=True, attention_bias=True)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()  # .to(dtype) would round rotary buffers too


def saved(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, Tensor]:
    model = small_llama(dtype)
    ids = torch.randint(0, 64, (2, 8))
    micromix.quantize_(model, micromix.calibrate(model, [ids]))
    model.save_pretrained(folder)
    return model, ids


def test_a_packed_checkpoint_loads_packed_with_the_same_outputs(tmp_path: Path) -> None:
    model, ids = saved(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    attention = loaded.model.layers[0].self_attn
    assert isinstance(attention.q_proj, micromix.MicroMixLinear)
    assert attention.q_proj.order is attention.k_proj.order
    assert attention.q_proj.weight_q4.dtype is torch.uint8
    assert attention.q_proj.bias.dtype is torch.bfloat16
    assert len({buffer.untyped_storage().data_ptr() for buffer in attention.q_proj.buffers(recurse=False)}) == 1
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.bfloat16)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("schema_version",), 7, "schema_version must be 1 or 2, got 7"),
        (("linears",), None, "linears must be a mapping, got None"),
        (("config", "policy"), "best", "policy must be one of .* got 'best'"),
        (("linears", "model.layers.0.mlp.up_proj", "split"), [32], "\\['split'\\] must be three multiples of 32, got"),
    ],
)
def test_an_edited_checkpoint_config_is_named(
    tmp_path: Path, path: tuple[str, ...], value: object, message: str
) -> None:
    saved(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    place = content["quantization_config"]
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "config.json").write_text(json.dumps(content))
    if path != ("schema_version",):  # of another version nothing else is read
        micromix.seal(tmp_path)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def outputs_of_base(model: nn.Module, ids: Tensor) -> Tensor:
    base = getattr(model, "model", model)
    with torch.no_grad():
        hidden: Tensor = base(ids).last_hidden_state
    return hidden


def test_a_packed_checkpoint_loads_without_its_head_and_with_one_more(tmp_path: Path) -> None:
    model, ids = saved(tmp_path)
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert isinstance(base.layers[0].mlp.up_proj, micromix.MicroMixLinear)
    assert torch.equal(outputs_of_base(base, ids), outputs_of_base(model, ids))
    base.save_pretrained(tmp_path / "base")
    model.model.save_pretrained(tmp_path / "inside")
    for folder in ("base", "inside"):
        for kind in (AutoModel, AutoModelForCausalLM):
            again = kind.from_pretrained(tmp_path / folder, dtype=torch.bfloat16)
            assert torch.equal(outputs_of_base(again, ids), outputs_of_base(model, ids))


GPT2 = GPT2Config(n_embd=64, n_head=2, n_layer=1, n_positions=32, vocab_size=64)
TIED = LlamaConfig(
    hidden_size=64, intermediate_size=96, num_attention_heads=2, num_hidden_layers=1, vocab_size=64,
    tie_word_embeddings=True,
)  # fmt: skip


GPTJ = GPTJConfig(n_embd=64, n_head=2, n_layer=1, n_positions=32, vocab_size=64, rotary_dim=16)  # has a buffer


@pytest.mark.parametrize(
    ("config", "skip"),
    [(GPT2, ("*lm_head",)), (GPTJ, ("*lm_head",)), (TIED, ())],
    ids=["gpt2", "gpt-j", "tied head"],
)
def test_models_that_give_linears_initial_values_or_tie_them_load_packed(
    tmp_path: Path, config: Any, skip: tuple[str, ...]
) -> None:
    model, ids = AutoModelForCausalLM.from_config(config).eval(), torch.randint(0, 64, (2, 8))
    micromix.quantize_(model, micromix.calibrate(model, [ids], MicroMixConfig(policy="mxfp8", skip=skip)))
    assert isinstance(model.lm_head, micromix.MicroMixLinear) == (not skip)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    packed = [one for one in loaded.modules() if isinstance(one, micromix.MicroMixLinear)]
    assert not any("weight" in (*vars(one), *one._buffers, *one._parameters) for one in packed)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_a_packed_head_is_left_out_where_there_is_another(tmp_path: Path) -> None:
    model, ids = AutoModelForCausalLM.from_config(TIED).eval(), torch.randint(0, 64, (2, 8))
    micromix.quantize_(model, micromix.calibrate(model, [ids], MicroMixConfig(policy="mxfp8", skip=())))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs_of_base(loaded, ids), outputs_of_base(model, ids))
    assert type(loaded.score) is nn.Linear


def packed_linear() -> nn.Module:
    net = nn.Sequential(nn.Linear(64, 48)).eval()
    return micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 6, 64)]))


def test_another_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"x must have 64 channels, got shape \(2, 96\)"):
        packed_linear()(torch.randn(2, 96))


def test_under_autocast_the_output_has_its_dtype() -> None:
    packed, x = packed_linear(), torch.randn(2, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(packed(x), packed(x.bfloat16()))
        assert packed(x).dtype is torch.bfloat16


def test_a_wrong_channel_count_is_refused() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)])
    with pytest.raises(ValueError, match=r"group layers.0.gate orders 64 channels, but the weight has 96"):
        pack_weight(torch.randn(8, 96), recipe.linears["layers.0.gate"].group, recipe.config)

"""Packed linears whose places change: a plain one put there, embeddings resized, a head that is tied."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.llama import llama
from transformers import AutoModel, AutoModelForCausalLM

import micromix_compile as micromix

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.versions

UP = "model.layers.0.mlp.up_proj"
IDS = torch.arange(16).reshape(2, 8)


def packed_llama(**changes: Any) -> Any:
    """A packed Llama of one layer, with a packed head."""
    model = llama(num_hidden_layers=1, **changes)
    config = micromix.MicroMixConfig(weight_rounding="nearest", activations="same", rotate="none", skip=())
    return micromix.quantize_(model, micromix.calibrate(model, [IDS], config))


def test_a_plain_linear_in_the_place_of_a_packed_one_is_saved_as_it_is(tmp_path: Path) -> None:
    """Those of `resize_token_embeddings`, too; and the model's description of what is packed stays its own."""
    model = packed_llama()
    described = dict(model.config.quantization_config["linears"])
    assert "lm_head" in described
    model.model.layers[0].mlp.up_proj = torch.nn.Linear(128, 224, bias=False)
    model.resize_token_embeddings(260)
    model.save_pretrained(tmp_path)
    assert model.config.quantization_config["linears"] == described
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.quantization_config.linears.keys() == described.keys() - {UP, "lm_head"}
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)
    model.model.save_pretrained(tmp_path / "base")
    assert AutoModel.from_pretrained(tmp_path / "base").config.quantization_config.linears.keys() == {
        name.removeprefix("model.") for name in described.keys() - {UP, "lm_head"}
    }


def test_a_packed_head_stays_packed_when_weights_are_tied(tmp_path: Path) -> None:
    model = packed_llama(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    for one in (model, AutoModelForCausalLM.from_pretrained(tmp_path)):
        with torch.no_grad():
            before = one(IDS).logits
            one.tie_weights()
            assert torch.equal(one(IDS).logits, before)
        assert isinstance(one.lm_head, micromix.MicroMixLinear)
        one.resize_token_embeddings(260)  # makes a plain one
        one.tie_weights()
        assert one.lm_head.weight is one.model.embed_tokens.weight

"""A small model, its recipe and its packed checkpoint, made by the command line once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.command_line import SHORT, run_well
from support.models import default_tokenizer

from micromix_compile.evaluation import zoo

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights and the default model's tokenizer, as a local directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("small")
    tokenizer = default_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def recipe_file(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that the command line made."""
    path = tmp_path_factory.mktemp("recipe") / "small.safetensors"
    out = run_well("calibrate", "--model", small_model, "--windows", 2, *SHORT, "--fp6", "e3m2", "--out", path)
    assert "7 linears" in out
    return path


@pytest.fixture(scope="session")
def packed_model(small_model: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a packed checkpoint."""
    directory = tmp_path_factory.mktemp("packed") / "model"
    run_well("quantize", "--model", small_model, "--recipe", recipe_file, "--out", directory)
    return directory


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is loaded."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(zoo, "load_model", fail)

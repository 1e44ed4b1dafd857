"""What of a model is a linear, what is none, and the bits of all of it."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import MixtralConfig, MixtralForCausalLM

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PLAIN = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)


class Others(nn.Module):
    """A linear among all kinds of Parameters that are none, and one that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.idle = nn.Linear(64, 64), nn.Linear(64, 64)
        self.conv = nn.Conv1d(64, 64, 3, padding=1)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 64))
        self.position_embeddings = nn.Parameter(torch.zeros(1, 9, 64))
        self.positions = nn.Parameter(torch.zeros(9, 64))
        self.A_log = nn.Parameter(torch.zeros(64, 4))
        self.q = nn.Parameter(torch.randn(64, 2, 32))

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc(x) + self.cls_token + self.position_embeddings + self.positions
        x = self.conv(x.mT).mT - (x.unsqueeze(-1) * self.A_log.exp()).sum(-1)
        return torch.einsum("btc,chd->bthd", x, self.q)


class Bag(nn.Module):
    """A linear behind a bag of embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bag, self.fc = nn.EmbeddingBag(96, 64), nn.Linear(64, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.fc(self.bag(tokens))


def test_a_bag_of_embeddings_is_an_embedding_and_no_linear_that_was_left_out() -> None:
    model = Bag().eval()
    tokens = torch.randint(0, 96, (2, 9))
    recipe = micromix.calibrate(model, [tokens], dataclasses.replace(PLAIN, strict=True), progress=False)
    assert recipe.linears.keys() == {"fc"}
    assert recipe.refused == {"bag": "it is an embedding"}


def mixtral() -> MixtralForCausalLM:
    sizes: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    config = MixtralConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        vocab_size=256,
        num_local_experts=2,
        num_experts_per_tok=1,
        **sizes,
    )
    return MixtralForCausalLM(config).eval()


def test_what_is_no_linear_is_not_listed_as_one_that_was_left_out(caplog: pytest.LogCaptureFixture) -> None:
    recipe = micromix.calibrate(Others().eval(), [torch.randn(2, 9, 64)], PLAIN)
    assert list(recipe.linears) == ["fc"]
    assert recipe.refused == {
        "idle": "calibration did not reach it",
        "q": "its weight has 3 dimensions, not 2",
    }
    fast = torch.compile(Others().eval(), backend="micromix", options={"calibration_batches": 1, "policy": "mxfp8"})
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        for _ in range(2):
            fast(torch.randn(2, 9, 64))
    assert "1 were not reached and stay as they are (idle, ...)" in caplog.text


def test_experts_are_linears_and_only_what_is_skipped_is_refused() -> None:
    recipe = micromix.calibrate(mixtral(), [torch.randint(0, 256, (2, 7))], PLAIN)
    experts = "model.layers.0.mlp.experts"
    assert recipe.linears[f"{experts}.gate_up_proj"].shape == (2, 192, 64)
    assert recipe.linears[f"{experts}.down_proj"].shape == (2, 64, 96)
    assert set(recipe.refused) == {"model.layers.0.mlp.gate", "lm_head", "model.embed_tokens"}


def test_a_model_of_convolutions_is_told_that_they_are() -> None:
    with pytest.raises(ValueError, match=r"quantize \(0: it is a convolution of kernel size 1, which is"):
        micromix.calibrate(nn.Sequential(nn.Conv1d(64, 64, 1)).eval(), [torch.randn(2, 64, 9)])


def test_a_weight_that_is_computed_is_named_after_its_parameter() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scaled = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.linear(self.fc(x), self.scaled.weight * 2)

    recipe = micromix.calibrate(Scaled().eval(), [torch.randn(4, 64)], PLAIN)
    assert recipe.refused["scaled (computed)"] == "its weight is computed in the graph, not a Parameter"


def test_bits_of_the_whole_model_count_what_stays_in_its_own_dtype() -> None:
    model = mixtral()
    recipe = micromix.calibrate(model, [torch.randint(0, 256, (2, 7))], PLAIN)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert recipe.left_alone is not None
    assert recipe.parameters + recipe.left_alone[0] == parameters
    assert recipe.model_bits is not None
    assert 32 > recipe.model_bits > 2 * recipe.stored_bits
    micromix.quantize_(model, recipe)
    orders = sum(4 * sum(group.split) for group in recipe.groups.values())
    held = sum(value.nbytes for name, value in model.state_dict().items() if "channel_perm" not in name) + orders
    assert recipe.model_bits == pytest.approx(8 * held / parameters)


def test_a_tied_embedding_stays_and_counts() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.out = nn.Embedding(96, 64), nn.Linear(64, 96, bias=False)
            self.out.weight = self.embed.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.out(self.embed(ids))

    recipe = micromix.calibrate(Tied().eval(), [torch.randint(0, 96, (2, 7))], PLAIN)
    assert recipe.parameters == 96 * 64
    assert recipe.left_alone == (0, 4 * 96 * 64)


def test_the_whole_models_bits_travel_in_the_file_and_older_files_lack_them(tmp_path: Path) -> None:
    recipe = micromix.calibrate(Others().eval(), [torch.randn(2, 9, 64)], PLAIN)
    recipe.save(tmp_path / "new")
    loaded = micromix.Recipe.load(tmp_path / "new")
    assert loaded.model_bits == recipe.model_bits
    assert f"({recipe.model_bits:.2f} over all parameters of the model)" in loaded.bits_text
    older = dataclasses.replace(recipe, left_alone=None)
    older.save(tmp_path / "old")
    with safe_open(tmp_path / "old", framework="pt") as file:
        assert "left_alone" not in file.metadata()
    assert micromix.Recipe.load(tmp_path / "old").model_bits is None
    assert "over all" not in older.bits_text


@pytest.mark.parametrize("bad", [(1, -2), (1,), (1.5, 2), (True, 2), "ab"])
def test_counts_that_are_none_are_refused(tmp_path: Path, bad: Any) -> None:
    recipe = micromix.calibrate(nn.Sequential(nn.Linear(64, 64)).eval(), [torch.randn(2, 64)], PLAIN)
    dataclasses.replace(recipe, left_alone=bad).save(tmp_path / "recipe")
    with pytest.raises(
        ValueError, match=r"recipe: left_alone(\[\d\])? must (have 2 items|be an integer of 0 or more), got "
    ):
        micromix.Recipe.load(tmp_path / "recipe")

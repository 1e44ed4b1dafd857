"""Models that work time-first inside, as XLNet does: padding stays out of their statistics."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, XLNetConfig, XLNetModel

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

pytestmark = pytest.mark.usefixtures("fresh_compiler")

PLAIN = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
BUDGET = MicroMixConfig(weight_rounding="nearest", scale_search=False)
LENGTHS = (4, 7, 6)


def xlnet() -> XLNetModel:
    config = XLNetConfig(vocab_size=99, d_model=32, n_layer=1, n_head=2, d_inner=64, use_mems_eval=False)
    return XLNetModel(config).eval()


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=99, n_positions=32)).eval()


def padded(sequences: list[Tensor], length: int) -> dict[str, Tensor]:
    """Sequences (1, T) as one batch, filled up with token 0."""
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : sequence.shape[1]] = sequence
        mask[row, : sequence.shape[1]] = 1
    return {"input_ids": ids, "attention_mask": mask}


def statistics(model: nn.Module, batches: Any, config: MicroMixConfig = PLAIN) -> dict[str, Any]:
    recipe = micromix.calibrate(model, batches, config)
    return {fqn: linear.group.statistics for fqn, linear in recipe.linears.items()}


@pytest.mark.parametrize("make", [xlnet, gpt2])
def test_padding_leaves_the_statistics_those_of_the_unpadded_run(make: Any) -> None:
    model = make()
    sequences = [torch.randint(1, 99, (1, length)) for length in LENGTHS]
    alone = statistics(model, sequences)
    together = statistics(model, [padded(sequences, 9)])
    assert alone
    for fqn, seen in together.items():
        assert seen.tokens == alone[fqn].tokens == sum(LENGTHS), fqn
        torch.testing.assert_close(seen.abs_mean, alone[fqn].abs_mean, rtol=1e-4, atol=1e-5)


def test_a_compiled_time_first_model_is_its_packed_one() -> None:
    model, batch = xlnet(), padded([torch.randint(1, 99, (1, length)) for length in LENGTHS], 9)
    recipe = micromix.calibrate(model, [batch])
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe, "fallback_by_default": True})
    with torch.no_grad():
        plain, compiled = model(**batch)[0], fast(**batch)[0]
        micromix.quantize_(model, recipe)
        packed = model(**batch)[0]
    assert not torch.equal(packed, plain)
    torch.testing.assert_close(compiled, packed, rtol=1e-4, atol=1e-4)


def test_costs_of_a_time_first_model_do_not_depend_on_its_padding() -> None:
    model, batch = xlnet(), padded([torch.randint(1, 99, (1, length)) for length in LENGTHS], 9)
    changed = {**batch, "input_ids": torch.where(batch["attention_mask"] == 0, 7, batch["input_ids"])}
    first, second = (statistics(model, [b], BUDGET) for b in (batch, changed))
    for fqn, seen in first.items():
        torch.testing.assert_close(seen.costs.activations, second[fqn].costs.activations, rtol=1e-3, atol=0)
        torch.testing.assert_close(seen.costs.weights, second[fqn].costs.weights, rtol=1e-3, atol=0)


@pytest.mark.parametrize("make", [xlnet, gpt2])
def test_as_many_sequences_as_tokens_are_read_as_batches_before_were_or_said(
    make: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model = make()
    square = padded([torch.randint(1, 99, (1, length)) for length in LENGTHS], 3 + 4)
    square = {name: value[:, :3].contiguous() for name, value in square.items()}
    square["attention_mask"][0, 1:] = 0
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        told = statistics(model, [torch.randint(1, 99, (2, 5)), square])
        assert {seen.tokens for seen in told.values()} == {10 + 7}
        said = [record.getMessage() for record in caplog.records if record.name == "micromix_compile"]
        assert not [message for message in said if "stay unquantized" not in message]  # XLNet's attention
        untold = statistics(model, [square])
    assert all(0 < seen.tokens <= 7 for seen in untold.values())
    assert sum("(batch, time) or (time, batch)" in record.getMessage() for record in caplog.records) == 1

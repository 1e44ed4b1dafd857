"""Perplexity, divergence and agreement against plain float64 formulas."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.evaluation.types import RowResult

VOCABULARY = 37


class TableModel:
    """Next-token logits that depend on the present token only: row t of `table`, (V, V)."""

    def __init__(self, table: Tensor) -> None:
        self.table = table

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def random_model(seed: int) -> TableModel:
    """A table of normal logits."""
    return TableModel(torch.randn(VOCABULARY, VOCABULARY, generator=torch.Generator().manual_seed(seed)))


def random_windows(count: int, length: int) -> Tensor:
    """(count, length) tokens."""
    return torch.randint(VOCABULARY, (count, length))


def test_a_model_that_knows_nothing_has_the_perplexity_of_its_vocabulary() -> None:
    """exp(log V) = V."""
    result = evaluate(TableModel(torch.zeros(VOCABULARY, VOCABULARY)), random_windows(2, 9))
    assert result.perplexity == pytest.approx(VOCABULARY, rel=1e-6)
    assert (result.predictions, result.kl, result.top1) == (16, None, None)


def test_tokens_that_a_model_rules_out_take_no_part_in_the_divergence() -> None:
    model, reference, windows = random_model(1), random_model(2), random_windows(1, 9)
    ruled_out = int((set(range(VOCABULARY)) - set(windows.flatten().tolist())).pop())
    for one in (model, reference):
        one.table[:, ruled_out] = -math.inf
    rest = [token for token in range(VOCABULARY) if token != ruled_out]
    log_q, log_p = (one.table[windows[0, :-1]][:, rest].double().log_softmax(-1) for one in (model, reference))
    got = evaluate(model, windows, reference)
    assert got.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-6)
    reference.table[:, ruled_out] = 0.0
    assert evaluate(model, windows, reference).kl == math.inf


@pytest.mark.parametrize("length", [2, 129, 130, 300])
def test_quality_equals_the_formulas_in_float64(length: int) -> None:
    """Lengths on both sides of the slices that bound the memory."""
    model, reference, windows = random_model(1), random_model(2), random_windows(3, length)
    result = evaluate(model, windows, reference)
    here, there = windows[:, :-1].flatten(), windows[:, 1:].flatten()
    log_q, log_p = (m.table.double().log_softmax(-1)[here] for m in (model, reference))
    nll = -log_q[torch.arange(len(there)), there].mean()
    assert result.perplexity == pytest.approx(nll.exp().item(), rel=1e-6)
    assert result.kl == pytest.approx((log_p.exp() * (log_p - log_q)).sum(-1).mean().item(), rel=1e-6)
    assert result.top1 == pytest.approx((log_p.argmax(-1) == log_q.argmax(-1)).double().mean().item())
    assert result.predictions == len(there)


def test_divergence_is_of_the_reference_from_the_model_and_not_the_other_way_round() -> None:
    """The two directions differ, and swapping the arguments swaps them."""
    first, second, windows = random_model(3), random_model(4), random_windows(1, 64)
    forward, backward = evaluate(first, windows, second).kl, evaluate(second, windows, first).kl
    assert forward is not None
    assert backward is not None
    assert abs(forward - backward) > 1e-3


def test_a_model_agrees_with_itself() -> None:
    """Divergence exactly 0, agreement exactly 1."""
    model = random_model(5)
    result = evaluate(model, random_windows(2, 20), model)
    assert (result.kl, result.top1) == (0.0, 1.0)


def test_a_nan_in_the_logits_reaches_the_perplexity_and_is_null_in_json() -> None:
    """Nothing is cleaned up silently."""
    table = random_model(6).table
    table[3] = math.nan
    result = evaluate(TableModel(table), torch.full((1, 8), 3), random_model(6))
    assert math.isnan(result.perplexity)
    row = RowResult(row="broken", evaluation=result).to_dict()
    assert row["perplexity"] is None
    json.dumps(row, allow_nan=False)


def test_a_hopeless_model_has_infinite_perplexity() -> None:
    """exp would overflow."""
    table = torch.zeros(VOCABULARY, VOCABULARY)
    table[:, 0] = 1e6
    assert evaluate(TableModel(table), torch.full((1, 4), 5)).perplexity == math.inf


@pytest.mark.parametrize("shape", [(0, 8), (2, 1), (8,)])
def test_windows_without_a_prediction_are_refused(shape: tuple[int, ...]) -> None:
    """The error states the shape."""
    with pytest.raises(ValueError, match="windows must be"):
        evaluate(random_model(7), torch.zeros(shape, dtype=torch.int64))

"""Evaluation: perplexity, divergence and agreement against plain float64 formulas, and against published figures."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import make_net
from torch import Tensor

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import evaluation, texts, zoo
from micromix_compile.evaluation.evaluation import Evaluation, RowResult, evaluate

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


class WindowNet(torch.nn.Module):
    """`Net` over embedded tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCABULARY, 64)
        self.net = make_net(layers=1)

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> SimpleNamespace:
        return SimpleNamespace(logits=self.net(self.embedding(input_ids)))


def test_the_noise_of_a_linear_is_measured_on_exact_inputs() -> None:
    """The first linear's figure follows from its weights and inputs; MXFP8's is about 12 dB above MXFP4's."""
    model, windows = WindowNet().eval(), random_windows(2, 30)
    found = {}
    for policy in ("mxfp4", "mxfp8"):
        recipe = micromix.calibrate(model, windows.split(1), MicroMixConfig(policy=policy))
        packed = micromix.quantize_(copy.deepcopy(model), recipe)
        found[policy] = evaluation.linear_sqnr(model, packed, windows)
        block, twin = model.net.layers[0], packed.net.layers[0]
        with torch.no_grad():
            x = block.norm(model.embedding(windows))
            exact, noise = block.gate(x), twin.gate(x) - block.gate(x)
        expected = 10 * math.log10(float(exact.square().sum() / noise.square().sum()))
        assert found[policy]["net.layers.0.gate"] == pytest.approx(expected, abs=1e-3)
    assert set(found["mxfp4"]) == {f"net.layers.0.{name}" for name in ("gate", "up", "down")}
    assert all(8 < found["mxfp8"][name] - found["mxfp4"][name] < 20 for name in found["mxfp4"])


@pytest.mark.parametrize(
    ("row", "policy", "fp6"),
    [("mxfp8", "mxfp8", "e3m2"), ("mxfp6-e2m3", "mxfp6", "e2m3"), ("mxfp6-e3m2", "mxfp6", "e3m2")],
)
def test_uniform_rows_keep_the_options_they_do_not_set(row: str, policy: str, fp6: str) -> None:
    """Weights follow their channel's format in every uniform row."""
    base = MicroMixConfig(fp6="e3m2", weights="mxfp4", scale_rounding="floor")
    config = evaluation.row_config(row, base)
    assert (config.policy, config.fp6, config.weights, config.scale_rounding) == (policy, fp6, "same", "floor")


def test_the_micromix_row_is_the_given_config() -> None:
    """And other names are errors that list the valid ones."""
    base = MicroMixConfig(granularity=128)
    assert evaluation.row_config("micromix", base) is base
    with pytest.raises(ValueError, match="row must be one of mxfp8, mxfp6-e2m3, mxfp6-e3m2, mxfp4, micromix"):
        evaluation.row_config("fp4", base)


def test_a_row_is_flat_in_json() -> None:
    """Bits and quality side by side."""
    quality = Evaluation(perplexity=2.0, predictions=3, kl=0.5, top1=0.25)
    row = RowResult(row="r", element_bits=4.0, stored_bits=4.25, stored_bytes=17, evaluation=quality)
    assert row.to_dict() == {
        "row": "r",
        "element_bits": 4.0,
        "stored_bits": 4.25,
        "stored_bytes": 17,
        "perplexity": 2.0,
        "predictions": 3,
        "kl": 0.5,
        "top1": 0.25,
        "tasks": [],
    }


def test_versions_and_hardware_name_what_produced_a_number() -> None:
    """Without these a perplexity can't be reproduced."""
    assert evaluation.versions()["torch"] == torch.__version__
    assert {"cpu", "threads", "vector_isa"} <= set(evaluation.hardware())
    assert evaluation.hardware()["cpu"]


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False), id="as in the row"),
        pytest.param(MicroMixConfig(), id="another", marks=pytest.mark.deep),
    ],
)
def test_the_real_model_has_the_published_perplexity_and_mxfp8_costs_what_it_should(config: MicroMixConfig) -> None:
    """Four windows in float32: full precision 16.031 by this protocol; MXFP8 16.654, through the compiled backend."""
    import micromix_compile as micromix

    model, tokenizer = zoo.load_model(zoo.DEFAULT_MODEL, torch.float32)
    text = texts.load_texts()
    windows = texts.token_windows(text.evaluation, tokenizer, 4)
    calibration = texts.token_windows(text.calibration, tokenizer, 1, 64)
    recipe = micromix.calibrate(model, calibration.split(1), config, progress=False)
    full, mxfp8 = evaluation.evaluate_rows(model, recipe, ("fp32", "mxfp8"), windows, progress=False)
    assert full.evaluation.perplexity == pytest.approx(16.031, abs=1e-3)
    assert (full.element_bits, full.stored_bytes) == (32.0, 4 * 106_168_320)
    assert mxfp8.evaluation.perplexity == pytest.approx(16.654, rel=0.01)
    assert mxfp8.evaluation.kl is not None
    assert 0.02 < mxfp8.evaluation.kl < 0.06
    assert mxfp8.element_bits == 8.0
    assert mxfp8.stored_bits == pytest.approx(8.25, rel=0.01)

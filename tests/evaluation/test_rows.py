"""The rows of the table: what each runs, and the published figures of the real model."""

from __future__ import annotations

import pytest
import torch

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import rows, texts, zoo
from micromix_compile.evaluation.types import Evaluation, RowResult


@pytest.mark.parametrize(
    ("row", "policy", "fp6"),
    [("mxfp8", "mxfp8", "e3m2"), ("mxfp6-e2m3", "mxfp6", "e2m3"), ("mxfp6-e3m2", "mxfp6", "e3m2")],
)
def test_uniform_rows_keep_the_options_they_do_not_set(row: str, policy: str, fp6: str) -> None:
    """Weights follow their channel's format in every uniform row."""
    base = MicroMixConfig(fp6="e3m2", weights="mxfp4", scale_rounding="floor")
    config = rows.row_config(row, base)
    assert (config.policy, config.fp6, config.weights, config.scale_rounding) == (policy, fp6, "same", "floor")


def test_the_micromix_row_is_the_given_config() -> None:
    """And other names are errors that list the valid ones."""
    base = MicroMixConfig(granularity=128)
    assert rows.row_config("micromix", base) is base
    with pytest.raises(ValueError, match="row must be one of mxfp8, mxfp6-e2m3, mxfp6-e3m2, mxfp4, micromix"):
        rows.row_config("fp4", base)


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


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False), id="as in the row"),
        pytest.param(MicroMixConfig(), id="another", marks=pytest.mark.deep),
    ],
)
def test_the_real_model_has_the_published_perplexity_and_mxfp8_costs_what_it_should(config: MicroMixConfig) -> None:
    """Four windows in float32: full precision 16.031 by this protocol; MXFP8 16.654, through the compiled backend."""
    model, tokenizer = zoo.load_model(zoo.DEFAULT_MODEL, torch.float32)
    text = texts.load_texts()
    windows = texts.token_windows(text.evaluation, tokenizer, 4)
    calibration = texts.token_windows(text.calibration, tokenizer, 1, 64)
    recipe = micromix.calibrate(model, calibration.split(1), config, progress=False)
    full, mxfp8 = rows.evaluate_rows(model, recipe, ("fp32", "mxfp8"), windows, progress=False)
    assert full.evaluation.perplexity == pytest.approx(16.031, abs=1e-3)
    assert (full.element_bits, full.stored_bytes) == (32.0, 4 * 106_168_320)
    assert mxfp8.evaluation.perplexity == pytest.approx(16.654, rel=0.01)
    assert mxfp8.evaluation.kl is not None
    assert 0.02 < mxfp8.evaluation.kl < 0.06
    assert mxfp8.element_bits == 8.0
    assert mxfp8.stored_bits == pytest.approx(8.25, rel=0.01)


def test_a_quantized_row_needs_a_recipe() -> None:
    with pytest.raises(ValueError, match="a recipe must be given for the rows mxfp8, got None"):
        next(rows.evaluate_rows(torch.nn.Linear(2, 2), None, ("fp32", "mxfp8"), torch.zeros(1, 2), progress=False))

"""Models of many architectures, from transformers' configs: in all three ways, through real code generation.

MICROMIX_RECORD_ARCHITECTURES=1 keeps the rows and writes the table of `docs/architectures.md`; run it with `-m ""` and
one process.
"""

from __future__ import annotations

import os
from typing import Final

import pytest
import torch
import transformers
from support.architecture_rows import FILE, MARKS, OPTIONS, PAGE, measured, record, recorded, table
from support.architectures import ARCHITECTURES

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.packed import MicroMixLinear

RECORDS: Final = "MICROMIX_RECORD_ARCHITECTURES" in os.environ
CONFIG: Final = MicroMixConfig(**OPTIONS)
QUICK: Final = ("Llama 4, text",)
"""Experts by batched products; the others' ways are in `tests/verbs`."""
CASES = [pytest.param(name, marks=() if name in QUICK else pytest.mark.deep) for name in ARCHITECTURES]


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")  # what transformers and Dynamo say of these models
@pytest.mark.parametrize("name", CASES)
def test_an_architecture_runs_as_its_packed_model_does_in_all_three_ways(name: str) -> None:
    row = measured(ARCHITECTURES[name])
    assert max(row.differences.values()) <= 1e-3
    assert row.effect > 100 * max(row.differences.values()), "quantizing shows"
    assert row.breaks <= 0
    if ARCHITECTURES[name].is_moe:
        assert min(row.share, row.published_share) >= 0.85
    if RECORDS:
        record(name, row)
    kept = recorded()[name]
    assert (row.share, row.body, row.published, row.published_share, row.published_body, row.left) == (
        kept.share, kept.body, kept.published, kept.published_share, kept.published_body, kept.left,
    )  # fmt: skip


def test_the_page_shows_what_was_recorded() -> None:
    rows = recorded()
    made = table({name: rows[name] for name in ARCHITECTURES})
    before, start, rest = PAGE.read_text("utf-8").partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    if RECORDS:
        PAGE.write_text(before + start + "\n" + made + "\n" + end + after, "utf-8")
    shown = PAGE.read_text("utf-8").partition(MARKS[0])[2].partition(MARKS[1])[0]
    assert shown.strip() == made.strip(), f"{FILE.name} and the page differ: MICROMIX_RECORD_ARCHITECTURES=1 writes it"


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`:UserWarning")  # in Jamba
def test_a_linear_whose_weight_is_on_the_left_is_packed_where_its_model_calls_it_then() -> None:
    """`dt_proj`: Jamba calls it in a model that is marked as quantized, Mamba reads its weight always."""
    jamba = ARCHITECTURES["Jamba"]
    model, inputs = jamba.model(jamba.tiny_config()), jamba.inputs()
    recipe = micromix.calibrate(model, [inputs], CONFIG, progress=False)
    with torch.no_grad():
        plain = model(**inputs).logits
        out = micromix.quantize_(model, recipe)(**inputs).logits
    assert not model.micromix_refused
    assert isinstance(model.model.layers[0].mamba.dt_proj, MicroMixLinear)
    assert 0 < (out - plain).norm() < 0.1 * plain.norm()
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 1, "time_step_rank": 32, "state_size": 8}
    mamba = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**sizes, use_mambapy=False)).eval()
    micromix.quantize_(mamba, micromix.calibrate(mamba, [inputs], CONFIG, progress=False))
    (refused,) = mamba.micromix_refused.items()
    assert refused == (
        "backbone.layers.0.mixer.dt_proj", "MambaMixer reads its weight directly, not through a linear's forward"
    )  # fmt: skip

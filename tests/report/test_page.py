"""What the page says: the recipe's own numbers, asking for nothing from elsewhere."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import pytest
from support.reports import Page, layered_recipe

from micromix_compile.config import DUMPED, MicroMixConfig
from micromix_compile.evaluation.types import Evaluation
from micromix_compile.passes import insert_observers
from micromix_compile.report.facts import of_recipe
from micromix_compile.report.machines import machines
from micromix_compile.report.measured import Measured
from micromix_compile.report.page import ACTIVATIONS, PASSES, Report, number, percent, size
from micromix_compile.report.pictures import pictures

RECIPE = layered_recipe()
FACTS = of_recipe(RECIPE, "net.safetensors")
MEASURED = Measured(
    sqnr={fqn: 10.0 + i for i, fqn in enumerate(list(RECIPE.linears)[:-1])},
    evaluation=Evaluation(perplexity=20.25, predictions=9, kl=0.125, top1=0.75),
    unquantized=19.5,
    passes={name: i for i, name in enumerate(PASSES)},
    refused={"layers.0.odd": "its class is its own"},
    text="a text, 3 windows",
)


@pytest.fixture(scope="module")
def html() -> str:
    found = machines(FACTS, ["sm_100", "sm_90"])
    return Report(facts=FACTS, machines=found, pictures=pictures(FACTS, MEASURED), measured=MEASURED).html()


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_its_numbers_are_the_recipes(page: Page) -> None:
    assert RECIPE.left_alone is not None
    expected = {
        "linears": len(RECIPE.linears),
        "element-bits": RECIPE.element_bits,
        "stored-bits": RECIPE.stored_bits,
        "model-bits": RECIPE.model_bits,
        "stored-bytes": RECIPE.stored_bytes,
        "bf16-bytes": 2 * RECIPE.parameters,
        "whole-bytes": RECIPE.stored_bytes + RECIPE.left_alone[1],
        "left-parameters": RECIPE.left_alone[0],
        "left-bytes": RECIPE.left_alone[1],
        "groups": len(RECIPE.groups),
        "rotated-groups": sum(group.rotated > 0 for group in RECIPE.groups.values()),
        "predicted": FACTS.predicted,
    }
    assert {name: float(page.values[name]) for name in expected} == expected
    assert sum(int(value) for name, value in page.values.items() if re.match("bytes-", name)) == RECIPE.stored_bytes


def test_each_linear_has_its_row(page: Page) -> None:
    assert list(page.linears) == list(RECIPE.linears)
    for fqn, values in page.linears.items():
        linear = RECIPE.linears[fqn]
        fixed = [*linear.split, linear.in_features, linear.out_features, linear.element_bits]
        fixed += [RECIPE.stored_bytes_of(linear), linear.group.rotated]
        predicted = next(group.predicted for group in FACTS.groups if fqn in group.fqns)
        noise = [MEASURED.sqnr[fqn]] if fqn in MEASURED.sqnr else []
        assert [float(value) for value in values] == [*fixed, predicted, *noise]
    assert page.text.count("not measured") == 1


def test_what_was_measured_is_on_it(page: Page) -> None:
    found = {name: float(page.values[name]) for name in ("perplexity", "unquantized", "kl", "top1")}
    assert found == {"perplexity": 20.25, "unquantized": 19.5, "kl": 0.125, "top1": 0.75}
    assert {name: int(page.values[f"pass-{name}"]) for name in PASSES} == MEASURED.passes
    assert "Measured on a text, 3 windows." in page.text


def test_it_says_what_is_left_alone_and_what_computes(page: Page) -> None:
    for text in ("lm_head", "its name matches skip='*lm_head'", "layers.0.odd", "its class is its own"):
        assert text in page.text
    assert "sm_100: native" in page.text
    assert "tcgen05.mma mxf4 (MXFP4); tcgen05.mma mxf8f6f4 (MXFP6, MXFP8)" in page.text
    assert "wgmma e4m3 up to 256 rows, then the library's FP8 product" in page.text
    assert ACTIVATIONS["same"] in page.text


def test_it_asks_for_nothing_and_is_well_formed(html: str, page: Page) -> None:
    assert all(re.match(r"#|data:image/png;base64,", asked) for asked in page.asked)
    assert not page.tags & {"script", "link", "iframe", "object", "embed"}
    assert "@import" not in html
    assert set(re.findall(r"url\((.)", html)) <= {"#"}
    assert page.unclosed == []
    assert [name for name, count in Counter(page.ids).items() if count > 1] == []


def test_names_are_text_whatever_they_are() -> None:
    """Files of others may say anything."""
    name = "<script>alert(1)</script>\" onload='x'"
    linears = tuple(dataclasses.replace(linear, fqn=name) for linear in FACTS.linears[:1])
    facts = dataclasses.replace(FACTS, model_id=name, source=name, refused={name: name}, linears=linears)
    page = Page(Report(facts=facts, machines=[], pictures=pictures(facts, None)).html())
    assert "script" not in page.tags
    assert list(page.linears) == [name]
    assert page.unclosed == []


def test_a_checkpoint_without_statistics_says_what_is_not_known() -> None:
    groups = tuple(dataclasses.replace(group, magnitudes=None, predicted=None) for group in FACTS.groups)
    facts = dataclasses.replace(
        FACTS, kind="packed checkpoint", groups=groups, measured=None, refused={}, left_alone=None, recipe=None
    )
    page = Page(Report(facts=facts, machines=[], pictures=pictures(facts, None)).html())
    for text in (
        "a packed checkpoint carries no predictions", "A packed checkpoint carries no magnitudes",
        "Passes count while a model is compiled", "It was not recorded", "A packed checkpoint does not say why",
    ):  # fmt: skip
        assert text in page.text
    assert not {"model-bits", "predicted", "kl", "left-bytes"} & page.values.keys()


@pytest.mark.parametrize("activations", ["same", "fp8", "mxfp6"])
@pytest.mark.parametrize("weights", ["same", "mxfp4"])
def test_formats_are_said_in_words(activations: str, weights: str) -> None:
    recipe = layered_recipe(MicroMixConfig(activations=activations, weights=weights, fp6="e3m2"), layers=1)
    page = Page(Report(facts=of_recipe(recipe, "r"), machines=[], pictures=[]).html())
    assert ACTIVATIONS[activations] in page.text
    assert ("all MXFP4" in page.text) == (weights == "mxfp4")
    assert "MXFP6 is E3M2" in page.text


def test_every_pass_that_compiles_has_words() -> None:
    assert set(PASSES) == set(DUMPED) - {insert_observers.__name__}


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [(None, 2, ""), (0.0, 2, "0.00"), (5.478, 2, "5.48"), (0.00012, 4, "0.0001"), (0.000012, 4, "1.2e-05")],
)
def test_numbers_keep_two_digits_where_they_are_small(value: float | None, digits: int, text: str) -> None:
    assert number(value, digits) == text


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0.0 KiB"), (3000, "2.9 KiB"), (2**20, "1.0 MiB"), (3 * 2**29, "1.50 GiB"), (5 * 2**40, "5,120.00 GiB")],
)
def test_sizes_are_in_the_unit_that_fits(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0.0 %"), (0.0004, "under 0.1 %"), (0.0005, "0.1 %"), (0.0456, "4.6 %"), (1, "100.0 %")]
)
def test_a_share_is_not_zero_unless_there_is_none(share: float, text: str) -> None:
    assert percent(share) == text


def test_what_is_left_alone_in_every_layer_is_one_line_of_its_reason() -> None:
    refused = {f"layers.{layer}.gate": "it is a router" for layer in range(3)} | {"layers.3.gate": "why not"}
    page = Page(Report(facts=dataclasses.replace(FACTS, refused=refused), machines=[], pictures=[]).html())
    assert "layers.*.gate, 3 of them" in page.text
    assert "layers.3.gate" in page.text
    assert "layers.0.gate" not in page.text


def test_experts_are_said_to_be_counted_as_one() -> None:
    linears = (dataclasses.replace(FACTS.linears[0], experts=16), *FACTS.linears[1:])
    for facts, said in ((FACTS, False), (dataclasses.replace(FACTS, linears=linears), True)):
        page = Page(Report(facts=facts, machines=[], pictures=[]).html())
        assert ("the experts of a layer are one" in page.text) == said

"""What the pictures show, and what becomes of them on a page."""

from __future__ import annotations

import importlib.util
import math
import re
from xml.etree import ElementTree

import pytest
from support.reports import layered_recipe

from micromix_compile.evaluation.types import Evaluation
from micromix_compile.report.facts import Facts, of_recipe
from micromix_compile.report.measured import Measured
from micromix_compile.report.pictures import COLOURS, INK, Picture, pictures

MEASURED = Measured(
    sqnr={f"layers.{layer}.q": 20.0 + layer for layer in range(3)},
    evaluation=Evaluation(perplexity=2.0, predictions=9, kl=0.1, top1=0.9),
    unquantized=1.9,
    passes={},
    refused={},
    text="a text",
)


@pytest.fixture(scope="module")
def facts() -> Facts:
    return of_recipe(layered_recipe(), "r")


@pytest.fixture(scope="module")
def drawn(facts: Facts) -> dict[str, Picture]:
    return {picture.name: picture for picture in pictures(facts, MEASURED)}


def test_there_is_a_picture_for_all_that_is_known(facts: Facts, drawn: dict[str, Picture]) -> None:
    names = ["bytes", "formats-0", "formats-1", "predicted", "sqnr", "channels-0", "channels-1"]
    assert list(drawn) == names
    assert [one.name for one in pictures(facts, None)] == [name for name in names if name != "sqnr"]


def test_bars_are_the_shares_of_the_formats(facts: Facts, drawn: dict[str, Picture]) -> None:
    (axes,) = drawn["formats-0"].figure.axes
    assert len(axes.patches) == 3
    for index, patch in enumerate(axes.patches):
        top, _, baseline = patch.get_data()
        shares = [100 * group.split[index] / group.channels for group in facts.groups[::2]]
        assert [a - b for a, b in zip(top, baseline, strict=True)] == pytest.approx(shares)


def test_bytes_are_stacked_to_all_that_is_stored(facts: Facts, drawn: dict[str, Picture]) -> None:
    (axes,) = drawn["bytes"].figure.axes
    assert facts.left_alone is not None
    for y, whole in enumerate((2 * (facts.parameters + facts.left_alone[0]), facts.stored_bytes + facts.left_alone[1])):
        bars = [bar for bar in axes.patches if bar.get_y() < y < bar.get_y() + bar.get_height()]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(whole / 2**20)


def test_lines_are_the_costs_and_the_noise(facts: Facts, drawn: dict[str, Picture]) -> None:
    lines = {line.get_label(): list(line.get_ydata()) for line in drawn["predicted"].figure.axes[0].lines}
    assert lines == {
        "q, k": [g.predicted for g in facts.groups[::2]],
        "down": [g.predicted for g in facts.groups[1::2]],
    }
    noise = {line.get_label(): list(line.get_ydata()) for line in drawn["sqnr"].figure.axes[0].lines}
    assert noise["q"] == [20.0, 21.0, 22.0]
    assert all(math.isnan(value) for value in noise["k"]), "not run"


def test_channels_are_drawn_by_layer_with_the_ends_of_the_formats(facts: Facts, drawn: dict[str, Picture]) -> None:
    axes = drawn["channels-0"].figure.axes[0]
    (image,) = axes.images
    assert image.get_array().shape == (3, 96)
    ends = [list(patch.get_data()[0]) for patch in axes.patches]
    assert ends[0] == pytest.approx([100 * group.split[0] / 96 for group in facts.groups[::2]])
    assert ends[1] == pytest.approx([100 * sum(group.split[:2]) / 96 for group in facts.groups[::2]])


def test_on_a_page_no_two_pictures_share_a_name_and_colours_are_the_pages(drawn: dict[str, Picture]) -> None:
    ids: list[str] = []
    for picture in drawn.values():
        svg = picture.svg()
        root = ElementTree.fromstring(svg)
        own = [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        ids += own
        assert set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg)) <= {(name, "") for name in own} | {
            ("", name) for name in own
        }
        assert not any(element.tag.endswith(("style", "script", "metadata")) for element in root.iter())
        for colour in (INK, *COLOURS.values()):
            assert len(re.findall(colour, svg)) == len(re.findall(rf"var\(--[\w-]+, {colour}\)", svg))
    assert len(ids) == len(set(ids))
    assert "var(--MXFP4, #004488)" in drawn["formats-0"].svg()


def test_the_same_facts_are_the_same_file(facts: Facts) -> None:
    once, again = (pictures(facts, None) for _ in range(2))
    assert [picture.svg() for picture in once] == [picture.svg() for picture in again]
    png = once[0].png()
    assert png == again[0].png()
    assert png.startswith(b"\x89PNG")
    assert b"MicroMix report" in png


def test_without_matplotlib_the_error_says_what_to_install(facts: Facts, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"matplotlib is missing: pip install 'micromix-compile\[report\]'"):
        pictures(facts, None)

"""Which linears are one series: names that differ by numbers alone."""

from __future__ import annotations

import dataclasses

from support.reports import layered_recipe

from micromix_compile.report.facts import of_recipe
from micromix_compile.report.series import series_of_groups, series_of_linears


def test_layers_are_one_series_in_their_order() -> None:
    facts = of_recipe(layered_recipe(), "r")
    groups = series_of_groups(facts)
    assert [one.label for one in groups] == ["q, k", "down"]
    assert [group.name for group in groups[0].members] == [f"layers.{layer}.q" for layer in range(3)]
    assert [one.label for one in series_of_linears(facts)] == ["q", "k", "down"]


def test_equal_last_names_are_told_apart_by_whole_ones() -> None:
    facts = of_recipe(layered_recipe(layers=2), "r")
    linears = [
        dataclasses.replace(linear, fqn=f"{side}.{linear.fqn}")
        for side in ("encoder", "decoder1")
        for linear in facts.linears
    ]
    labels = [one.label for one in series_of_linears(dataclasses.replace(facts, linears=tuple(linears)))]
    assert labels == [f"{side}.layers.*.{name}" for side in ("encoder", "decoder1") for name in ("q", "k", "mlp.down")]

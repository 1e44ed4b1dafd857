"""A recipe of some layers, and what a page says, read as a browser would."""

from __future__ import annotations

import dataclasses
from html.parser import HTMLParser

import torch

from micromix_compile.config import MicroMixConfig
from micromix_compile.recipe.types import ChannelCosts, GroupRecipe, LinearRecipe, Recipe
from support.recipes import statistics

_VOID = frozenset({"meta", "link", "img", "br", "hr", "input", "wbr"})
_ASKING = frozenset({"src", "href", "xlink:href", "srcset", "data", "action", "poster"})


def layered_recipe(config: MicroMixConfig | None = None, *, layers: int = 3) -> Recipe:
    """Of so many layers: q and k read one activation of 90 channels, down another of 128."""
    config = config or MicroMixConfig(activations="same", rotate="auto")
    linears: dict[str, LinearRecipe] = {}
    for layer in range(layers):
        q = _group(f"layers.{layer}.q", 90, (32 * (layer % 4), 96 - 32 * (layer % 4), 0), rotated=96 * (layer % 2))
        down = _group(f"layers.{layer}.mlp.down", 128, (64, 32, 32), rotated=0)
        for name, outputs, group in (("q", 64, q), ("k", 32, q), ("mlp.down", 48, down)):
            fqn = f"layers.{layer}.{name}"
            channels = group.statistics.abs_mean.numel()
            linears[fqn] = LinearRecipe(
                fqn=fqn, in_features=channels, out_features=outputs, group=group, weight_sample=torch.zeros(32)
            )
    refused = {"lm_head": "its name matches skip='*lm_head'"}
    return Recipe(config=config, model_id="Net", linears=linears, refused=refused, left_alone=(1000, 2400))


def _group(name: str, channels: int, split: tuple[int, int, int], *, rotated: int) -> GroupRecipe:
    table = torch.rand(4, channels) / 1000
    costs = ChannelCosts(
        activations=table, weights=table, measured=True, rotated_activations=table / 2, rotated_weights=table / 2
    )
    perm = torch.cat((torch.full((-channels % 32,), -1), torch.randperm(channels))).int()
    seen = dataclasses.replace(statistics(abs_mean=torch.rand(channels)), costs=costs)
    return GroupRecipe(name=name, channel_perm=perm, split=split, rotated=rotated, statistics=seen)


class Page(HTMLParser):
    """values: id -> value of a <data>. linears: name -> values of its row, in order. ids: of all elements, in order.

    asked: what the page would load. tags: of its elements. text: all of it. unclosed: what was opened and not closed,
    or closed and not opened.
    """

    def __init__(self, html: str) -> None:
        super().__init__()
        self.values: dict[str, str] = {}
        self.linears: dict[str, list[str]] = {}
        self.ids: list[str] = []
        self.asked: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self.unclosed: list[str] = []
        self._row: list[str] | None = None
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in _VOID:
            self.unclosed.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.tags.add(tag)
        self.ids += [given["id"]] if "id" in given else []
        self.asked += [value for name, value in given.items() if name in _ASKING]
        if tag == "tr":
            self._row = self.linears.setdefault(given["data-fqn"], []) if "data-fqn" in given else None
        if tag == "data" and "id" in given:
            self.values[given["id"]] = given["value"]
        elif tag == "data" and self._row is not None:
            self._row.append(given["value"])

    def handle_endtag(self, tag: str) -> None:
        if self.unclosed and self.unclosed[-1] == tag:
            self.unclosed.pop()
        else:
            self.unclosed.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.text += data

"""What runs each linear: on this machine, and on GPUs that are named."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from micromix_compile.targets.described import SEGMENTS, named_target, products_of
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.report.facts import Facts, Linear
    from micromix_compile.targets.described import Product
    from micromix_compile.targets.target import Target


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A device. label: how it was asked for. here: whether it is of this machine. target: who computes there."""

    label: str
    here: bool
    target: Target

    @property
    def description(self) -> str:
        """The target's name without the label."""
        return re.sub(rf"^{self.label} \((?:{self.label}: )?(.*)\)$", r"\1", self.target.name)

    def products(self, linear: Linear, facts: Facts) -> list[Product]:
        """How a linear is multiplied there."""
        config, experts = facts.config, linear.experts is not None
        return products_of(
            self.target, linear.split, weights=config.weights, activations=config.activations, experts=experts
        )

    def counts(self, facts: Facts) -> list[tuple[tuple[str, str, str, str], int]]:
        """Linears that have weights in a format, by (format, rows, kernel, instruction)."""
        found = Counter(
            (name, product.rows, product.kernel, kind)
            for linear in facts.linears
            for product in self.products(linear, facts)
            for name, kind in product.kinds.items()
        )
        return sorted(found.items(), key=lambda item: (SEGMENTS.index(item[0][0]), _first_number(item[0][1])))


def _first_number(rows: str) -> int:
    """Of "up to 256", and 0 of "any"."""
    return int((re.findall(r"\d+", rows) or [0])[0])


def machines(facts: Facts, names: Sequence[str]) -> list[Machine]:
    """The devices of this machine, then the named ones. Raises ValueError for a name that is none."""
    devices = ("cpu", *(("cuda",) if torch.cuda.is_available() else ()))
    exact = facts.config.exact
    here = [Machine(label=name, here=True, target=target_of(torch.device(name), exact=exact)) for name in devices]
    return [*here, *(Machine(label=name, here=False, target=named_target(name, exact=exact)) for name in names)]


def instructions(product: Product) -> str:
    """A product's matrix instructions; where they are several, each with the formats of weights that it takes."""
    by_kind: dict[str, list[str]] = {}
    for name, kind in product.kinds.items():
        by_kind.setdefault(kind, []).append(name)
    if len(by_kind) == 1:
        return next(iter(by_kind))
    return "; ".join(f"{kind} ({', '.join(names)})" for kind, names in by_kind.items())

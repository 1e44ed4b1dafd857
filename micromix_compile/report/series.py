"""Groups and linears of one kind, layer after layer: names that differ by numbers alone are a series."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from micromix_compile.report.facts import Facts, Group, Linear

_T = TypeVar("_T")
_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


@dataclass(frozen=True, slots=True)
class Series(Generic[_T]):
    """label: what tells it from others. members: in the order of the model."""

    label: str
    members: tuple[_T, ...]


def series_of_groups(facts: Facts) -> list[Series[Group]]:
    """Activations, called by the linears that read them."""
    return _series(facts.groups, lambda group: group.fqns)


def series_of_linears(facts: Facts) -> list[Series[Linear]]:
    """Linears."""
    return _series(facts.linears, lambda linear: (linear.fqn,))


def without_numbers(name: str) -> str:
    """What names of a series have in common: a star for each part that is a number."""
    return _NUMBER.sub("*", name)


def _series(members: Iterable[_T], names_of: Callable[[_T], tuple[str, ...]]) -> list[Series[_T]]:
    found: dict[tuple[str, ...], list[_T]] = {}
    for member in members:
        found.setdefault(tuple(without_numbers(name) for name in names_of(member)), []).append(member)
    short = {patterns: ", ".join(pattern.rpartition(".")[2] for pattern in patterns) for patterns in found}
    ambiguous = len(set(short.values())) < len(short)
    return [Series(", ".join(key) if ambiguous else short[key], tuple(ones)) for key, ones in found.items()]

"""Which of many slow cases every run takes: some in which each property is met; the others are for a `deep` run."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, TypeVar

import pytest

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from _pytest.mark import ParameterSet
    from torch import Tensor

Case = TypeVar("Case")


def cover(cases: Sequence[Case], properties: Callable[[Case], Iterable[Hashable]]) -> list[Case]:
    """A small part of `cases`, in their order, that has every property that any of them has."""
    missing = {found for case in cases for found in properties(case)}
    taken: set[int] = set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(missing & set(properties(cases[i]))))
        taken.add(best)
        missing -= set(properties(cases[best]))
    return [case for i, case in enumerate(cases) if i in taken]


def params(cases: Iterable[Case], quick: Iterable[Case]) -> list[ParameterSet]:
    """`cases` for `parametrize`; those that aren't in `quick` are marked `deep`."""
    always = list(quick)
    return [pytest.param(case, marks=() if case in always else pytest.mark.deep) for case in cases]


def runs_deep(request: pytest.FixtureRequest) -> bool:
    """Whether any of the tests that are to run is marked `deep`."""
    return any(item.get_closest_marker("deep") for item in request.session.items)


def part(values: Tensor, step: int, device: str, start: int = 0) -> Tensor:
    """Every `step`-th of values, from `start` on, for Triton's interpreter; all on a GPU and in a deep run."""
    is_quick = device == "cpu" and os.environ.get("HYPOTHESIS_PROFILE") != "deep"
    return values[start % step :: step] if is_quick else values

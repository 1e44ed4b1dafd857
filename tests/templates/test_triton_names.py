"""Inductor writes a kernel and all that it reaches into one module, by name: names must not mean two things."""

from __future__ import annotations

import importlib
import pkgutil
from types import FunctionType
from typing import TYPE_CHECKING, Any

import pytest
import triton
import triton.language as tl

import micromix_compile.templates.triton as kernels

if TYPE_CHECKING:
    from collections.abc import Iterator


def launched() -> dict[str, Any]:
    """Every kernel that is launched, by name."""
    modules = [
        importlib.import_module(f"{kernels.__name__}.{one.name}") for one in pkgutil.iter_modules(kernels.__path__)
    ]
    found = {name: value for module in modules for name, value in vars(module).items() if name.endswith("_kernel")}
    return {name: kernel for name, kernel in found.items() if hasattr(kernel, "fn")}


def reached(function: Any) -> Iterator[tuple[str, Any]]:
    """Names and values of the globals that a device function uses, and those that they use."""
    seen: set[int] = set()
    waiting = [function]
    while waiting:
        plain = waiting.pop()
        plain = getattr(plain, "fn", plain)
        if id(plain) in seen or not hasattr(plain, "__code__"):
            continue
        seen.add(id(plain))
        for name in plain.__code__.co_names:
            if name in plain.__globals__ and plain.__globals__[name] not in (tl, triton):
                yield name, plain.__globals__[name]
                waiting.append(plain.__globals__[name])


def clashes(function: Any) -> set[str]:
    """Names that mean several things in what `function` reaches. Constants of equal values are one thing."""
    meanings: dict[str, Any] = {}
    twice = set()
    for name, value in reached(function):
        meaning = value.value if isinstance(value, tl.constexpr) else value
        if meanings.setdefault(name, meaning) != meaning:
            twice.add(name)
    return twice


def test_kernels_are_found() -> None:
    assert {"reorder_fold_kernel", "reorder_quantize_kernel", "folded_mm_kernel"} <= set(launched())


@pytest.mark.parametrize("name", launched())
def test_a_name_means_one_thing_in_all_that_a_kernel_reaches(name: str) -> None:
    assert clashes(launched()[name]) == set()


def test_a_second_meaning_is_found() -> None:
    def uses_name() -> Any:
        return name_of_a_constant  # type: ignore[name-defined]  # noqa: F821

    def calls_both() -> Any:
        return first(), second()  # type: ignore[name-defined]  # noqa: F821

    for value, expected in ((2, {"name_of_a_constant"}), (1, set())):
        readers = [FunctionType(uses_name.__code__, {"name_of_a_constant": tl.constexpr(one)}) for one in (1, value)]
        assert (
            clashes(FunctionType(calls_both.__code__, dict(zip(("first", "second"), readers, strict=True)))) == expected
        )

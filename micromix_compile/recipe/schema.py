"""What JSON from a file must look like, as data: nested dicts and lists of rules, and one function that checks."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

MAX_COUNT: Final = 2**63 - 1
_SHOWN: Final = 80  # characters of a wrong value


class FieldError(ValueError):
    """A field of a file is missing or wrong; the message begins with its name."""


@dataclass(frozen=True, slots=True)
class Rule:
    """A value that `holds` accepts. wanted: how a message calls it. optional: the field may be left out."""

    wanted: str
    holds: Callable[[Any], bool]
    optional: bool = False


def shown(value: object) -> str:
    """`value` as a message shows it: not longer than a line, whatever it is."""
    try:
        text = repr(value)
    except (RecursionError, ValueError):  # ValueError: an integer of thousands of digits
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def named(name: str) -> str:
    """A name from a file as a message shows it: as it is, unless it is long or would disturb the message."""
    return name if name.isprintable() and 0 < len(name) <= 2 * _SHOWN else shown(name)


def integer(least: int, *, optional: bool = False) -> Rule:
    """An integer from `least` to 2**63 - 1."""

    def holds(value: object) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and least <= value <= MAX_COUNT

    return Rule(f"an integer of {least} or more", holds, optional)


STRING: Final = Rule("a string", lambda value: isinstance(value, str))
NAME: Final = Rule("a string that is not empty", lambda value: isinstance(value, str) and bool(value))
BOOLEAN: Final = Rule("true or false", lambda value: isinstance(value, bool))
OPTIONAL_BOOLEAN: Final = Rule(BOOLEAN.wanted, BOOLEAN.holds, optional=True)
MAPPING: Final = Rule("a mapping", lambda value: isinstance(value, dict))
NUMBER: Final = Rule(
    "a finite number",
    lambda value: isinstance(value, int | float) and not isinstance(value, bool) and -1e300 < value < 1e300,
)


@dataclass(frozen=True, slots=True)
class Each:
    """A mapping from strings to values of one kind."""

    of: Any


@dataclass(frozen=True, slots=True)
class OrNull:
    """A value of some kind, or null."""

    of: Any


def check(value: object, wanted: Any, place: str) -> None:
    """Raise `FieldError`, which begins with the place, unless `value` is as `wanted`.

    wanted: a `Rule`; a dict of fields, which must be there, and no others; a list of one kind, for any number of these;
    a tuple, for a list of just these; `Each`; or `OrNull`.
    """
    if isinstance(wanted, Rule):
        if not wanted.holds(value):
            raise FieldError(f"{place} must be {wanted.wanted}, got {shown(value)}")
    elif isinstance(wanted, OrNull):
        if value is not None:
            check(value, wanted.of, place)
    elif isinstance(wanted, dict):
        _check_fields(value, wanted, place)
    elif isinstance(wanted, Each):
        check(value, MAPPING, place)
        for name, item in value.items():  # type: ignore[attr-defined]
            check(item, wanted.of, f"{place}[{shown(name)}]")
    else:
        _check_items(value, wanted, place)


def _check_fields(value: object, wanted: dict[str, Any], place: str) -> None:
    check(value, MAPPING, place)
    assert isinstance(value, dict), "just checked"
    for name in value:
        if name not in wanted:
            raise FieldError(f"{place}[{shown(name)}] is not a field; the fields are {', '.join(wanted)}")
    for name, kind in wanted.items():
        if name in value:
            check(value[name], kind, f"{place}[{name!r}]")
        elif not (isinstance(kind, Rule) and kind.optional):
            raise FieldError(f"{place}[{name!r}] is missing")


def _check_items(value: object, wanted: list[Any] | tuple[Any, ...], place: str) -> None:
    if not isinstance(value, list):
        raise FieldError(f"{place} must be a list, got {shown(value)}")
    if isinstance(wanted, tuple) and len(value) != len(wanted):
        raise FieldError(f"{place} must have {len(wanted)} items, got {shown(value)}")
    kinds = wanted if isinstance(wanted, tuple) else wanted * len(value)
    for index, (item, kind) in enumerate(zip(value, kinds, strict=True)):
        check(item, kind, f"{place}[{index}]")


def parse_json(text: str | bytes, place: str) -> Any:
    """JSON that a file holds. Raises `FieldError`, which begins with the place, for any other text."""
    try:
        return json.loads(text)
    except RecursionError:
        raise FieldError(f"{place} is nested too deeply") from None
    except ValueError as error:  # not JSON, not UTF-8, or an integer of thousands of digits
        raise FieldError(f"{place} is not JSON: {error}") from error

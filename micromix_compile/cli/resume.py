"""An evaluation that may be interrupted: what it keeps in a folder, and whether the folder is its own."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from micromix_compile import files
from micromix_compile.cli.errors import UsageError
from micromix_compile.evaluation import zoo
from micromix_compile.recipe.schema import MAPPING, FieldError, check, parse_json

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.recipe.types import Recipe

_SETTINGS: Final = "settings.json"
_RECIPE: Final = "recipe.safetensors"


class Kept:
    """The recipe and the models' answers to tasks, in `folder`; without one, nothing is kept.

    settings: all that the answers depend on, as JSON has it. Raises UsageError if the folder holds an evaluation with
    others, or something else. A new folder is made by `claim`, once all that was asked for is known to be right.
    """

    def __init__(self, folder: Path | None, settings: dict[str, Any]) -> None:
        self.folder, self._settings = folder, settings
        if folder is None:
            return
        path = folder / _SETTINGS
        if path.is_file():
            _check_same(folder, _read(path), settings)
            return
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UsageError(f"--resume must be a new directory or one of an evaluation before, got {folder}")

    def claim(self) -> None:
        """The folder is this evaluation's from now on."""
        if self.folder is not None and not (path := self.folder / _SETTINGS).is_file():
            files.write_atomically(path, json.dumps(self._settings, indent=2).encode())

    def recipe(self, decide: Callable[[], Recipe]) -> Recipe:
        """The one that was decided before, or `decide()`."""
        import micromix_compile as micromix

        if self.folder is None:
            return decide()
        path = self.folder / _RECIPE
        if path.is_file():
            return micromix.Recipe.load(path)
        recipe = decide()
        self.claim()
        recipe.save(path)
        return recipe


def _read(path: Path) -> dict[str, Any]:
    """Raises UsageError for a file that is damaged."""
    try:
        found = parse_json(path.read_bytes(), str(path))
        check(found, MAPPING, str(path))
    except FieldError as error:
        raise UsageError(f"--resume must be a new directory or one of an evaluation before: {error}") from error
    settings: dict[str, Any] = found
    return settings


def _check_same(folder: Path, before: dict[str, Any], now: dict[str, Any]) -> None:
    for name in sorted({*before, *now}):
        old, new = before.get(name), now.get(name)
        if old != new:
            raise UsageError(f"--resume {folder} holds an evaluation with another {name}: {old!r}, not {new!r}")


def fingerprint(path: Path | str) -> str:
    """Of a recipe's content; of a checkpoint's file names, sizes and times. Empty for the default model."""
    if path == zoo.DEFAULT_MODEL:
        return ""
    place = Path(path).expanduser()
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    found = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(place.glob("*"))]
    return hashlib.sha256(repr(found).encode()).hexdigest()

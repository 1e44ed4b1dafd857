"""Whether what a command writes can be written, asked before anything slow runs."""

from __future__ import annotations

import itertools
import os
import stat
import tempfile
from typing import TYPE_CHECKING

from micromix_compile import files
from micromix_compile.cli.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


def check_output(option: str, path: Path, *, is_file: bool) -> None:
    """Raises UsageError unless `path` can be written, its parents being made if need be; writes nothing that stays."""
    if is_file and path.is_dir():
        raise UsageError(f"{option} must be a file, and {path} is a directory")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode) and is_file:  # a device or a pipe is written to as it is
        if not os.access(path, os.W_OK):
            raise UsageError(f"{option} must be a path that can be written to, got {path}")
        return
    nearest = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    try:
        with tempfile.TemporaryDirectory(prefix=".micromix-", dir=nearest):
            pass  # os.access says yes to root where the file system says no
    except OSError as error:
        raise UsageError(f"{option} must be a path that can be written to, got {path}: {error.strerror}") from error


def check_file(option: str, path: Path, kind: str, is_one: Callable[[Path], bool]) -> None:
    """Raises UsageError unless a file can be written to `path`, and what stands there is empty or one of the same kind.

    kind: several of them, for people.
    """
    check_output(option, path, is_file=True)
    if path.is_file() and path.stat().st_size and not is_one(path):
        raise UsageError(f"{option} replaces {kind} only, and {path} is something else")


def check_beside(option: str, path: Path, other: str, other_path: Path) -> None:
    """Raises UsageError if one of two paths that are written is the other or in it."""
    for inner, outer in itertools.permutations((path.resolve(), other_path.resolve())):
        if inner.is_relative_to(outer):
            raise UsageError(f"{option} and {other} must stand side by side, got {path} and {other_path}")


def check_directory(option: str, path: Path, *, overwrite: bool, made_from: Path | None, copied: bool = False) -> None:
    """Raises UsageError unless a packed checkpoint can be written to `path`.

    To be asked again before what stands there is replaced. overwrite: whether it may be. made_from: a file or a
    directory that is read and must outlive it. copied: it is a checkpoint whose twin is written, with the files in it.
    """
    from micromix_compile.integrations.overwriting import why_kept

    target = files.plain_path(path)
    if os.path.lexists(target):
        if not overwrite:
            raise UsageError(f"{path} exists; --overwrite replaces it")
        if made_from is not None and made_from.resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{option} must not hold what it is made from, {made_from}, got {path}")
        if (fact := why_kept(target, copied_from=made_from if copied else None, twins=copied)) is not None:
            raise UsageError(f"--overwrite replaces packed checkpoints and empty directories, and {target} {fact}")
    check_output(option, path, is_file=False)

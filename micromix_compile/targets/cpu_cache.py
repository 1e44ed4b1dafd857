"""Compiled libraries on disk: a file is loaded only if it is whole, ours, and nobody else can write to it.

A library is code of this process: a truncated one would kill it (SIGBUS), a foreign one could do anything. Its digest
is in its name, so one rename publishes both.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
import stat
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

logger = logging.getLogger(__name__)

_READABLE: Final = 0o755  # what root built serves other users, too
_WRITABLE_BY_OTHERS: Final = stat.S_IWGRP | stat.S_IWOTH
_BUILD: Final = "build-"
_ABANDONED: Final = 3600.0  # seconds; a build has `cpu._BUILD_TIMEOUT` for its slowest part


def find(folder: Path, stem: str, made_by: str) -> Path | None:
    """A library that is whole and ours, or None. What is neither is said in the log. made_by: "*" for any compiler."""
    _make_private(folder)
    for path in sorted(folder.glob(f"{stem}-{made_by}-*.so")):
        reason = why_not(path)
        if reason is None:
            return path
        logger.warning("%s is not loaded: %s", path, reason)
    return None


def reasons(folder: Path, stem: str) -> str:
    """Why the libraries that are there are not loaded, as the end of a message."""
    return "".join(f"; {path} is not loaded: {why_not(path)}" for path in sorted(folder.glob(f"{stem}-*.so")))


def why_not(path: Path) -> str | None:
    """Why a library must not be loaded, or can't be; None if it may be."""
    try:
        reason = _why_not_ours(path.parent) or _why_not_ours(path)
        if reason is not None:
            return reason
        if not stat.S_ISREG(path.lstat().st_mode):
            return f"{path} is no file"
        if not path.stem.endswith(f"-{_digest(path)}"):
            return f"its content ({path.stat().st_size} bytes) is not what was compiled"
    except OSError as error:
        return f"it can't be read: {error}"
    return None


def _why_not_ours(place: Path) -> str | None:
    found = place.lstat()
    if found.st_uid not in (os.getuid(), 0):
        return (
            f"{place} belongs to user {found.st_uid}, not to {os.getuid()} or root (XDG_CACHE_HOME sets another place)"
        )
    if found.st_mode & _WRITABLE_BY_OTHERS and not stat.S_ISLNK(found.st_mode):
        return f"{place} can be written by other users (mode {stat.S_IMODE(found.st_mode):o})"
    return None


def _make_private(folder: Path) -> None:
    """Where the user's umask lets a group write, take that away: other users' files in it are refused anyway."""
    if folder.is_dir() and folder.stat().st_uid == os.getuid():
        mode = stat.S_IMODE(folder.stat().st_mode)
        if mode & _WRITABLE_BY_OTHERS:
            folder.chmod(mode & ~_WRITABLE_BY_OTHERS)


def keep(library: Path, folder: Path, stem: str) -> Path:
    """Move a library to its name, from a folder on the same file system. Damaged ones of that name are removed."""
    library.chmod(_READABLE)
    target = folder / f"{stem}-{_digest(library)}.so"
    for path in folder.glob(f"{stem}-*.so"):
        if why_not(path) is not None:
            path.unlink(missing_ok=True)
    library.rename(target)
    return target


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A directory to build in; those that killed builds left are removed. Raises OSError if the folder is not ours."""
    folder.mkdir(parents=True, exist_ok=True)
    _make_private(folder)
    if (reason := _why_not_ours(folder)) is not None:
        raise PermissionError(reason)
    for path in folder.glob(f"{_BUILD}*"):
        with contextlib.suppress(OSError):  # another process may remove it, too
            if time.time() - path.stat().st_mtime > _ABANDONED:
                shutil.rmtree(path)
    with tempfile.TemporaryDirectory(dir=folder, prefix=_BUILD) as directory:
        yield Path(directory)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:32]

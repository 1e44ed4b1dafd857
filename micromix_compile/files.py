"""Writing files and directories so that a failure leaves what was there."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a new file beside `path`, then rename it over `path`.

    A device, a pipe or a socket is no file that could be replaced: it is written to. A link stays, and what it names is
    replaced.
    """
    if path.exists() and not stat.S_ISREG(path.stat().st_mode):
        with path.open("wb") as device:
            device.write(content)
        return
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name[:100]}.{secrets.token_hex(8)}"
    # The system applies the umask to 0o666 itself; reading the umask would change it for all threads.
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def plain_path(path: Path) -> Path:
    """`path`, absolute and without `..`: it keeps its meaning while the last directory in it is renamed.

    Links among its parents are followed, because `link/..` is the parent of what the link names. The last part may be
    a link still.
    """
    if path.name in ("", ".."):
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent)) / path.name


def is_in_use(directory: Path) -> bool:
    """Whether the program runs in `directory`, a `plain_path`, or below, or a home is there."""
    return any(place.is_relative_to(directory) for place in (Path.cwd(), Path.home().resolve()))


@contextlib.contextmanager
def replace_directory(target: Path) -> Iterator[Path]:
    """A temporary directory beside `target` that takes its place when the block succeeds.

    If the block raises, `target` stays as it was. If another process was first, its directory is replaced. The old
    directory is removed only when the new one has its place: whatever interrupts this, one of them stays, at worst
    under a hidden name beside `target`.
    """
    target = plain_path(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as scratch:
        fresh, old = Path(scratch) / "new", Path(f"{scratch}-old")
        fresh.mkdir()
        yield fresh
        try:
            if os.path.lexists(target):  # a link to nowhere, too
                target.rename(old)
            fresh.rename(target)
        finally:
            if os.path.lexists(old):
                old.rename(Path(scratch) / "old" if os.path.lexists(target) else target)

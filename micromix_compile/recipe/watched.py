"""A recipe that is given by its path, and known by what the file holds."""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(slots=True, eq=False)
class RecipeFile:
    """A recipe given by its path, and known by its content: a file that is written anew is another recipe."""

    path: Path
    _stamp: tuple[int, ...] = ()
    _digest: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the file as it is now; of a file that can't be read any more, as it was."""
        with contextlib.suppress(OSError):
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
                self._stamp = stamp
        return self._digest


@cache
def watched_file(path: Path) -> RecipeFile:
    """The one that stands for `path`, absolute, in this process."""
    return RecipeFile(path)

"""Whether what a command writes can be written, asked before anything slow runs."""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import is_packed


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


def check_replaceable(target: Path) -> None:
    """Raises UsageError unless `target`, a `files.plain_path`, is a packed checkpoint or an empty directory.

    What is in use is no such directory even so: where the program runs or a home, what these are in, a git checkout.
    """
    here = (Path.cwd(), Path.home().resolve())
    if target.is_symlink() or not target.is_dir():
        fact = "is not a directory" if not target.is_symlink() else "is a link"
    elif any(target == place or target in place.parents for place in here):
        fact = "holds the current directory or a home"
    elif (target / ".git").exists():
        fact = "is a git checkout"
    elif any(target.iterdir()) and not is_packed(str(target)):
        fact = "holds no packed checkpoint"
    else:
        return
    raise UsageError(f"--overwrite replaces packed checkpoints and empty directories, and {target} {fact}")

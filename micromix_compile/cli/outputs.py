"""Whether what a command writes can be written, asked before anything slow runs."""

from __future__ import annotations

import filecmp
import fnmatch
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from micromix_compile import files
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import is_packed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PARTS: Final = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("tiktoken.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""The files of a packed checkpoint: what transformers saves of a causal language model and its tokenizer."""


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


def check_directory(option: str, path: Path, *, overwrite: bool, made_from: Path | None, copied: bool = False) -> None:
    """Raises UsageError unless a packed checkpoint, or its twin, can be written to `path`.

    To be asked again before what stands there is replaced. overwrite: whether it may be. made_from: a file or a
    directory that is read and must outlive it. copied: the files in it stand in what is written, too.
    """
    target = files.plain_path(path)
    if os.path.lexists(target):
        if not overwrite:
            raise UsageError(f"{path} exists; --overwrite replaces it")
        if made_from is not None and made_from.resolve().is_relative_to(target.resolve()):
            raise UsageError(f"{option} must not hold what it is made from, {made_from}, got {path}")
        _check_replaceable(target, made_from if copied else None)
    check_output(option, path, is_file=False)


def _check_replaceable(target: Path, copied_from: Path | None) -> None:
    """Raises UsageError unless `target`, a `files.plain_path`, is a packed checkpoint or an empty directory.

    What is in use is no such directory even so: where the program runs or a home, what these are in, a git checkout.
    Nor is one that holds files of somebody else, unless `copied_from` has them, too.
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
    elif (file := next(_of_others(target, copied_from), None)) is not None:
        fact = f"holds {file}, which is no part of one"
    else:
        return
    raise UsageError(f"--overwrite replaces packed checkpoints and empty directories, and {target} {fact}")


def _of_others(target: Path, copied_from: Path | None) -> Iterator[Path]:
    """The files below `target` that no packed checkpoint has, but those that `copied_from` has with the same bytes."""
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target)
        is_directory = path.is_dir() and not path.is_symlink()  # what is in it comes, too
        if is_directory or any(fnmatch.fnmatchcase(name.as_posix(), part) for part in _PARTS):
            continue
        twin = None if copied_from is None else copied_from / name
        if twin is None or not (path.is_file() and twin.is_file() and filecmp.cmp(path, twin, shallow=False)):
            yield name

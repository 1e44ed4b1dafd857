"""Which directories a checkpoint may take the place of."""

from __future__ import annotations

import filecmp
import fnmatch
from typing import TYPE_CHECKING, Final

from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from micromix_compile import files
from micromix_compile.integrations import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

_PARTS: Final = (
    *("config.json", "generation_config.json"),
    *("model.safetensors", "model-?????-of-?????.safetensors", "model.safetensors.index.json"),
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.json", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "additional_chat_templates/*.jinja"),
    *("tokenizer.model", "spiece.model", "spm.model", "sentencepiece.model", "sentencepiece.bpe.model"),
    *("tiktoken.model", "vocab.json", "vocab.txt", "merges.txt"),
)
"""The files of a checkpoint: what transformers saves of a causal language model and its tokenizer."""

TWINS: Final = "compressed-tensors"
"""Who quantized what `convert` makes of a packed checkpoint."""


def why_kept(target: Path, *, copied_from: Path | None = None, twins: bool = False) -> str | None:
    """Why `target` may not be replaced, for people; None for a packed checkpoint or an empty directory.

    target: a `files.plain_path` of something that exists. What is in use is no such directory even so: where the
    program runs or a home, what these are in, a git checkout. Nor is one that holds files of somebody else, unless
    `copied_from` has them with the same bytes. twins: compressed-tensors' checkpoints may be replaced, too.
    """
    if target.is_symlink() or not target.is_dir():
        return "is not a directory" if not target.is_symlink() else "is a link"
    if files.is_in_use(target):
        return "holds the current directory or a home"
    if (target / ".git").exists():
        return "is a git checkout"
    if any(target.iterdir()) and not _is_quantized(target, twins=twins):
        return "holds no packed checkpoint"
    file = next(_of_others(target, copied_from), None)
    if file is None:
        return None
    return f"holds {file}, which is no part of one" + (f" and not that of {copied_from}" if copied_from else "")


def _is_quantized(directory: Path, *, twins: bool) -> bool:
    try:
        config = checkpoint.read_config(directory / "config.json")
    except (FileNotFoundError, ValueError):
        return False
    method = (config.get("quantization_config") or {}).get("quant_method")
    return checkpoint.is_ours(config) or (twins and method == TWINS)


def _of_others(target: Path, copied_from: Path | None) -> Iterator[Path]:
    """The files below `target` that no packed checkpoint has, but those that `copied_from` has with the same bytes."""
    parts = (*_PARTS, *_tokenizer_files(target))
    for path in sorted(target.rglob("*")):
        name = path.relative_to(target)
        is_directory = path.is_dir() and not path.is_symlink()  # what is in it comes, too
        if is_directory or any(fnmatch.fnmatchcase(name.as_posix(), part) for part in parts):
            continue
        twin = None if copied_from is None else copied_from / name
        if twin is None or not (path.is_file() and twin.is_file() and filecmp.cmp(path, twin, shallow=False)):
            yield name


def _tokenizer_files(target: Path) -> Iterable[str]:
    """What the class of the checkpoint's tokenizer saves besides."""
    try:
        name = checkpoint.read_config(target / "tokenizer_config.json").get("tokenizer_class")
    except (FileNotFoundError, ValueError):
        return ()
    found = tokenizer_class_from_name(name) if isinstance(name, str) else None
    return getattr(found, "vocab_files_names", {}).values()

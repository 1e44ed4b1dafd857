"""`convert`: checkpoints that others quantized to MX become packed ones, and packed ones compressed-tensors'.

    micromix.convert("Llama-MXFP4", "Llama-packed")
    model = AutoModelForCausalLM.from_pretrained("Llama-packed")

or, without a directory that stays, `model = micromix.load_converted("Llama-MXFP4")`. A plain `from_pretrained` of such
a checkpoint stays transformers' own, by the library that made it: who imports this package may want that, too.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from transformers import AutoModelForCausalLM

from micromix_compile import files
from micromix_compile.integrations import checkpoint
from micromix_compile.integrations.from_others import ACTIVATIONS, write_packed
from micromix_compile.integrations.overwriting import why_kept
from micromix_compile.integrations.to_compressed_tensors import write_compressed_tensors

if TYPE_CHECKING:
    from collections.abc import Callable

_NOT_COPIED: Final = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx")
_OWN_FILES: Final = ("config.json", "hf_quant_config.json")


def convert(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    activations: str | None = None,
    before_replacing: Callable[[], None] = lambda: None,
) -> str:
    """Write the twin of a checkpoint, with exactly its weights, into `destination`. Returns what was done, for people.

    source: has config.json and safetensors files. If compressed-tensors (MXFP4, MXFP6, MXFP8) or ModelOpt
    (MXFP8) quantized it, its twin is a packed checkpoint. If it is a packed one whose linears have one format each and
    the model's order of channels, its twin is compressed-tensors'. destination: a packed checkpoint, its twin
    or an empty directory there is replaced, once all is written and `before_replacing` returned; files in it that
    neither a checkpoint nor `source` has are an error. activations: "same" as their weight, "fp8",
    "mxfp6" (see `MicroMixConfig`), or "mxfp8", instead of what a checkpoint of others says of them.

    Raises FileNotFoundError, or ValueError that names the file or the tensor, what it is and what is read; then
    `destination` is as it was.
    """
    start, end = Path(source), Path(destination)
    if activations not in (None, *ACTIVATIONS):
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    if start.resolve().is_relative_to(end.resolve()):
        raise ValueError(f"destination must not be source or hold it, got {end} for {start}")
    packed = checkpoint.is_ours(checkpoint.read_config(start / "config.json"))
    if packed and activations is not None:
        raise ValueError(f"activations must not be given for a packed checkpoint, which {start} is")
    target = files.plain_path(end)
    if os.path.lexists(target) and (fact := why_kept(target, copied_from=start, twins=True)) is not None:
        raise ValueError(f"destination must be new, a packed checkpoint or an empty directory, and {target} {fact}")
    with files.replace_directory(end) as fresh:
        text = write_compressed_tensors(start, fresh) if packed else write_packed(start, fresh, activations).text
        _copy_others(start, fresh)
        before_replacing()
    return text


def load_converted(source: str | os.PathLike[str], *, activations: str | None = None, **options: Any) -> Any:
    """The causal language model of a checkpoint that others quantized to MX, packed; see `convert`.

    options: of `AutoModelForCausalLM.from_pretrained`. The packed checkpoint is written beside other temporary files,
    and removed again. Raises as `convert` does, and ValueError for a checkpoint that is packed already.
    """
    if checkpoint.is_ours(checkpoint.read_config(Path(source) / "config.json")):
        raise ValueError(f"{source} is packed already: AutoModelForCausalLM.from_pretrained loads it")
    with tempfile.TemporaryDirectory(prefix="micromix-") as scratch:
        packed = Path(scratch) / "packed"
        convert(source, packed, activations=activations)
        model = AutoModelForCausalLM.from_pretrained(packed, **options)
    model.name_or_path = model.config._name_or_path = str(source)
    return model


def _copy_others(source: Path, target: Path) -> None:
    """What a checkpoint has beside weights and config: tokenizer, generation config and the like."""
    for path in source.iterdir():
        is_own = path.name in _OWN_FILES or path.suffix in _NOT_COPIED or ".safetensors.index" in path.name
        if path.is_file() and not is_own:
            shutil.copyfile(path, target / path.name)

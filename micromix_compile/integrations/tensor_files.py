"""The safetensors files of a checkpoint as one mapping from names to tensors, read one by one; and writing such."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from micromix_compile.integrations.checkpoint import index_files, read_index, weight_files
from micromix_compile.recipe.schema import named

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from torch import Tensor

INDEX: Final = "model.safetensors.index.json"
FLOATS: Final = ("F64", "F32", "F16", "BF16")
"""As safetensors calls dtypes."""


class TensorFiles:
    """The tensors that transformers would load from a directory. Opens all files, reads nothing else yet.

    Raises FileNotFoundError, or ValueError that names the file, for files that are missing or damaged, for a name that
    is in two of them, and for an index that says otherwise than they do.
    """

    def __init__(self, directory: Path) -> None:
        self.paths = weight_files(directory)
        self._files: dict[str, Any] = {}
        self.described: dict[str, tuple[str, tuple[int, ...]]] = {}
        self.names_in: list[list[str]] = []
        for path in self.paths:
            self.names_in.append(self._open(path))
        for index in index_files(directory):
            self._check_index(index)

    def _open(self, path: Path) -> list[str]:
        try:
            file: Any = safe_open(path, framework="pt")
            names = list(file.keys())
            for name in names:
                if name in self._files:
                    raise ValueError(f"{path}: tensor {named(name)} is in another file, too")
                part = file.get_slice(name)
                self.described[name] = (part.get_dtype(), tuple(part.get_shape()))
                self._files[name] = file
        except SafetensorError as error:
            raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
        return names

    def _check_index(self, index: Path) -> None:
        places = {name: path.name for path, names in zip(self.paths, self.names_in, strict=True) for name in names}
        said = read_index(index)
        for name in sorted(set(said) | set(places)):
            if said.get(name) != places.get(name):
                raise ValueError(
                    f"{index}: tensor {named(name)} must be in {places.get(name)}, where it is, got {said.get(name)}"
                )

    def read(self, name: str) -> Tensor:
        """A tensor."""
        tensor: Tensor = self._files[name].get_tensor(name)
        return tensor


def write_tensors(directory: Path, shards: Iterable[dict[str, Tensor]], count: int) -> None:
    """Write `count` files as transformers names them, and an index if they are more than one. Holds a shard a time."""
    weight_map: dict[str, str] = {}
    total = 0
    for number, (name, tensors) in enumerate(_named(shards, count), 1):
        assert number <= count, "as many shards as were announced"
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, directory / name, {"format": "pt"})
        weight_map |= dict.fromkeys(tensors, name)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def _named(shards: Iterable[dict[str, Tensor]], count: int) -> Iterator[tuple[str, dict[str, Tensor]]]:
    for number, tensors in enumerate(shards, 1):
        yield "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors", tensors

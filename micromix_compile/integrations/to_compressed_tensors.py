"""Packed checkpoints whose linears have one format each and the model's order, as compressed-tensors writes such."""

from __future__ import annotations

import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch

from micromix_compile.config import MicroMixConfig
from micromix_compile.integrations import checkpoint
from micromix_compile.integrations.hf import MicroMixQuantizationConfig
from micromix_compile.integrations.mx_bytes import FP6, THEIR_FORMATS, packed_to
from micromix_compile.integrations.schemes import READ_FORMATS
from micromix_compile.integrations.tensor_files import TensorFiles, write_tensors
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import PackedWeight

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

_PARTS: Final = ("weight_q4", "weight_q6", "weight_q8", "weight")
_ORDER: Final = "order.channel_perm"


def write_compressed_tensors(source: Path, target: Path) -> str:
    """Write the twin of a packed checkpoint into `target`, an empty directory. Returns what was done, for people.

    Activations in MX are said to be so; others have no name there, and the checkpoint is weight-only. Raises ValueError
    that names the file or the linear that has no twin, and why.
    """
    config = checkpoint.read_config(source / "config.json")
    files = TensorFiles(source)
    checkpoint.verify(files.paths)
    try:
        fields = MicroMixQuantizationConfig(**config["quantization_config"])
        if fields.schema_version != checkpoint.SCHEMA_VERSION:
            was = f"schema_version must be {checkpoint.SCHEMA_VERSION}, got {fields.schema_version}"
            raise ValueError(f"{was}: load the checkpoint and save it")
        ours = MicroMixConfig.from_file(fields.config)
        formats = {name: _formats(name, described, ours, files) for name, described in fields.linears.items()}
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    write_tensors(target, _shards(files, formats), len(files.paths))
    config["quantization_config"] = _described(formats, with_activations=ours.activations == "same")
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    counts = ", ".join(f"{n} {form}" for form, n in sorted(Counter(form for form, _ in formats.values()).items()))
    others = ", ".join(sorted({one for form, one in formats.values() if form != one}))
    used = f"{others} where not like their weights" if others else "like their weights"
    said = used if ours.activations == "same" else f"not said, for {ours.activations} has no name there"
    return f"{len(formats)} linears as compressed-tensors, {counts}; activations {said}"


def _formats(name: str, described: Mapping[str, Any], config: MicroMixConfig, files: TensorFiles) -> tuple[str, str]:
    """Of the weight of a linear and of its activations, of `THEIR_FORMATS`.

    Raises ValueError if compressed-tensors has no such linear.
    """
    if "experts" in described:
        raise ValueError(f"{name}: packed experts, one Parameter of the model, are not written")
    split = described["split"]
    used = [form for form, k in zip(THEIR_FORMATS, split, strict=True) if k]
    if len(used) != 1:
        raise ValueError(f"{name}.split must be of one format, got {split}: compressed-tensors has no mixed linears")
    if config.weights == "mxfp4" and used == ["mxfp6"]:
        raise ValueError(f"{name}: its weight is mxfp4 and its activations are {used[0]}: that is not written")
    if used == ["mxfp6"] and config.fp6 != FP6:
        raise ValueError(f"{name}: compressed-tensors' MXFP6 is {FP6}, and the checkpoint's {config.fp6}")
    if described.get("rotated", 0):
        raise ValueError(f"{name}: {described['rotated']} of its channels are rotated, which compressed-tensors is not")
    channels = described["in_features"]
    order = files.read(f"{name}.{_ORDER}")
    if channels % BLOCK_SIZE or not torch.equal(order, torch.arange(channels, dtype=order.dtype)):
        raise ValueError(f"{name}: its channels must be in the model's order, in whole blocks of {BLOCK_SIZE}")
    return "mxfp4" if config.weights == "mxfp4" else used[0], used[0]


def _shards(files: TensorFiles, formats: Mapping[str, tuple[str, str]]) -> Iterator[dict[str, Tensor]]:
    """The tensors of compressed-tensors' checkpoint, file by file: those of a linear where its scales were."""
    scales = {f"{name}.{_PARTS[-1]}": name for name in formats}
    others = {f"{name}.{part}" for name in formats for part in (*_PARTS[:-1], _ORDER)}
    for names in files.names_in:
        shard: dict[str, Tensor] = {}
        for name in names:
            if name in scales:
                fqn = scales[name]
                packed = PackedWeight(*(files.read(f"{fqn}.{part}") for part in _PARTS))
                shard |= {f"{fqn}.{part}": tensor for part, tensor in packed_to(packed, formats[fqn][0]).items()}
            elif name not in others:
                shard[name] = files.read(name)
        yield shard


def _described(formats: Mapping[str, tuple[str, str]], *, with_activations: bool) -> dict[str, Any]:
    """The quantization_config: a group for what is alike, whose targets are names, so that nothing else is meant."""
    of_ours = {ours: theirs for theirs, ours in READ_FORMATS.items()}
    groups = {}
    for number, (form, activations) in enumerate(sorted(set(formats.values()))):
        rounded = _arguments(THEIR_FORMATS[activations].bits, dynamic=True)
        groups[f"group_{number}"] = {
            "format": of_ours[form],
            "input_activations": rounded if with_activations else None,
            "output_activations": None,
            "targets": [name for name, one in formats.items() if one == (form, activations)],
            "weights": _arguments(THEIR_FORMATS[form].bits, dynamic=False),
        }
    used = [group["format"] for group in groups.values()]
    return {
        "config_groups": groups,
        "format": used[0] if len(set(used)) == 1 else "mixed-precision",
        "global_compression_ratio": None,
        "ignore": [],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _arguments(bits: int, *, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "float",
        "strategy": "group",
        "group_size": BLOCK_SIZE,
        "symmetric": True,
        "dynamic": dynamic,
        "scale_dtype": "torch.uint8",
    }

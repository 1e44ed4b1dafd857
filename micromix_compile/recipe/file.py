"""The file of a recipe: safetensors for orders and statistics, readable JSON metadata, a SHA-256 digest for every part.

What is read is checked twice: by the digests, against damage, and by itself, since anyone can make a digest. A file
that passes is a recipe that calibration could have written.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from micromix_compile.config import MicroMixConfig
from micromix_compile.files import write_atomically
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import PackedWeight, packed_shapes, weight_split
from micromix_compile.recipe.fingerprint import SAMPLE_SIZE, Checksums
from micromix_compile.recipe.orders import SHARDS, check_order, shards_of
from micromix_compile.recipe.schema import (
    BOOLEAN,
    MAPPING,
    NAME,
    NUMBER,
    OPTIONAL_BOOLEAN,
    STRING,
    Each,
    FieldError,
    OrNull,
    Rule,
    check,
    integer,
    named,
    parse_json,
    shown,
)
from micromix_compile.recipe.types import (
    COST_FORMATS,
    ChannelCosts,
    ChannelStatistics,
    GroupRecipe,
    LinearRecipe,
    Recipe,
    Threshold,
)

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

FORMAT: Final = "micromix-recipe"
SCHEMA_VERSION: Final = 2

_CHECKSUM: Final = Rule(  # of `fingerprint`
    "a signed integer of 64 bits",
    lambda value: isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63,
)
_GROUP: Final = {
    "name": NAME,
    "split": (integer(0), integer(0), integer(0)),
    "rotated": integer(0, optional=True),  # files of before lack it
    "shards": SHARDS,
    "elements": integer(1),
    "tokens": integer(1),
    "batches": integer(1),
    "below": [(NUMBER, BOOLEAN, integer(0))],
    "costs_measured": OPTIONAL_BOOLEAN,
}
_CHECKSUMS: Final = {
    "made_in": Rule("float32, bfloat16 or float16", lambda value: value in ("float32", "bfloat16", "float16")),
    "values": dict.fromkeys(("float32", "bfloat16", "float16"), _CHECKSUM),
}
_LINEAR: Final = {
    "fqn": NAME,
    "group": NAME,
    "in_features": integer(1),
    "out_features": integer(1),
    "weight_checksums": OrNull(_CHECKSUMS),
    "expert_tokens": OrNull([integer(0)]),
    "runs": Rule("a finite number of 0 or more", lambda value: NUMBER.holds(value) and value >= 0),
}
_FIELDS: Final = {
    "format": Rule(repr(FORMAT), lambda value: value == FORMAT),
    "schema_version": Rule(str(SCHEMA_VERSION), lambda value: type(value) is int and value == SCHEMA_VERSION),
    "digests": Each(STRING),
    "model_id": STRING,
    "config": MAPPING,
    "groups": [_GROUP],
    "linears": [_LINEAR],
    "refused": Each(STRING),
    "left_alone": OrNull((integer(0), integer(0))),  # files of before lack it
}
"""In the order in which they are checked."""

_DTYPES: Final = {"I32": torch.int32, "F32": torch.float32, "U8": torch.uint8}
"""Those of a recipe's tensors, by safetensors' names."""


def write(recipe: Recipe, path: Path) -> None:
    """Write a recipe through a temporary file: a failure leaves an older file whole."""
    tensors, metadata = _to_file(recipe)
    write_atomically(path, serialize(tensors, metadata=metadata))


def read(path: Path) -> Recipe:
    """Read a recipe. Raises FileNotFoundError, or ValueError that names the path and the field that is wrong."""
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        metadata, tensors = _read_parts(path)
        fields = {name: parse_json(text, f"{named(name)}: metadata") for name, text in metadata.items()}
        _check_digests(fields, tensors)
        return _build(fields, tensors)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    except FieldError as error:
        raise ValueError(f"{path}: {error}") from error
    except RecursionError:
        raise ValueError(f"{path}: metadata is nested too deeply") from None


def is_recipe(path: Path) -> bool:
    """Whether a file says that it is a recipe, of whatever version, whole or damaged behind its head."""
    try:
        with safe_open(path, framework="pt") as file:
            return bool((file.metadata() or {}).get("format") == json.dumps(FORMAT))
    except SafetensorError:
        return False


def _read_parts(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Metadata and tensors; dtypes that no recipe has are refused before anything is made of them."""
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        for name in names:
            if (dtype := file.get_slice(name).get_dtype()) not in _DTYPES:
                raise FieldError(f"{named(name)} must be one of {', '.join(_DTYPES)}, got {dtype}")
        return file.metadata() or {}, {name: file.get_tensor(name) for name in names}


def _digest(content: object) -> str:
    if isinstance(content, Tensor):
        payload = content.contiguous().numpy().tobytes()
    else:
        payload = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(payload).hexdigest()


def _to_file(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    groups = [_group_to_file(group, tensors) for group in recipe.groups.values()]
    linears = [_linear_to_file(linear, recipe, tensors) for linear in recipe.linears.values()]
    fields: dict[str, Any] = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model_id": recipe.model_id,
        "config": recipe.config.to_file(),
        "groups": groups,
        "linears": linears,
        "refused": dict(recipe.refused),
        **({} if recipe.left_alone is None else {"left_alone": list(recipe.left_alone)}),
    }
    digests = {name: _digest(value) for name, value in (*fields.items(), *tensors.items())}
    return tensors, {name: json.dumps(value) for name, value in (*fields.items(), ("digests", digests))}


def _group_to_file(group: GroupRecipe, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Its JSON; its tensors are added to `tensors`."""
    stats = group.statistics
    tensors[f"{group.name}.channel_perm"] = group.channel_perm
    tensors[f"{group.name}.abs_mean"] = stats.abs_mean
    tensors[f"{group.name}.abs_max"] = stats.abs_max
    fields: dict[str, Any] = {
        "name": group.name,
        "split": list(group.split),
        "rotated": group.rotated,
        "elements": stats.elements,
        "tokens": stats.tokens,
        "batches": stats.batches,
        "below": [[t.ratio, t.signed, count] for t, count in stats.below.items()],
    }
    if group.shards:
        fields["shards"] = [list(split) for split in group.shards]
    if stats.costs is not None:
        tensors[f"{group.name}.activation_costs"] = stats.costs.activations
        tensors[f"{group.name}.weight_costs"] = stats.costs.weights
        for side in ("activations", "weights"):
            if (rotated := getattr(stats.costs, f"rotated_{side}")) is not None:
                tensors[f"{group.name}.rotated_{side.removesuffix('s')}_costs"] = rotated
        fields["costs_measured"] = stats.costs.measured
    return fields


def _linear_to_file(linear: LinearRecipe, recipe: Recipe, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Its JSON; its tensors are added to `tensors`."""
    tensors[f"{linear.fqn}.weight_sample"] = linear.weight_sample
    if linear.fqn in recipe.packed:
        packed = recipe.packed[linear.fqn]._asdict()
        tensors |= {f"{linear.fqn}.{name}": part.cpu() for name, part in packed.items()}
    return {
        "fqn": linear.fqn,
        "group": linear.group.name,
        "weight_checksums": None if linear.weight_checksums is None else linear.weight_checksums.to_json(),
        "in_features": linear.in_features,
        "out_features": linear.out_features,
        "expert_tokens": None if linear.expert_tokens is None else list(linear.expert_tokens),
        "runs": linear.runs,
    }


def _check_digests(fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name in ("format", "schema_version", "digests"):  # of another format, or version, nothing else is known
        if name not in fields:
            raise FieldError(f"{name} is missing")
        check(fields[name], _FIELDS[name], name)
    digests = fields["digests"]
    for name, digest in digests.items():
        if name not in fields and name not in tensors:
            raise FieldError(f"{named(name)} is missing")
        if _digest(fields[name] if name in fields else tensors[name]) != digest:
            raise FieldError(f"{named(name)} was changed after the recipe was written")
    unknown = sorted((set(fields) | set(tensors)) - set(digests) - {"digests"})
    if unknown:
        raise FieldError(f"{named(unknown[0])} is not part of the recipe that was written")


def _build(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Recipe:
    fields = _with_new_fields(fields)
    for name, wanted in _FIELDS.items():
        if name not in fields:
            raise FieldError(f"{name} is missing")
        check(fields[name], wanted, name)
    try:
        config = MicroMixConfig.from_file(fields["config"])
    except ValueError as error:
        raise FieldError(f"config: {error}") from error
    parts = _Parts(tensors)
    _check_unique("groups", [group["name"] for group in fields["groups"]])
    _check_unique("linears", [linear["fqn"] for linear in fields["linears"]])
    groups = {group["name"]: _group(group, parts) for group in fields["groups"]}
    linears = {linear["fqn"]: _linear(linear, groups, parts) for linear in fields["linears"]}
    packed = {fqn: _packed(linear, config, parts) for fqn, linear in linears.items() if f"{fqn}.w_scale" in tensors}
    lonely = set(groups) - {linear.group.name for linear in linears.values()}
    extra = sorted(set(fields) - set(_FIELDS) | lonely | parts.left)
    if extra:
        raise FieldError(f"{named(extra[0])} belongs to no linear of the recipe")
    return Recipe(
        config=config,
        model_id=fields["model_id"],
        linears=linears,
        refused=fields["refused"],
        packed=packed,
        left_alone=None if fields["left_alone"] is None else tuple(fields["left_alone"]),
    )


def _with_new_fields(fields: dict[str, Any]) -> dict[str, Any]:
    """What files of before lack, as it was meant in them."""
    linears = fields.get("linears")
    if isinstance(linears, list):
        new = {"expert_tokens": None, "runs": 1.0}
        fields = {**fields, "linears": [{**new, **one} if isinstance(one, dict) else one for one in linears]}
    return {"left_alone": None, **fields}


def _check_unique(place: str, names: list[str]) -> None:
    twice = sorted(name for name, count in Counter(names).items() if count > 1)
    if twice:
        raise FieldError(f"{place} has {named(twice[0])} twice")


class _Parts:
    """The tensors of a file, taken one by one. left: the names of those that nobody took."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors
        self.left = set(tensors)

    def take(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        """Raises `FieldError` if it is missing or of another dtype or shape; -1 in a shape is any size."""
        if name not in self._tensors:
            raise FieldError(f"{named(name)} is missing")
        tensor, wanted = self._tensors[name], str(dtype).removeprefix("torch.")
        same = tensor.dim() == len(shape) and all(b in (-1, a) for a, b in zip(tensor.shape, shape, strict=True))
        if tensor.dtype != dtype or not same:
            raise FieldError(f"{named(name)} must be {wanted} {shape}, got {tensor.dtype} {tuple(tensor.shape)}")
        self.left.discard(name)
        return tensor

    def take_sizes(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Float32 numbers of which none is negative or NaN."""
        tensor = self.take(name, torch.float32, shape)
        if not bool((tensor >= 0).all()):
            raise FieldError(f"{named(name)} must have no negative number and no NaN")
        return tensor


def _group(group: dict[str, Any], parts: _Parts) -> GroupRecipe:
    name, split = group["name"], tuple(group["split"])
    perm = parts.take(f"{name}.channel_perm", torch.int32, (-1,))
    if sum(split) != perm.numel() or any(k % BLOCK_SIZE for k in split):
        raise FieldError(
            f"groups.{named(name)}.split must be three multiples of 32 with sum {perm.numel()}, got {split}"
        )
    rotated = group.get("rotated", 0)
    if rotated % BLOCK_SIZE or rotated > perm.numel():
        raise FieldError(f"groups.{named(name)}.rotated must be a multiple of 32 up to {perm.numel()}, got {rotated}")
    channels = int((perm >= 0).sum())
    shards = shards_of(group, split, f"groups.{named(name)}")
    check_order(perm, channels, f"{name}.channel_perm", shards)
    if group["elements"] != group["tokens"] * channels:
        raise FieldError(
            f"groups.{named(name)}.elements must be {group['tokens']} tokens of {channels}, got {group['elements']}"
        )
    statistics = ChannelStatistics(
        abs_mean=parts.take_sizes(f"{name}.abs_mean", (channels,)),
        abs_max=parts.take_sizes(f"{name}.abs_max", (channels,)),
        elements=group["elements"],
        tokens=group["tokens"],
        batches=group["batches"],
        below=_below(group),
        costs=_costs(group, channels, parts),
    )
    return GroupRecipe(name=name, channel_perm=perm, split=split, rotated=rotated, statistics=statistics, shards=shards)


def _below(group: dict[str, Any]) -> dict[Threshold, int]:
    place = f"groups.{named(group['name'])}.below"
    counts = {Threshold(ratio=ratio, signed=signed): count for ratio, signed, count in group["below"]}
    if len(counts) != len(group["below"]) or any(count > group["elements"] for count in counts.values()):
        raise FieldError(f"{place} must have each threshold once, and no count above {group['elements']} elements")
    return counts


def _costs(group: dict[str, Any], channels: int, parts: _Parts) -> ChannelCosts | None:
    if "costs_measured" not in group:
        return None
    shape = (len(COST_FORMATS), channels)
    sides = [parts.take_sizes(f"{group['name']}.{side}_costs", shape) for side in ("activation", "weight")]
    rotated = [
        _rotated_costs(f"{group['name']}.rotated_{side}_costs", channels, parts) for side in ("activation", "weight")
    ]
    return ChannelCosts(
        activations=sides[0],
        weights=sides[1],
        measured=group["costs_measured"],
        rotated_activations=rotated[0],
        rotated_weights=rotated[1],
    )


def _rotated_costs(name: str, channels: int, parts: _Parts) -> Tensor | None:
    """None in files of before."""
    return parts.take_sizes(name, (len(COST_FORMATS), channels)) if name in parts.left else None


def _linear(linear: dict[str, Any], groups: Mapping[str, GroupRecipe], parts: _Parts) -> LinearRecipe:
    fqn, group = linear["fqn"], groups.get(linear["group"])
    if group is None:
        raise FieldError(f"linears.{named(fqn)}.group must name a group, got {shown(linear['group'])}")
    channels = group.statistics.abs_mean.numel()
    if linear["in_features"] != channels:
        raise FieldError(
            f"linears.{named(fqn)}.in_features must be its group's {channels}, got {linear['in_features']}"
        )
    sums, expert_tokens = linear["weight_checksums"], linear["expert_tokens"]
    return LinearRecipe(
        fqn=fqn,
        in_features=linear["in_features"],
        out_features=linear["out_features"],
        group=group,
        weight_sample=parts.take(f"{fqn}.weight_sample", torch.float32, (SAMPLE_SIZE,)),
        weight_checksums=None if sums is None else Checksums(**sums),
        expert_tokens=None if expert_tokens is None else tuple(expert_tokens),
        runs=linear["runs"],
    )


def _packed(linear: LinearRecipe, config: MicroMixConfig, parts: _Parts) -> PackedWeight:
    shapes = packed_shapes(linear.out_features, weight_split(linear.split, config.weights), linear.experts)
    names = PackedWeight._fields
    return PackedWeight(*(parts.take(f"{linear.fqn}.{n}", torch.uint8, s) for n, s in zip(names, shapes, strict=True)))

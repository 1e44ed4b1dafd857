"""What calibration decided, and the file that keeps it.

A recipe maps linear layers to the order and split of their input channels. Linears that read the same activation form a
group: one order, one split, one set of statistics. The file is safetensors: tensors for orders and statistics, readable
JSON metadata for the rest, and a SHA-256 digest for every part.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as serialize
from torch import Tensor

from micromix_compile.config import MicroMixConfig
from micromix_compile.fingerprint import Checksums
from micromix_compile.formats import BLOCK_SIZE, elem_format

if TYPE_CHECKING:
    from collections.abc import Mapping

FORMAT: Final = "micromix-recipe"
SCHEMA_VERSION: Final = 2

Split = tuple[int, int, int]

COST_FORMATS: Final = ("e2m1", "e2m3", "e3m2", "e4m3")
"""Element formats in the order of `ChannelCosts`."""


class PackedWeight(NamedTuple):
    """A quantized (N, C) weight: w4 (N, k4 // 2), w6 (3, N, k6 // 4), w8 (N, k8), w_scale (N, K // 32), uint8."""

    w4: Tensor
    w6: Tensor
    w8: Tensor
    w_scale: Tensor


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelCosts:
    """What each channel costs in each of `COST_FORMATS`: predicted divergence of the model's output, nats a token.

    activations, weights: (4, C) float32, of rounding the one and the other; the divergence adds over both and over all
    channels of a model. measured: from gradients of the output; otherwise from the error of each linear relative to its
    own output, which is comparable inside a linear and only roughly between them.
    """

    activations: Tensor
    weights: Tensor
    measured: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Threshold:
    """Elements with x < ratio * max|x of their row| are counted; |x| instead of x unless `signed`."""

    ratio: float
    signed: bool = False


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelStatistics:
    """What the observers saw of one activation with C channels.

    abs_mean: (C,) float32, the largest over samples of the mean |x|. abs_max: (C,) float32.
    elements, tokens, batches: how much was seen. below: per threshold, how many elements lay below it.
    costs: of each format, if the policy asks for them.
    """

    abs_mean: Tensor
    abs_max: Tensor
    elements: int
    tokens: int
    batches: int
    below: Mapping[Threshold, int]
    costs: ChannelCosts | None = None


def order_dtype(channels: int) -> torch.dtype:
    """Of an order where it is used: the smallest that holds it, for a GPU's quantizer reads it anew for every row."""
    return torch.int16 if channels <= torch.iinfo(torch.int16).max + 1 else torch.int32


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupRecipe:
    """Order and split of one activation, shared by the linears that read it.

    channel_perm: (K,) int32, K = C rounded up to a multiple of 32, -1 for the padding channels.
    split: (k4, k6, k8), sums to K.
    """

    name: str
    channel_perm: Tensor
    split: Split
    statistics: ChannelStatistics

    def order_on(self, device: torch.device) -> Tensor:
        """channel_perm on a device, as `order_dtype`."""
        return self.channel_perm.to(device, order_dtype(self.channel_perm.numel()))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearRecipe:
    """One linear layer of the recipe. For weight_sample, (32,) float32, and weight_checksums see `fingerprint`.

    There are checksums where the weight was rounded.
    """

    fqn: str
    in_features: int
    out_features: int
    group: GroupRecipe
    weight_sample: Tensor
    weight_checksums: Checksums | None = None

    @property
    def split(self) -> Split:
        """(k4, k6, k8) of its input channels."""
        return self.group.split

    @property
    def element_bits(self) -> float:
        """Bits per channel, averaged, without scales and padding's share of them."""
        return sum(bits * k for bits, k in zip((4, 6, 8), self.split, strict=True)) / sum(self.split)


def weight_split(split: Split, weights: str) -> Split:
    """The split of the weights that meet activations split so: the same, or all MXFP4."""
    return split if weights == "same" else (sum(split), 0, 0)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Recipe:
    """Calibration's result for one model.

    model_id: the model it was made for. linears: by fully qualified name. refused: name -> why it stays as it is.
    packed: fully qualified name -> weight, for configs that round weights while calibrating; else empty.
    left_alone: how many other parameters the model has, and their bytes, if it is known.
    """

    config: MicroMixConfig
    model_id: str
    linears: Mapping[str, LinearRecipe]
    refused: Mapping[str, str] = field(default_factory=dict)
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)
    left_alone: tuple[int, int] | None = None

    @property
    def groups(self) -> dict[str, GroupRecipe]:
        """The distinct groups by name, in the order of their first linear."""
        return {linear.group.name: linear.group for linear in self.linears.values()}

    @property
    def padded(self) -> dict[str, tuple[int, int]]:
        """Linears whose input channels are not whole blocks of 32: name -> (C, K); K - C channels are zero."""
        sizes = {fqn: (linear.in_features, sum(linear.split)) for fqn, linear in self.linears.items()}
        return {fqn: (channels, padded) for fqn, (channels, padded) in sizes.items() if channels != padded}

    @property
    def parameters(self) -> int:
        """Weights of all linears, without padding."""
        return sum(linear.in_features * linear.out_features for linear in self.linears.values())

    @property
    def element_bits(self) -> float:
        """Bits per channel, weighted by multiply-accumulates."""
        macs = sum(linear.element_bits * linear.in_features * linear.out_features for linear in self.linears.values())
        return macs / max(self.parameters, 1)

    @property
    def stored_bytes(self) -> int:
        """Bytes of all packed weights with scales, padding and the channel orders (4 bytes a channel and group)."""
        weights = sum(self.stored_bytes_of(linear) for linear in self.linears.values())
        return weights + sum(4 * sum(group.split) for group in self.groups.values())

    @property
    def stored_bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def model_parameters(self) -> int | None:
        """All parameters of the model, linears and others; None where that was not recorded."""
        return None if self.left_alone is None else self.parameters + self.left_alone[0]

    @property
    def model_bits(self) -> float | None:
        """Stored bits a parameter of the whole model, whose other parameters keep their dtype; None as above."""
        if self.left_alone is None:
            return None
        return 8 * (self.stored_bytes + self.left_alone[1]) / max(self.parameters + self.left_alone[0], 1)

    @property
    def bits_text(self) -> str:
        """The averages for people: of the linears, and of the whole model if that is known."""
        whole = "" if self.model_bits is None else f" ({self.model_bits:.2f} over all parameters of the model)"
        return f"{self.element_bits:.2f} element bits, {self.stored_bits:.2f} stored bits{whole}"

    def stored_bytes_of(self, linear: LinearRecipe) -> int:
        """Bytes of one linear's packed weight with scales and padding."""
        k4, k6, k8 = weight_split(linear.split, self.config.weights)
        row = k4 // 2 + k6 * elem_format(self.config.fp6).bits // 8 + k8 + (k4 + k6 + k8) // BLOCK_SIZE
        return linear.out_features * row

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to `path` through a temporary file: a failure leaves an older file whole."""
        tensors, metadata = _to_file(self)
        write_atomically(Path(path), serialize(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Raises FileNotFoundError, or ValueError that names the path and the field that is wrong."""
        return _from_file(Path(path))


def write_atomically(path: Path, content: bytes) -> None:
    """Write `content` to a temporary file beside `path`, then rename it over `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        Path(temporary).chmod(0o666 & ~_umask())  # as an ordinary open would have left it
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _digest(content: object) -> str:
    if isinstance(content, Tensor):
        payload = content.contiguous().numpy().tobytes()
    else:
        payload = json.dumps(content, sort_keys=True).encode()
    return hashlib.sha256(payload).hexdigest()


def _to_file(recipe: Recipe) -> tuple[dict[str, Tensor], dict[str, str]]:
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for group in recipe.groups.values():
        stats = group.statistics
        tensors[f"{group.name}.channel_perm"] = group.channel_perm
        tensors[f"{group.name}.abs_mean"] = stats.abs_mean
        tensors[f"{group.name}.abs_max"] = stats.abs_max
        below = [[t.ratio, t.signed, count] for t, count in stats.below.items()]
        seen: dict[str, Any] = {
            "elements": stats.elements,
            "tokens": stats.tokens,
            "batches": stats.batches,
            "below": below,
        }
        if stats.costs is not None:
            tensors[f"{group.name}.activation_costs"] = stats.costs.activations
            tensors[f"{group.name}.weight_costs"] = stats.costs.weights
            seen["costs_measured"] = stats.costs.measured
        groups.append({"name": group.name, "split": list(group.split), **seen})
    linears: list[dict[str, Any]] = []
    for linear in recipe.linears.values():
        tensors[f"{linear.fqn}.weight_sample"] = linear.weight_sample
        shape = {"in_features": linear.in_features, "out_features": linear.out_features}
        checksums = None if linear.weight_checksums is None else linear.weight_checksums.to_json()
        linears.append({"fqn": linear.fqn, "group": linear.group.name, "weight_checksums": checksums, **shape})
        if linear.fqn in recipe.packed:
            tensors |= {
                f"{linear.fqn}.{name}": part.cpu() for name, part in recipe.packed[linear.fqn]._asdict().items()
            }
    fields: dict[str, Any] = {
        "format": FORMAT,
        "schema_version": SCHEMA_VERSION,
        "model_id": recipe.model_id,
        "config": recipe.config.to_dict(),
        "groups": groups,
        "linears": linears,
        "refused": dict(recipe.refused),
        **({} if recipe.left_alone is None else {"left_alone": list(recipe.left_alone)}),
    }
    digests = {name: _digest(value) for name, value in (*fields.items(), *tensors.items())}
    return tensors, {name: json.dumps(value) for name, value in (*fields.items(), ("digests", digests))}


def _from_file(path: Path) -> Recipe:
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a whole safetensors file ({error})") from error
    try:
        return _check_and_build({name: json.loads(text) for name, text in metadata.items()}, tensors)
    except _BadFieldError as error:
        raise ValueError(f"{path}: {error}") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: metadata is not JSON ({error})") from error
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from error


class _BadFieldError(ValueError):
    """A field of a recipe file is missing or wrong."""


def _check_and_build(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Recipe:
    if fields.get("format") != FORMAT:
        raise _BadFieldError(f"format must be {FORMAT!r}, got {fields.get('format')!r}")
    if fields.get("schema_version") != SCHEMA_VERSION:
        raise _BadFieldError(f"schema_version must be {SCHEMA_VERSION}, got {fields.get('schema_version')!r}")
    digests = fields.get("digests")
    if not isinstance(digests, dict):
        raise _BadFieldError("digests is missing")
    for name, digest in digests.items():
        if name not in fields and name not in tensors:
            raise _BadFieldError(f"{name} is missing")
        if _digest(fields[name] if name in fields else tensors[name]) != digest:
            raise _BadFieldError(f"{name} was changed after the recipe was written")
    unknown = sorted((set(fields) | set(tensors)) - set(digests) - {"digests"})
    if unknown:
        raise _BadFieldError(f"{unknown[0]} is not part of the recipe that was written")
    groups = {group["name"]: _group(group, tensors) for group in fields["groups"]}
    linears = {
        linear["fqn"]: LinearRecipe(
            fqn=linear["fqn"],
            in_features=linear["in_features"],
            out_features=linear["out_features"],
            group=groups[linear["group"]],
            weight_sample=tensors[f"{linear['fqn']}.weight_sample"],
            weight_checksums=_checksums(linear),
        )
        for linear in fields["linears"]
    }
    try:
        config = MicroMixConfig.from_mapping(fields["config"])
    except (TypeError, ValueError) as error:
        raise _BadFieldError(f"config: {error}") from error
    packed = {fqn: _packed(linear, config, tensors) for fqn, linear in linears.items() if f"{fqn}.w_scale" in tensors}
    named = {"model_id": fields["model_id"], "refused": fields["refused"], "left_alone": _left_alone(fields)}
    return Recipe(config=config, linears=linears, packed=packed, **named)


def _left_alone(fields: dict[str, Any]) -> tuple[int, int] | None:
    """Files of before lack it."""
    if "left_alone" not in fields:
        return None
    numbers = fields["left_alone"]
    if (
        isinstance(numbers, list)
        and len(numbers) == 2
        and all(type(number) is int and number >= 0 for number in numbers)
    ):
        return numbers[0], numbers[1]
    raise _BadFieldError(f"left_alone must be two integers >= 0, parameters and bytes, got {fields['left_alone']!r}")


def _checksums(linear: dict[str, Any]) -> Checksums | None:
    fields = linear["weight_checksums"]
    try:
        return None if fields is None else Checksums.from_json(fields)
    except (TypeError, ValueError) as error:
        raise _BadFieldError(f"linears.{linear['fqn']}.weight_checksums: {error}") from error


def _packed(linear: LinearRecipe, config: MicroMixConfig, tensors: dict[str, Tensor]) -> PackedWeight:
    k4, k6, k8 = weight_split(linear.split, config.weights)
    n, channels = linear.out_features, k4 + k6 + k8
    shapes = ((n, k4 // 2), (3, n, k6 // 4), (n, k8), (n, channels // BLOCK_SIZE))
    packed = PackedWeight(*(tensors[f"{linear.fqn}.{name}"] for name in PackedWeight._fields))
    for name, part, shape in zip(PackedWeight._fields, packed, shapes, strict=True):
        if part.dtype != torch.uint8 or tuple(part.shape) != shape:
            raise _BadFieldError(f"{linear.fqn}.{name} must be uint8 {shape}, got {part.dtype} {tuple(part.shape)}")
    return packed


def _group(group: dict[str, Any], tensors: dict[str, Tensor]) -> GroupRecipe:
    name, perm = group["name"], tensors[f"{group['name']}.channel_perm"]
    split = tuple(group["split"])
    if len(split) != 3 or sum(split) != perm.numel() or any(k < 0 or k % BLOCK_SIZE for k in split):
        raise _BadFieldError(f"groups.{name}.split must be three multiples of 32 with sum {perm.numel()}, got {split}")
    statistics = ChannelStatistics(
        abs_mean=tensors[f"{name}.abs_mean"],
        abs_max=tensors[f"{name}.abs_max"],
        elements=group["elements"],
        tokens=group["tokens"],
        batches=group["batches"],
        below={Threshold(ratio=ratio, signed=signed): count for ratio, signed, count in group["below"]},
        costs=_costs(group, tensors),
    )
    return GroupRecipe(name=name, channel_perm=perm, split=split, statistics=statistics)


def _costs(group: dict[str, Any], tensors: dict[str, Tensor]) -> ChannelCosts | None:
    if "costs_measured" not in group:
        return None
    name, channels = group["name"], tensors[f"{group['name']}.abs_mean"].numel()
    activations, weights = (tensors[f"{name}.{side}_costs"] for side in ("activation", "weight"))
    for part in (activations, weights):
        if tuple(part.shape) != (len(COST_FORMATS), channels):
            raise _BadFieldError(f"costs of {name} must be {(len(COST_FORMATS), channels)}, got {tuple(part.shape)}")
    return ChannelCosts(activations=activations, weights=weights, measured=group["costs_measured"])

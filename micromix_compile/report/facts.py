"""What a report is about, from a recipe or a packed checkpoint: both say it in the same fields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch

from micromix_compile.calibration.costs import predicted_cost
from micromix_compile.config import MicroMixConfig
from micromix_compile.integrations import checkpoint
from micromix_compile.integrations.tensor_files import FLOATS, TensorFiles
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import row_bytes, segment_bits, weight_split
from micromix_compile.recipe.types import FEW_TOKENS, Recipe

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import GroupRecipe, LinearRecipe

BF16_BYTES: Final = 2
_ORDER_BYTES: Final = 4
"""A channel's place in an order is an int32."""
_FLOAT_BYTES: Final = dict(zip(FLOATS, (8, 4, 2, 2), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """Linears that read one activation. fqns: of them. magnitudes: (K,) float32, the mean |x| of each channel in the
    order in which they are stored, the largest over samples, 0 for padding; None if nobody wrote it down.

    predicted: see `predicted_cost`.
    """

    name: str
    split: Split
    rotated: int
    fqns: tuple[str, ...]
    magnitudes: Tensor | None = None
    predicted: float | None = None

    @property
    def channels(self) -> int:
        """K, padding included."""
        return sum(self.split)


@dataclass(frozen=True, kw_only=True, slots=True)
class Linear:
    """A linear that is packed. experts: how many matrices its weight holds, one for each of a layer's experts; None of
    an ordinary linear. macs: multiply-accumulates a token; None if it is not known by how many matrices one is
    multiplied. stored_bytes: of its weight with scales.
    """

    fqn: str
    group: str
    in_features: int
    out_features: int
    split: Split
    rotated: int
    element_bits: float
    stored_bytes: int
    experts: int | None
    macs: float | None

    @property
    def parameters(self) -> int:
        """Of the weight, without padding."""
        return self.in_features * self.out_features * (self.experts or 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Facts:
    """kind: "recipe" or "packed checkpoint". source: the name of the file or directory. refused: name -> why it stays
    as it is. left_alone: how many other parameters the model has, and their bytes; None if it is not known.

    measured: whether predicted costs are of the model's output, by gradients; None without costs. recipe: where it is
    one.
    """

    kind: str
    source: str
    model_id: str
    config: MicroMixConfig
    groups: tuple[Group, ...]
    linears: tuple[Linear, ...]
    left_alone: tuple[int, int] | None
    refused: Mapping[str, str] = field(default_factory=dict)
    measured: bool | None = None
    recipe: Recipe | None = None

    @property
    def parameters(self) -> int:
        """Weights of all linears, without padding."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def element_bits(self) -> float | None:
        """Bits a channel, weighted by multiply-accumulates; None if these are not known."""
        macs = [linear.macs for linear in self.linears if linear.macs is not None]
        if len(macs) < len(self.linears):
            return None
        return sum(linear.element_bits * each for linear, each in zip(self.linears, macs, strict=True)) / (
            sum(macs) or 1
        )

    @property
    def order_bytes(self) -> int:
        """Of all orders, one a group."""
        return sum(_ORDER_BYTES * group.channels for group in self.groups)

    @property
    def stored_bytes(self) -> int:
        """Of all packed weights with scales, padding and orders."""
        return sum(linear.stored_bytes for linear in self.linears) + self.order_bytes

    @property
    def stored_bits(self) -> float:
        """Stored bits a weight."""
        return 8 * self.stored_bytes / max(self.parameters, 1)

    @property
    def model_bits(self) -> float | None:
        """Stored bits a parameter of the whole model, whose other parameters keep their dtype."""
        if self.left_alone is None:
            return None
        others, bytes_ = self.left_alone
        return 8 * (self.stored_bytes + bytes_) / max(self.parameters + others, 1)

    @property
    def bytes_by_part(self) -> dict[str, int]:
        """Where the stored bytes of the linears are."""
        parts = dict.fromkeys(("MXFP4", "MXFP6", "MXFP8", "scales", "orders"), 0)
        for linear in self.linears:
            split, bits = weight_split(linear.split, self.config.weights), segment_bits(self.config.fp6)
            rows = linear.out_features * (linear.experts or 1)
            for name, channels, each in zip(parts, split, bits, strict=False):
                parts[name] += rows * channels * each // 8
            parts["scales"] += rows * sum(split) // BLOCK_SIZE
        parts["orders"] = self.order_bytes
        return parts

    @property
    def predicted(self) -> float | None:
        """The divergence that is predicted for the whole model."""
        costs = [group.predicted for group in self.groups if group.predicted is not None]
        return sum(costs) if costs else None


def read(path: Path) -> Facts:
    """The facts of a recipe's file or of the directory of a packed checkpoint.

    Raises FileNotFoundError, or ValueError that names the path and what is wrong with it.
    """
    if path.is_dir() and (path / "config.json").is_file():
        return _of_checkpoint(path)
    if path.is_file():
        try:
            return of_recipe(Recipe.load(path), path.name)
        except ValueError as error:
            raise ValueError(f"no recipe, and no directory of a packed checkpoint: {error}") from error
    if path.is_dir():
        raise ValueError(f"{path} must be a recipe's file or a packed checkpoint, and has no config.json")
    raise FileNotFoundError(f"no recipe and no packed checkpoint at {path}")


def of_recipe(recipe: Recipe, source: str) -> Facts:
    """The facts of a recipe. source: its file's name."""
    linears = [_of_linear(one, recipe) for one in recipe.linears.values()]
    costs = [group.statistics.costs for group in recipe.groups.values()]
    return Facts(
        kind="recipe",
        source=source,
        model_id=recipe.model_id,
        config=recipe.config,
        groups=tuple(_group(group, linears, recipe.config) for group in recipe.groups.values()),
        linears=tuple(linears),
        left_alone=recipe.left_alone,
        refused={**recipe.refused, **{fqn: _starved(experts) for fqn, experts in recipe.starved.items()}},
        measured=None if None in costs else all(one.measured for one in costs if one is not None),
        recipe=recipe,
    )


def _group(group: GroupRecipe, linears: list[Linear], config: MicroMixConfig) -> Group:
    order, mean = group.channel_perm.long(), group.statistics.abs_mean
    return Group(
        name=group.name,
        split=group.split,
        rotated=group.rotated,
        fqns=tuple(linear.fqn for linear in linears if linear.group == group.name),
        magnitudes=torch.where(order >= 0, mean[order.clamp(min=0)], 0.0),
        predicted=predicted_cost(group, config),
    )


def _of_linear(linear: LinearRecipe, recipe: Recipe) -> Linear:
    return Linear(
        fqn=linear.fqn,
        group=linear.group.name,
        in_features=linear.in_features,
        out_features=linear.out_features,
        split=linear.split,
        rotated=linear.group.rotated,
        element_bits=linear.element_bits,
        stored_bytes=recipe.stored_bytes_of(linear),
        experts=linear.experts,
        macs=linear.macs,
    )


def _starved(experts: tuple[int, ...]) -> str:
    """What is said of a weight that is packed all the same."""
    named = ", ".join(map(str, experts))
    return f"packed, but of experts {named} rounded to nearest: fewer than {FEW_TOKENS} calibrated tokens reached them"


def _of_checkpoint(directory: Path) -> Facts:
    path = directory / "config.json"
    content = checkpoint.read_config(path)
    if not checkpoint.is_ours(content):
        raise ValueError(
            f"{directory} must be a packed checkpoint, and its quantization_config is not of "
            f"{checkpoint.QUANT_METHOD}; micromix convert makes one of other MX checkpoints"
        )
    checkpoint.verify_config(path)
    from micromix_compile.integrations.hf import MicroMixQuantizationConfig

    described = MicroMixQuantizationConfig(**content["quantization_config"])
    config = MicroMixConfig.from_file(described.config)
    names = sorted(described.linears, key=_by_number)  # config.json has them by letters, layer 10 before layer 2
    linears = [_described(fqn, described.linears[fqn], config) for fqn in names]
    groups: dict[str, list[Linear]] = {}
    for linear in linears:
        groups.setdefault(linear.group, []).append(linear)
    return Facts(
        kind="packed checkpoint",
        source=directory.resolve().name,
        model_id=" ".join(content.get("architectures") or [str(content.get("model_type"))]),
        config=config,
        groups=tuple(
            Group(name=name, split=ones[0].split, rotated=ones[0].rotated, fqns=tuple(one.fqn for one in ones))
            for name, ones in groups.items()
        ),
        linears=tuple(linears),
        left_alone=_floats(directory),
    )


def _by_number(fqn: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in fqn.split(".")]


def _described(fqn: str, fields: Mapping[str, Any], config: MicroMixConfig) -> Linear:
    k4, k6, k8 = fields["split"]
    split: Split = (k4, k6, k8)
    channels, outputs, experts = fields["in_features"], fields["out_features"], fields.get("experts")
    bits = sum(each * k for each, k in zip(segment_bits(config.fp6), split, strict=True))
    return Linear(
        fqn=fqn,
        group=fields["group"],
        in_features=channels,
        out_features=outputs,
        split=split,
        rotated=fields.get("rotated", 0),
        element_bits=bits / sum(split),
        stored_bytes=outputs * (experts or 1) * row_bytes(weight_split(split, config.weights), config.fp6),
        experts=experts,
        macs=float(outputs * channels) if experts is None else None,
    )


def _floats(directory: Path) -> tuple[int, int]:
    """Elements and bytes of the tensors that are numbers as they are; what is packed is bytes and orders."""
    tensors = [(dtype, torch.Size(shape).numel()) for dtype, shape in TensorFiles(directory).described.values()]
    found = [(elements, elements * _FLOAT_BYTES[dtype]) for dtype, elements in tensors if dtype in _FLOAT_BYTES]
    return sum(elements for elements, _ in found), sum(bytes_ for _, bytes_ in found)

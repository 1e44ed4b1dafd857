"""What calibration decided; `recipe.file` keeps it.

A recipe maps linear layers to the order and split of their input channels. Linears that read the same activation form a
group: one order, one split, one set of statistics.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from micromix_compile.numerics.formats import FP6_FORMATS
from micromix_compile.numerics.layout import PackedWeight, Split, order_dtype, row_bytes, segment_bits, weight_split

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

    import torch
    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.fingerprint import Checksums

COST_FORMATS: Final = ("e2m1", "e2m3", "e3m2", "e4m3")
"""Element formats in the order of `ChannelCosts`."""

FEW_TOKENS: Final = 32
"""An expert that fewer calibrated tokens reached is rounded to nearest: so few say little about its inputs."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ChannelCosts:
    """What each channel costs in each of `COST_FORMATS`: predicted divergence of the model's output, nats a token.

    activations, weights: (4, C) float32, of rounding the one and the other; the divergence adds over both and over all
    channels of a model. rotated_activations, rotated_weights: (4, C) float32, the same in rotated blocks; None in
    recipes of before. measured: from gradients of the output; otherwise from the error of each linear relative to its
    own output, which is comparable inside a linear and only roughly between them.
    """

    activations: Tensor
    weights: Tensor
    measured: bool
    rotated_activations: Tensor | None = None
    rotated_weights: Tensor | None = None


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


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class GroupRecipe:
    """Order and split of one activation, shared by the linears that read it.

    channel_perm: (K,) int32, K = C rounded up to a multiple of 32, -1 for the padding channels.
    split: (k4, k6, k8), sums to K. rotated: how many channels of the order are rotated, from the first on.
    shards: the splits of the shards that tensor parallelism cuts it into (see `numerics.shards`); none if it isn't cut.
    """

    name: str
    channel_perm: Tensor
    split: Split
    statistics: ChannelStatistics
    rotated: int = 0
    shards: tuple[Split, ...] = ()

    def order_on(self, device: torch.device) -> Tensor:
        """channel_perm on a device, as `order_dtype`."""
        return self.channel_perm.to(device, order_dtype(self.channel_perm.numel()))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LinearRecipe:
    """One linear layer of the recipe. For weight_sample, (32,) float32, and weight_checksums see `fingerprint`.

    There are checksums where the weight was rounded. expert_tokens: of a weight that holds one matrix for each of a
    layer's experts, how many calibrated tokens reached each; None of any other. runs: by how many matrices of it a
    token is multiplied, on average.
    """

    fqn: str
    in_features: int
    out_features: int
    group: GroupRecipe
    weight_sample: Tensor
    weight_checksums: Checksums | None = None
    expert_tokens: tuple[int, ...] | None = None
    runs: float = 1.0

    @property
    def experts(self) -> int | None:
        """How many experts the weight is of; None of an ordinary linear."""
        return None if self.expert_tokens is None else len(self.expert_tokens)

    @property
    def starved(self) -> tuple[int, ...]:
        """The experts that fewer than `FEW_TOKENS` calibrated tokens reached."""
        return tuple(expert for expert, tokens in enumerate(self.expert_tokens or ()) if tokens < FEW_TOKENS)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight: (N, C), or (E, N, C) of experts."""
        matrix = (self.out_features, self.in_features)
        return matrix if self.experts is None else (self.experts, *matrix)

    @property
    def parameters(self) -> int:
        """Weights, without padding."""
        return math.prod(self.shape)

    @property
    def macs(self) -> float:
        """Multiply-accumulates a token."""
        return self.out_features * self.in_features * self.runs

    @property
    def split(self) -> Split:
        """(k4, k6, k8) of its input channels."""
        return self.group.split

    @property
    def element_bits(self) -> float:
        """Bits per channel, averaged, without scales and padding's share of them."""
        return sum(bits * k for bits, k in zip(segment_bits(FP6_FORMATS[0]), self.split, strict=True)) / sum(self.split)


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
        return sum(linear.parameters for linear in self.linears.values())

    @property
    def macs(self) -> float:
        """Multiply-accumulates of all linears a token."""
        return sum(linear.macs for linear in self.linears.values())

    @property
    def element_bits(self) -> float:
        """Bits per channel, weighted by multiply-accumulates."""
        return sum(linear.element_bits * linear.macs for linear in self.linears.values()) / (self.macs or 1)

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
    def model_bits(self) -> float | None:
        """Stored bits a parameter of the whole model, whose others keep their dtype; None if they were not counted."""
        if self.left_alone is None:
            return None
        return 8 * (self.stored_bytes + self.left_alone[1]) / max(self.parameters + self.left_alone[0], 1)

    @property
    def bits_text(self) -> str:
        """The averages for people, of the linears, and of the whole model if that is known; what activations are."""
        whole = "" if self.model_bits is None else f" ({self.model_bits:.2f} over all parameters of the model)"
        bits = f"{self.element_bits:.2f} element bits, {self.stored_bits:.2f} stored bits{whole}"
        return f"{bits}, {self._activations_text}"

    @property
    def _activations_text(self) -> str:
        groups = self.groups.values()
        rotated = sum(group.rotated > 0 for group in groups)
        turned = f", blocks rotated in {rotated} of {len(groups)} groups" if rotated else ""
        return f"activations {self.config.activations}{turned}"

    @property
    def starved(self) -> dict[str, tuple[int, ...]]:
        """Weights of which some experts are rounded to nearest, for too few tokens reached them: name -> which."""
        linears = self.linears.items() if self.config.rounds_weights else ()
        return {fqn: linear.starved for fqn, linear in linears if linear.starved}

    def stored_bytes_of(self, linear: LinearRecipe) -> int:
        """Bytes of one linear's packed weight with scales and padding."""
        split = weight_split(linear.split, self.config.weights)
        return linear.out_features * (linear.experts or 1) * row_bytes(split, self.config.fp6)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe to `path` through a temporary file: a failure leaves an older file whole."""
        from micromix_compile.recipe import file

        file.write(self, Path(path))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Recipe:
        """Read a recipe. Raises FileNotFoundError, or ValueError that names the path and the field that is wrong."""
        from micromix_compile.recipe import file

        return file.read(Path(path))


def check_recipe(recipe: object) -> None:
    """Raise TypeError unless it is a `Recipe`."""
    if not isinstance(recipe, Recipe):
        raise TypeError(
            f"recipe must be a Recipe, got {type(recipe).__name__}; calibrate makes one, Recipe.load(path) reads one"
        )

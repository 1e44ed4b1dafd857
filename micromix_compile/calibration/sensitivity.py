"""What rounding a channel costs the whole model, from one backward pass, or, without gradients, its own linears.

A small error d at the input of a group of linears moves the model's output distribution by a Kullback-Leibler
divergence of d^T F d / 2, with F the Fisher information: E[g g^T] for the gradients g of -log p(y), y drawn from the
model itself. Rounding errors of different channels and tokens are nearly independent, so the diagonal is enough:

    activations   sum over tokens of g_c**2 e_c**2 / 2, g the gradient at the input, e the rounding error
    weights       sum over outputs n of E[g_n**2 x_c**2] (error of w_nc)**2 / 2, g the gradient at the output

Where gradients cannot be had, both errors are measured at the output of each linear, relative to its energy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.calibration.memory import is_out_of_memory
from micromix_compile.numerics import rotation
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding, elem_format
from micromix_compile.numerics.reference import scale_byte, scale_value
from micromix_compile.numerics.rounding import round_elements
from micromix_compile.recipe.types import COST_FORMATS, ChannelCosts

if TYPE_CHECKING:
    from collections.abc import Sequence

_ROUNDED = tuple((name, rotate) for rotate in (False, True) for name in COST_FORMATS)
"""What costs are measured of: element formats, and whether blocks are rotated."""


class CostProbe:
    """Accumulates the costs of one group's channels: from gradients, or else from the outputs of the group's linears.

    in_features: C. All rows that are added count.
    """

    def __init__(self, in_features: int, scale_rounding: ScaleRounding, *, gradients: bool) -> None:
        self.gradients = gradients
        self._scale_rounding = scale_rounding
        self._tokens = self._rows = 0
        self._error = torch.zeros(len(_ROUNDED), in_features, dtype=torch.float64, device="cpu")
        self._energy = torch.zeros(in_features, dtype=torch.float64, device="cpu")
        self._output_energy: dict[str, Tensor] = {}  # per linear (N,), without gradients
        self._reached: dict[str, int] = {}  # how many rows each expert read, without gradients
        self._information: dict[str, Tensor] = {}  # per linear (N, C), with them: sums of g_n**2 x_c**2

    def add_input(self, rows: Tensor, order: Tensor, tokens: int | None = None) -> None:
        """Add inputs (M, C) float32.

        order: (C,) int64, channels as they will be blocked. tokens: how many tokens these rows are of, where several
        may be one token's, as those that experts read.
        """
        self._tokens += rows.shape[0] if tokens is None else tokens
        self._rows += rows.shape[0]
        self._energy += _energy(rows)
        if not self.gradients:
            self._error += torch.stack([_energy(error) for error in self._errors(rows, order)])

    def add_slopes(self, rows: Tensor, slopes: Tensor, order: Tensor) -> None:
        """Add gradients (M, C) at inputs (M, C), float32 both. order: as of `add_input`."""
        # Errors are made here: kept from the forward pass, they would take four times the activations.
        self._error += torch.stack([_energy(slopes * error) for error in self._errors(rows, order)])

    def add_information(self, name: str, slopes: Tensor, rows: Tensor) -> None:
        """Add gradients (M, N) at what the linear called `name` made of inputs (M, C), float32 both."""
        if name not in self._information:
            self._information[name] = slopes.new_zeros(slopes.shape[1], rows.shape[1])
        self._information[name].addmm_(slopes.square().T, rows.square())

    def add_output(self, name: str, y: Tensor) -> None:
        """Add outputs (M, N) float32 of the linear called `name`, where there are no gradients."""
        energy = _energy(y)
        self._output_energy[name] = self._output_energy.get(name, torch.zeros_like(energy)) + energy

    def add_expert_output(self, name: str, y: Tensor) -> None:
        """The same of an expert, of whose rows these are all."""
        self._reached[name] = self._reached.get(name, 0) + len(y)
        self.add_output(name, y)

    def absorb(self, other: CostProbe) -> None:
        """Add all that `other` measured, of as many channels."""
        self._tokens += other._tokens
        self._rows += other._rows
        self._error += other._error
        self._energy += other._energy
        for name, rows in other._reached.items():
            self._reached[name] = self._reached.get(name, 0) + rows
        for mine, its in ((self._output_energy, other._output_energy), (self._information, other._information)):
            for name, values in its.items():
                mine[name] = mine[name] + values if name in mine else values

    def _errors(self, rows: Tensor, order: Tensor) -> list[Tensor]:
        """Rounding errors (M, C) of `rows` in each of _ROUNDED, blocked by `order`, in the model's order."""
        order = order.to(rows.device)
        return [rounding_errors(rows, order, name, self._scale_rounding, rotate=rotate) for name, rotate in _ROUNDED]

    def costs(self, weights: Mapping[str, Tensor], order: Tensor) -> ChannelCosts:
        """The costs so far. weights: (N, C) by the names of the group's linears, and of experts.

        Of an expert, what rounding its input costs is taken to be its share of the rows.
        """
        tokens = max(self._tokens, 1)
        activations = self._error / (2 * tokens) if self.gradients else torch.zeros_like(self._error)
        of_weights = torch.zeros_like(self._error)
        for name, weight in weights.items():
            matrix = weight.detach().to(torch.float32)
            if name in self._information:
                of_weights += self._weighted(self._information[name] / (2 * tokens), matrix, order)
            elif name in self._output_energy:
                share = self._reached.get(name, self._rows) / max(self._rows, 1)
                total = (self._output_energy[name] / tokens).sum().clamp(min=torch.finfo(torch.float32).tiny)
                activations += self._error / tokens * _energy(matrix) / total * share**2
                plain = self._weighted(torch.ones_like(matrix), matrix, order)
                of_weights += plain * self._energy / tokens / total * share**2
        if not bool(activations.isfinite().all() and of_weights.isfinite().all()):
            raise ValueError(
                f"the sensitivity of {next(iter(weights), 'a linear')} is not finite: a gradient or an output holds a "
                f"NaN or an infinity, or float32 cannot hold its square; policies but 'budget' need no sensitivities"
            )
        (plain, rotated), (plain_weights, rotated_weights) = (
            [part.clone() for part in costs.to(torch.float32).chunk(2)] for costs in (activations, of_weights)
        )
        return ChannelCosts(
            activations=plain,
            weights=plain_weights,
            measured=self.gradients,
            rotated_activations=rotated,
            rotated_weights=rotated_weights,
        )

    def _weighted(self, importance: Tensor, matrix: Tensor, order: Tensor) -> Tensor:
        """(R, C) float64: squared rounding errors of a weight, times importance (N, C), summed over outputs."""
        errors = self._errors(matrix, order)
        return torch.stack(
            [(importance.to(one.device) * one.square()).sum(0).to("cpu", torch.float64) for one in errors]
        )


def _energy(rows: Tensor) -> Tensor:
    """(M, C) float32 -> (C,) float64 on the CPU: sums of squares."""
    return rows.square().sum(0).to("cpu", torch.float64)


def rounding_errors(
    rows: Tensor, order: Tensor, name: str, scale_rounding: ScaleRounding, *, rotate: bool = False
) -> Tensor:
    """What rounding to MX changes: float32 (M, C).

    rows: (M, C) float32, finite. order: (C,) int64, the channels in the order in which they share blocks; the first
    block is padded with zeros if it is not full. rotate: blocks are rotated before, and errors back afterwards.
    """
    fmt = elem_format(name)
    padding = -rows.shape[1] % BLOCK_SIZE
    blocks = torch.nn.functional.pad(rows[:, order], (padding, 0)).unflatten(1, (-1, BLOCK_SIZE))
    hadamard = rotation.hadamard(rows.device) if rotate else None  # as a matrix: here sums may round in any order
    if hadamard is not None:
        blocks = blocks @ hadamard
    scale = scale_value(scale_byte(blocks.abs().amax(-1, keepdim=True), fmt, scale_rounding))
    errors = round_elements(blocks / scale, fmt).mul_(scale).sub_(blocks)
    if hadamard is not None:
        errors = errors @ hadamard * rotation.NORMALIZATION
    return torch.empty_like(rows).index_copy_(1, order, errors.flatten(1)[:, padding:])


def pull_back(output: object, token_mask: Tensor | None, generator: torch.Generator) -> bool:
    """Run the model's output backward along one random direction per token; False if it has no gradient.

    A language model's output (a mapping with "logits") is asked for its Fisher information: the gradient of -log p(y)
    with y drawn from the model. Any other float output is taken as the mean of a unit normal distribution.
    token_mask: (B, T); tokens where it is 0 don't count, be the output (B, T, ...) or (T, B, ...).
    """
    values, is_logits = _output_tensor(output)
    if values is None or not values.requires_grad:
        return False
    with torch.no_grad():
        direction = _fisher_direction(values, generator) if is_logits else _normal_like(values, generator)
        mask = token_mask if token_mask is None or token_mask.shape == direction.shape[:2] else token_mask.mT
        if mask is not None and mask.shape == direction.shape[: mask.dim()]:
            mask = mask.to(direction.device, direction.dtype)
            direction *= mask.reshape(*mask.shape, *[1] * (direction.dim() - mask.dim()))
    values.backward(direction)
    return True


_OF_GRADIENTS = re.compile(r"grad|backward|derivative|in-?place|inference tensor", re.IGNORECASE)


def lacks_gradient(error: RuntimeError) -> bool:
    """Whether torch says by `error` that a model cannot be run backward, not that memory or something else fails."""
    return not is_out_of_memory(error) and _OF_GRADIENTS.search(str(error)) is not None


def _output_tensor(output: object) -> tuple[Tensor | None, bool]:
    if isinstance(output, Mapping) and isinstance(output.get("logits"), Tensor):
        return output["logits"], True
    values: Sequence[object] = list(output.values()) if isinstance(output, Mapping) else [output]
    if len(values) == 1 and isinstance(values[0], list | tuple):
        values = values[0]
    return next((v for v in values if isinstance(v, Tensor) and v.is_floating_point()), None), False


def _fisher_direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """softmax(logits) - one_hot(y), y drawn from it: the gradient of -log p(y)."""
    direction = logits.to(torch.float32).softmax(-1)
    rows = direction.reshape(-1, direction.shape[-1])
    # Drawn on the CPU from the inverse of the distribution function, so that every device draws alike.
    uniform = torch.rand(rows.shape[0], 1, generator=generator, dtype=torch.float32, device="cpu").to(rows.device)
    drawn = torch.searchsorted(rows.cumsum(-1), uniform).clamp(max=rows.shape[1] - 1)
    rows.scatter_add_(1, drawn, torch.full_like(drawn, -1.0, dtype=rows.dtype))
    return rows.reshape(direction.shape).to(logits.dtype)


def _normal_like(values: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(values.shape, generator=generator, dtype=torch.float32, device="cpu").to(
        values.device, values.dtype
    )

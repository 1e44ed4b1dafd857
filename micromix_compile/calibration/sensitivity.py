"""What rounding a channel costs the whole model, from one backward pass, or, without gradients, its own linears.

A small error d at the input of a group of linears moves the model's output distribution by a Kullback-Leibler
divergence of d^T F d / 2, with F the Fisher information: E[g g^T] for the gradients g of -log p(y), y drawn from the
model itself. Rounding errors of different channels and tokens are nearly independent, so the diagonal is enough:

    activations   sum over tokens of g_c**2 e_c**2 / 2, g the gradient at the input, e the rounding error
    weights       sum over outputs n of E[g_n**2] E[x_c**2] (error of w_nc)**2 / 2, g the gradient at the output

Where gradients cannot be had, both errors are measured at the output of each linear, relative to its energy.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile.calibration.memory import is_out_of_memory
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding, elem_format
from micromix_compile.numerics.reference import scale_byte, scale_value
from micromix_compile.numerics.rounding import round_elements
from micromix_compile.recipe.types import COST_FORMATS, ChannelCosts

if TYPE_CHECKING:
    from collections.abc import Sequence


class CostProbe:
    """Accumulates the costs of one group's channels over calls of `watch_input` and `watch_output`.

    in_features: C. With `gradients`, what is watched must be part of an autograd graph that is run backward later.
    """

    def __init__(self, in_features: int, scale_rounding: ScaleRounding, *, gradients: bool) -> None:
        self.gradients = gradients
        self._scale_rounding = scale_rounding
        self._tokens = 0
        self._error = torch.zeros(len(COST_FORMATS), in_features, dtype=torch.float64, device="cpu")
        self._energy = torch.zeros(in_features, dtype=torch.float64, device="cpu")
        self._output_energy: dict[str, Tensor] = {}  # per linear (N,): of gradients, or of the outputs themselves
        self._leaves: list[Tensor] = []

    def watch_input(self, x: Tensor, order: Tensor, token_mask: Tensor | None) -> None:
        """Take note of a group's input.

        x: (..., C) float; with gradients it is made to require them. order: (C,) int64, channels as they will be
        blocked. token_mask: what of x counts, of shape x.shape[:-1], or None.
        """
        # A copy: the model may change x in place before the backward pass.
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32, copy=self.gradients)
        keep = None if token_mask is None else token_mask.to(x.device, torch.bool).reshape(-1)
        self._tokens += rows.shape[0] if keep is None else int(keep.sum())
        counted = rows if keep is None else rows[keep]
        self._energy += _energy(counted)
        if not self.gradients:
            self._error += torch.stack([_energy(error) for error in self._errors(counted, order)])
            return
        if not x.requires_grad:
            self._leaves.append(x.requires_grad_(True))

        def backward(gradient: Tensor) -> None:
            # Errors are made again here: kept from the forward pass, they would take four times the activations.
            slopes = gradient.reshape(rows.shape).to(torch.float32)
            self._error += torch.stack([_energy(slopes * error) for error in self._errors(rows, order)])

        x.register_hook(backward)

    def release(self) -> None:
        """Let go of the last batch: inputs that were made to require gradients no longer do."""
        for leaf in self._leaves:
            leaf.grad = None
            leaf.requires_grad_(False)
        self._leaves.clear()

    def watch_output(self, name: str, y: Tensor, token_mask: Tensor | None) -> None:
        """Take note of the output (..., N) of the linear called `name`, a member of the group."""
        if not self.gradients:
            self._add_output(
                name, y if token_mask is None else y[token_mask.to(y.device, torch.bool).view(y.shape[:-1])]
            )
        elif y.requires_grad:
            y.register_hook(lambda gradient: self._add_output(name, gradient))

    def _add_output(self, name: str, values: Tensor) -> None:
        energy = _energy(values.detach().reshape(-1, values.shape[-1]).to(torch.float32))
        self._output_energy[name] = self._output_energy.get(name, torch.zeros_like(energy)) + energy

    def _errors(self, rows: Tensor, order: Tensor) -> list[Tensor]:
        """Rounding errors (M, C) of `rows` in each of COST_FORMATS, blocked by `order`, in the model's order."""
        order = order.to(rows.device)
        return [rounding_errors(rows, order, name, self._scale_rounding) for name in COST_FORMATS]

    def costs(self, weights: Mapping[str, Tensor], order: Tensor) -> ChannelCosts:
        """The costs so far. weights: (N, C) by the names of the group's linears."""
        tokens = max(self._tokens, 1)
        activations = torch.zeros_like(self._error)
        of_weights = torch.zeros_like(self._error)
        for name, weight in weights.items():
            if name not in self._output_energy:
                continue
            matrix = weight.detach().to(torch.float32)
            output = self._output_energy[name] / tokens
            total = output.sum().clamp(min=torch.finfo(torch.float32).tiny)
            per_output = output / 2 if self.gradients else torch.full_like(output, 1.0) / total
            if not self.gradients:
                activations += self._error / tokens * _energy(matrix) / total
            for row, errors in enumerate(self._errors(matrix, order)):
                squared = (per_output.to(errors.device, torch.float32) @ errors.square()).to("cpu", torch.float64)
                of_weights[row] += squared * self._energy / tokens
        if self.gradients:
            activations = self._error / (2 * tokens)
        if not bool(activations.isfinite().all() and of_weights.isfinite().all()):
            raise ValueError(
                f"the sensitivity of {next(iter(weights), 'a linear')} is not finite: a gradient or an output holds a "
                f"NaN or an infinity, or float32 cannot hold its square; policies but 'budget' need no sensitivities"
            )
        return ChannelCosts(
            activations=activations.to(torch.float32), weights=of_weights.to(torch.float32), measured=self.gradients
        )


def _energy(rows: Tensor) -> Tensor:
    """(M, C) float32 -> (C,) float64 on the CPU: sums of squares."""
    return rows.square().sum(0).to("cpu", torch.float64)


def rounding_errors(rows: Tensor, order: Tensor, name: str, scale_rounding: ScaleRounding) -> Tensor:
    """What rounding to MX changes: float32 (M, C).

    rows: (M, C) float32, finite. order: (C,) int64, the channels in the order in which they share blocks; a last block
    that is not full is padded with zeros.
    """
    fmt = elem_format(name)
    padding = -rows.shape[1] % BLOCK_SIZE
    blocks = torch.nn.functional.pad(rows[:, order], (padding, 0)).unflatten(1, (-1, BLOCK_SIZE))
    scale = scale_value(scale_byte(blocks.abs().amax(-1, keepdim=True), fmt, scale_rounding))
    errors = (round_elements(blocks / scale, fmt) * scale - blocks).flatten(1)[:, padding:]
    return torch.empty_like(rows).index_copy_(1, order, errors)


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

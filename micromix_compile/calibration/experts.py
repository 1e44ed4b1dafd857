"""What the experts of a layer see of calibration: each only the tokens that its router sent it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from micromix_compile.calibration.guided import add_guided, check_finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def expert_name(name: str, expert: int) -> str:
    """What one matrix of the weight `name` is called."""
    return f"{name}[{expert}]"


@dataclass(frozen=True, slots=True)
class Routed:
    """The rows of one grouped product that count, by expert.

    outputs: for each expert which output rows are its own, inputs: which rows of x these read; int64 both.
    """

    outputs: Sequence[Tensor]
    inputs: Sequence[Tensor]

    @classmethod
    def of(cls, offs: Tensor, rows: Tensor | None, keep: Tensor | None) -> Routed:
        """offs, rows: as of `passes.context.Routing`. keep: bool, which rows of x count; None if all do."""
        outputs, inputs = [], []
        for start, stop in pairwise([0, *offs.tolist()]):
            own = torch.arange(start, stop, device=offs.device)
            read = own if rows is None else rows[start:stop].to(torch.int64)
            counted = slice(None) if keep is None else keep.to(offs.device)[read]
            outputs.append(own[counted])
            inputs.append(read[counted])
        return cls(outputs, inputs)


class ExpertObserver:
    """Accumulates how many tokens reached each of E experts, and the second moments of their inputs.

    moments: (E, C, C) float32: for each expert the sum of x x^T over the tokens that reached it. guided: the same, each
    times |g|**2, g the gradient at the expert's output (see `guided`). Both None before the first token.
    """

    def __init__(self, experts: int) -> None:
        self.tokens = [0] * experts
        self.moments: Tensor | None = None
        self.guided: Tensor | None = None
        self._layer_tokens = 0

    def update(self, routed: Routed, layer_tokens: int) -> None:
        """Count one batch. layer_tokens: how many tokens the layer saw."""
        self._layer_tokens += layer_tokens
        for expert, rows in enumerate(routed.inputs):
            self.tokens[expert] += len(rows)

    def update_moments(self, x: Tensor, routed: Routed) -> None:
        """Add one batch's inputs (R, C)."""
        values = x.detach().to(torch.float32)
        if self.moments is None:
            self.moments = self._zeros(values)
        for expert, rows in enumerate(routed.inputs):
            own = values[rows.to(x.device)]
            self.moments[expert].addmm_(own.T, own)

    def update_guided(self, rows: Tensor, slopes: Tensor, routed: Routed) -> None:
        """Add inputs (R, C) float32 by the gradients (R', N) at what experts made of them."""
        if self.guided is None:
            self.guided = self._zeros(rows)
        for expert, (own, read) in enumerate(zip(routed.outputs, routed.inputs, strict=True)):
            add_guided(self.guided[expert], rows[read], slopes[own].to(torch.float32).square().sum(1))

    def _zeros(self, values: Tensor) -> Tensor:
        return values.new_zeros(len(self.tokens), values.shape[1], values.shape[1])

    def moments_for(self, weight_rounding: str, name: str) -> Tensor | None:
        """Those by which weights are rounded so; None where no expert saw a token, or no gradient came to any.

        name: of the weight, for errors. Raises ValueError as `check_finite` does.
        """
        if weight_rounding != "guided":
            return self.moments
        if self.guided is not None:
            check_finite(self.guided, name)
        return self.guided

    def forget_moments(self) -> None:
        """Free them."""
        self.moments = self.guided = None

    @property
    def runs(self) -> float:
        """How many experts a token reached, on average."""
        return sum(self.tokens) / max(self._layer_tokens, 1)

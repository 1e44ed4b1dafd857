"""What the experts of a layer see of calibration: each only the tokens that its router sent it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import torch

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
    """Accumulates how many tokens reached each expert, and their second moments.

    experts: E. with_moment: also keep the moments, E * C * C numbers.
    """

    def __init__(self, experts: int, *, with_moment: bool) -> None:
        self.tokens = [0] * experts
        self.moments: Tensor | None = None
        """(E, C, C) float32: for each expert the sum of x x^T over the tokens that reached it."""
        self._with_moment = with_moment
        self._layer_tokens = 0

    def update(self, x: Tensor, routed: Routed, layer_tokens: int) -> None:
        """Count one batch. x: (R, C) float. layer_tokens: how many tokens the layer saw."""
        self._layer_tokens += layer_tokens
        for expert, rows in enumerate(routed.inputs):
            self.tokens[expert] += len(rows)
            if self._with_moment and len(rows):
                values = x.detach()[rows.to(x.device)].to(torch.float32)
                if self.moments is None:
                    self.moments = values.new_zeros(len(self.tokens), values.shape[1], values.shape[1])
                self.moments[expert].addmm_(values.T, values)

    @property
    def runs(self) -> float:
        """How many experts a token reached, on average."""
        return sum(self.tokens) / max(self._layer_tokens, 1)

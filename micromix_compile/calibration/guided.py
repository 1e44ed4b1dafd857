"""Second moments in which a token counts by how much the model's output depends on what a linear makes of it.

A rounding error E of a weight moves the linear's output for a token x by E x, and that the model's output distribution
by a Kullback-Leibler divergence of x^T E^T F E x / 2, F = E[g g^T] the Fisher information of the output (see
`sensitivity`). With |g|**2 times one in F's place, a number a token, the divergence is tr(E H E^T) up to a factor, for
H the sum of |g|**2 x x^T: rounding that makes up for errors (see `numerics.rounding`) needs no other change. After
GuidedQuant (arXiv 2505.07004), which has such a number for each of several parts of the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


def check_finite(moment: Tensor, name: str) -> None:
    """Raise ValueError if gradients at the outputs of `name` were not finite, or their squares are not in float32.

    moment: (..., C, C), a sum of |g|**2 x x^T.
    """
    if not bool(moment.diagonal(dim1=-2, dim2=-1).isfinite().all()):
        raise ValueError(
            f"gradients at the outputs of {name} are not finite, or float32 cannot hold their squares: "
            f"weight_rounding='gptq' needs none"
        )


class GuidedMoment:
    """Accumulates the moment of one group's inputs over passes forward and backward.

    What is watched must be part of an autograd graph that is run backward later, along a gradient of the loss.
    """

    def __init__(self) -> None:
        self.moment: Tensor | None = None
        """(C, C) float32: the sum of |g|**2 x x^T over the tokens seen, on the device of x; None before the first."""
        self._importance: Tensor | None = None
        self._leaves: list[Tensor] = []

    def watch_input(self, x: Tensor, token_mask: Tensor | None) -> None:
        """Take note of the group's input (..., C), which is made to require gradients.

        token_mask: what of x counts, of shape x.shape[:-1] or flattened, or None.
        """
        # A copy: the model may change x in place before the backward pass.
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32, copy=True)
        importance = self._importance = rows.new_zeros(rows.shape[0])
        if not x.requires_grad:
            self._leaves.append(x.requires_grad_(True))

        def backward(_: Tensor) -> None:
            # Of x, which autograd reaches behind all outputs of the group.
            kept = importance if token_mask is None else importance * token_mask.to(importance.device).reshape(-1)
            if not bool(kept.any()):  # as of experts, which have moments of their own
                return
            if self.moment is None:
                self.moment = rows.new_zeros(rows.shape[1], rows.shape[1])
            self.moment.addmm_((rows * kept[:, None]).T, rows)

        x.register_hook(backward)

    def watch_output(self, y: Tensor) -> None:
        """Take note of the output (..., N) of one of the group's linears."""
        importance = self._importance
        assert importance is not None, "a linear has an input"

        def backward(slope: Tensor) -> None:
            importance.add_(slope.reshape(-1, slope.shape[-1]).to(torch.float32).square().sum(1))

        if y.requires_grad:
            y.register_hook(backward)

    def release(self) -> None:
        """Let go of the last batch: inputs that were made to require gradients no longer do."""
        self._importance = None
        for leaf in self._leaves:
            leaf.grad = None
            leaf.requires_grad_(False)
        self._leaves.clear()

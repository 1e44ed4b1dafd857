"""Second moments in which a token counts by how much the model's output depends on what a linear makes of it.

A rounding error E of a weight moves the linear's output for a token x by E x, and that the model's output distribution
by a Kullback-Leibler divergence of x^T E^T F E x / 2, F = E[g g^T] the Fisher information of the output (see
`sensitivity`). With |g|**2 times one in F's place, a number a token, the divergence is tr(E H E^T) up to a factor, for
H the sum of |g|**2 x x^T: rounding that makes up for errors (see `numerics.rounding`) needs no other change. After
GuidedQuant (arXiv 2505.07004), which has such a number for each of several parts of the outputs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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


def add_guided(moment: Tensor, rows: Tensor, importance: Tensor) -> None:
    """Add x x^T of inputs (M, C) float32, each times its importance |g|**2, (M,), to the moment (C, C)."""
    moment.addmm_((rows * importance[:, None]).T, rows)

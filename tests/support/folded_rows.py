"""Rows that the Triton kernel quantized and folded, and whether plain PyTorch folds them the same way."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import PLAIN_FOLDED

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.numerics.folding import FoldedActivation

    Split = tuple[int, int, int]


def assert_folds(
    got: FoldedActivation, y: Tensor, perm: Tensor, split: Split, fp6: str, rounding: str, *, w_fp4: bool,
    activations: str = "same", rotated: int = 0,
) -> None:  # fmt: skip
    """The same bytes and scales as in steps from y: (M, C), on the CPU.

    Where blocks have scales, bytes may be anything in a row whose scale is NaN, and a negative value that is rounded to
    zero may lose its sign. With one scale a row all bytes are the same.
    """
    want = PLAIN_FOLDED.quantize(
        "none", y, None, 0.0, perm, split, fp6, rounding, w_fp4=w_fp4, residual=None, activations=activations,
        rotated=rotated,
    )  # fmt: skip
    assert (got.q.dtype, got.row_scale.dtype, got.locks.dtype) == (torch.uint8, torch.float32, torch.int32)
    assert got.q.shape == want.q.shape
    assert torch.equal(got.row_scale.cpu().isnan(), want.row_scale.isnan())
    finite = want.row_scale.isfinite()
    assert torch.equal(got.row_scale.cpu()[finite], want.row_scale[finite])
    q = got.q.cpu()
    wrong = q != want.q
    if activations != "fp8":
        wrong &= finite[:, None] & ~((q == 0) & (want.q == 0x80))
    places = wrong.nonzero()
    assert not len(places), f"q differs in {len(places)} bytes, first at {places[0].tolist()}"
    if len(y):
        assert torch.equal(got.locks.cpu(), want.locks)


def check_fold(
    device: str, x: Tensor, perm: Tensor, split: Split, fp6: str, rounding: str, *, w_fp4: bool = False,
    activations: str = "same", rotated: int = 0,
) -> None:  # fmt: skip
    """Rows behind nothing, on a device."""
    got = TritonFolded().quantize(
        "none", x.to(device), None, 0.0, perm.to(device), split, fp6, rounding, w_fp4=w_fp4, activations=activations,
        rotated=rotated,
    )  # fmt: skip
    assert_folds(got, x, perm, split, fp6, rounding, w_fp4=w_fp4, activations=activations, rotated=rotated)

"""The steps of `rounding` on a GPU, one launch a block of channels; plain PyTorch would take hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from micromix_compile.numerics.rounding import BlockSteps
from micromix_compile.targets.launch import KernelCall, unit_column_stride

if TYPE_CHECKING:
    from micromix_compile.numerics.formats import ElemFormat

ROWS: Final = 16
"""Rows a program."""


def compensate_block(part: Tensor, scale: Tensor, factor: Tensor, fmt: ElemFormat) -> tuple[Tensor, Tensor]:
    """`rounding.compensate_block` in one launch: the same values."""
    from micromix_compile.templates.triton.round_block import compensate_block_kernel

    part, factor = unit_column_stride(part), unit_column_stride(factor)
    rounded, errors = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for _ in range(2))
    args = {
        "part": part, "scale": scale, "factor": factor, "rounded": rounded, "errors": errors, "N": len(part),
        "stride_part": part.stride(0), "stride_scale": scale.stride(0), "stride_factor": factor.stride(0),
        "stride_rounded": rounded.stride(0),
    }  # fmt: skip
    _launch(compensate_block_kernel, args, fmt)
    return rounded, errors


def descend_block(part: Tensor, slope: Tensor, scale: Tensor, moment: Tensor, fmt: ElemFormat) -> Tensor:
    """`rounding.descend_block` in one launch: the same values."""
    from micromix_compile.templates.triton.round_block import descend_block_kernel

    assert part.stride(1) == 1, "it is changed in place"
    slope, moment = unit_column_stride(slope), unit_column_stride(moment)
    change = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    args = {
        "part": part, "slope": slope, "scale": scale, "moment": moment, "change": change, "N": len(part),
        "stride_part": part.stride(0), "stride_slope": slope.stride(0), "stride_scale": scale.stride(0),
        "stride_moment": moment.stride(0),
    }  # fmt: skip
    _launch(descend_block_kernel, args, fmt)
    return change


def _launch(kernel: Any, args: dict[str, Any], fmt: ElemFormat) -> None:
    part = args["part"]
    constexprs = {"MANTISSA_BITS": fmt.mantissa_bits, "MIN_EXPONENT": fmt.min_exponent, "MAX_VALUE": fmt.max_value}
    if len(part):
        grid = (-(-len(part) // ROWS),)
        constexprs["ROWS"] = ROWS
        KernelCall(kernel=kernel, grid=grid, args=args, constexprs=constexprs, num_warps=2, fuses=False).launch_on(part)


TRITON_STEPS: Final = BlockSteps(compensate_block, descend_block)

"""The steps of `rounding` on a GPU, one launch a block of channels; plain PyTorch would take hundreds."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from micromix_compile.numerics.rounding import BlockSteps
from micromix_compile.targets import gpu

if TYPE_CHECKING:
    from micromix_compile.numerics.formats import ElemFormat

ROWS: Final = 16
"""Rows a program."""


def compensate_block(part: Tensor, scale: Tensor, factor: Tensor, fmt: ElemFormat) -> tuple[Tensor, Tensor]:
    """`rounding.compensate_block` in one launch: the same values."""
    from micromix_compile.templates.triton.round_block import compensate_block_kernel

    part, factor = gpu.unit_column_stride(part), gpu.unit_column_stride(factor)
    rounded, errors = (torch.empty(part.shape, dtype=part.dtype, device=part.device) for _ in range(2))
    if len(part):
        with gpu.current_device(part):
            compensate_block_kernel[_grid(part)](
                part, scale, factor, rounded, errors, len(part), part.stride(0), scale.stride(0), factor.stride(0),
                rounded.stride(0), **_constants(fmt),
            )  # fmt: skip
    return rounded, errors


def descend_block(part: Tensor, slope: Tensor, scale: Tensor, moment: Tensor, fmt: ElemFormat) -> Tensor:
    """`rounding.descend_block` in one launch: the same values."""
    from micromix_compile.templates.triton.round_block import descend_block_kernel

    assert part.stride(1) == 1, "it is changed in place"
    slope, moment = gpu.unit_column_stride(slope), gpu.unit_column_stride(moment)
    change = torch.empty(part.shape, dtype=part.dtype, device=part.device)
    if len(part):
        with gpu.current_device(part):
            descend_block_kernel[_grid(part)](
                part, slope, scale, moment, change, len(part), part.stride(0), slope.stride(0), scale.stride(0),
                moment.stride(0), **_constants(fmt),
            )  # fmt: skip
    return change


def _grid(part: Tensor) -> tuple[int]:
    return (-(-len(part) // ROWS),)


def _constants(fmt: ElemFormat) -> dict[str, Any]:
    return {
        "MANTISSA_BITS": fmt.mantissa_bits,
        "MIN_EXPONENT": fmt.min_exponent,
        "MAX_VALUE": fmt.max_value,
        "ROWS": ROWS,
        "num_warps": 2,
        "enable_fp_fusion": False,
    }


STEPS: Final = BlockSteps(compensate_block, descend_block)

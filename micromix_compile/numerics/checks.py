"""Checks of the arguments that the operations share, whoever computes them; only shapes and dtypes are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding, fp6_format
from micromix_compile.numerics.layout import (
    ACTIVATIONS,
    activation_shapes,
    packed_shapes,
    split_of_activation,
    split_of_weight,
)

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.numerics.layout import Split

FLOAT_DTYPES: Final = (torch.float32, torch.bfloat16, torch.float16)
INDEX_DTYPES: Final = (torch.int16, torch.int32, torch.int64)


def check_float(x: Tensor) -> None:
    """Raise TypeError unless x is of one of `FLOAT_DTYPES`."""
    if x.dtype not in FLOAT_DTYPES:
        raise TypeError(f"x must be float32, bfloat16 or float16, got {x.dtype}")


def check_split(split: Split, channels: int) -> None:
    """Raise ValueError unless `split` = (k4, k6, k8) are multiples of 32, none negative, that sum to `channels`."""
    for name, k in zip(("k4", "k6", "k8"), split, strict=True):
        if k < 0 or k % BLOCK_SIZE:
            raise ValueError(f"{name} must be a non-negative multiple of {BLOCK_SIZE}, got {k}")
    if sum(split) != channels:
        raise ValueError(f"split {split} sums to {sum(split)}, but channel_perm has {channels} entries")


def check_reorder_quantize(
    x: Tensor, channel_perm: Tensor, split: Split, fp6: str, scale_rounding: str, activations: str, rotated: int
) -> None:
    """Raise TypeError or ValueError for arguments that `reorder_quantize` does not take."""
    check_float(x)
    if channel_perm.dtype not in INDEX_DTYPES:
        raise TypeError(f"channel_perm must be int16, int32 or int64, got {channel_perm.dtype}")
    if x.dim() != 2:
        raise ValueError(f"x must be 2-dimensional (M, C), got shape {tuple(x.shape)}")
    check_split(split, channel_perm.shape[0])
    fp6_format(fp6)
    ScaleRounding(scale_rounding)
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations must be one of {', '.join(ACTIVATIONS)}, got {activations!r}")
    check_rotated(rotated, channel_perm.shape[0])


def check_rotated(rotated: int, channels: int) -> None:
    """Raise ValueError unless so many of the channels are whole blocks."""
    if rotated % BLOCK_SIZE or not 0 <= rotated <= channels:
        raise ValueError(f"rotated must be a multiple of {BLOCK_SIZE} from 0 to {channels}, got {rotated}")


def check_norm_weight(x: Tensor, weight: Tensor) -> None:
    """Raise TypeError or ValueError unless `weight` is a float (C,) for x: (M, C)."""
    if weight.dtype not in FLOAT_DTYPES:
        raise TypeError(f"weight must be float32, bfloat16 or float16, got {weight.dtype}")
    if weight.shape != x.shape[1:]:
        raise ValueError(f"weight must have shape {tuple(x.shape[1:])}, got {tuple(weight.shape)}")


def check_gate_and_up(gate: Tensor, up: Tensor) -> None:
    """Raise TypeError or ValueError unless both have one dtype and one shape."""
    if up.dtype != gate.dtype:
        raise TypeError(f"up must have gate's dtype {gate.dtype}, got {up.dtype}")
    if up.shape != gate.shape:
        raise ValueError(f"up must have shape {tuple(gate.shape)}, got {tuple(up.shape)}")


def check_residual(x: Tensor, residual: Tensor) -> None:
    """Raise TypeError or ValueError unless both have one dtype and one shape."""
    if residual.dtype != x.dtype:
        raise TypeError(f"residual must have x's dtype {x.dtype}, got {residual.dtype}")
    if residual.shape != x.shape:
        raise ValueError(f"residual must have shape {tuple(x.shape)}, got {tuple(residual.shape)}")


def check_mixed_mx_mm(
    x4: Tensor, x6: Tensor, x8: Tensor, x_scale: Tensor, w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor,
    bias: Tensor | None, fp6: str,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError unless the operands of `mixed_mx_mm` fit each other; only shapes are read."""
    tensors = {"x4": x4, "x6": x6, "x8": x8, "x_scale": x_scale, "w4": w4, "w6": w6, "w8": w8, "w_scale": w_scale}
    for name, tensor in tensors.items():
        if tensor.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {tensor.dtype}")
    fp6_format(fp6)
    columns, split, w_split = w4.shape[0], split_of_activation(x4, x6, x8), split_of_weight(w4, w6, w8)
    if sum(w_split) != sum(split):
        raise ValueError(f"weights hold {sum(w_split)} channels, x {sum(split)}")
    shapes = (*activation_shapes(x4.shape[0], split), *packed_shapes(columns, w_split))
    expected = {name: shape for name, shape in zip(tensors, shapes, strict=True) if name not in ("x4", "w4")}
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}, got {tuple(tensors[name].shape)}")
    if bias is not None and bias.shape != (columns,):
        raise ValueError(f"bias must have shape ({columns},), got {tuple(bias.shape)}")

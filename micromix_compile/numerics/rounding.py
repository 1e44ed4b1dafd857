"""Rounding of weights onto the MX grid better than to the nearest value, at no cost when the model runs.

Both methods choose among values that MX can store; whoever packs or multiplies them sees ordinary MX weights.

Scale search: the exponent of a block is the one, of two, that makes the weighted error least. A smaller exponent clips
the block's largest elements and halves the step of the others.

Error compensation (GPTQ, arXiv 2210.17323): channels are rounded in order, and the error of each is made up for by the
channels that follow, so that the *output* error tr(E H E^T), with E the weights' error and H the second moment of the
inputs, becomes small, not E itself. Then every channel is rounded again, given all the others, a few times over
(coordinate descent, as in QuantEase, arXiv 2309.01885).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from micromix_compile.numerics.formats import BLOCK_SIZE, E8M0_BIAS, ElemFormat, ScaleRounding, elem_format
from micromix_compile.numerics.reference import scale_byte, scale_value

if TYPE_CHECKING:
    from collections.abc import Callable

SWEEPS = 4
"""How often every channel is rounded again after compensation. On the default model with MXFP4 weights, 12 windows of
calibration articles that were not calibrated on: divergence .394 with 0, .314 with 2; with 128 calibration windows .284
with 2, .275 with 6. A sweep costs a fifth of the compensation."""

DAMPING = 0.3
"""Added to H's diagonal, as a share of its mean. Same windows, divergence with 0.1, 0.3 and 1: mixed at 4.5 bits .224,
.220, .224; all in MXFP6 .059, .053, .057; weights in MXFP4 .340 with 0.1, .320 with 0.3. The spread of such figures is
about 3 %. A share of each channel's own energy instead: weights alone in MXFP6 .033 instead of .022."""


def round_elements(values: Tensor, fmt: ElemFormat) -> Tensor:
    """`values` rounded to the elements of `fmt`, to nearest even, saturating: decode(encode(values)), but fast.

    values: any shape, float32, finite. Returns float32.
    """
    magnitude = values.abs().clamp_(max=fmt.max_value)
    # 2**e of each, times 2**(23 - mantissa_bits): what has steps of the format's as its ulp, so that adding it rounds.
    power = (magnitude.view(torch.int32) & 0x7F800000).clamp_(min=(E8M0_BIAS + fmt.min_exponent) << 23)
    magic = power.view(torch.float32).mul_(2.0 ** (23 - fmt.mantissa_bits))
    return magnitude.add_(magic).sub_(magic).clamp_(max=fmt.max_value).copysign_(values)


def block_scales(
    weight: Tensor, fmt: ElemFormat, importance: Tensor, *, scale_rounding: ScaleRounding, search: bool
) -> Tensor:
    """The scale of each row of one block of 32 channels.

    weight: (N, 32) float32. importance: (32,) float32, what a squared error of each channel costs.
    search: also try the next smaller exponent, and take it where the error is less. Returns (N, 1) float32.
    """
    byte = scale_byte(weight.abs().amax(1, keepdim=True), fmt, scale_rounding)
    scale = scale_value(byte)
    if not search:
        return scale
    smaller = scale_value((byte - 1).clamp(min=0))
    is_better = _block_error(weight, smaller, fmt, importance) < _block_error(weight, scale, fmt, importance)
    return torch.where(is_better, smaller, scale)


def _block_error(weight: Tensor, scale: Tensor, fmt: ElemFormat, importance: Tensor) -> Tensor:
    error = round_elements(weight / scale, fmt) * scale - weight
    return (error * error * importance).sum(1, keepdim=True)


def round_weight(
    weight: Tensor,
    formats: list[str],
    moment: Tensor,
    *,
    scale_rounding: ScaleRounding = ScaleRounding.RCEIL,
    search: bool = True,
    compensate: bool = True,
    steps: BlockSteps | None = None,
) -> Tensor:
    """A weight whose every value is on its block's MX grid.

    weight: (N, K) float32, finite, its channels in the order of the split. formats: per block of 32 channels, the
    element format. moment: (K, K) or, if not `compensate`, its diagonal (K,): sum over tokens of x x^T, up to a factor.
    steps: who rounds each block, `PLAIN_STEPS` by default.
    Returns (N, K) float32, of which `reference.quantize` makes the same values again.

    No row is worse than its rounding to nearest (with the same `search`) in e H e^T, H being the damped moment: where
    compensation fails a row, that row is taken from the rounding to nearest.
    """
    nearest = _round_blocks(weight, formats, _importance(moment), scale_rounding, search)
    if not compensate:
        return nearest
    damped = _damp(moment)
    factor = _inverse_factor(damped)
    steps = steps or PLAIN_STEPS
    rounded, scales = _compensate(weight, formats, factor, scale_rounding, search, steps)
    rounded = _descend(weight, rounded, scales, formats, damped.to(torch.float32), steps)
    is_worse = _output_error(rounded - weight, damped) > _output_error(nearest - weight, damped)
    return torch.where(is_worse, nearest, rounded)


def _importance(moment: Tensor) -> Tensor:
    diagonal = torch.diagonal(moment) if moment.dim() == 2 else moment
    return diagonal.to(torch.float32)


def _round_blocks(
    weight: Tensor, formats: list[str], importance: Tensor, scale_rounding: ScaleRounding, search: bool
) -> Tensor:
    rounded = torch.empty_like(weight)
    for block, name in enumerate(formats):
        here = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        fmt, part = elem_format(name), weight[:, here]
        scale = block_scales(part, fmt, importance[here], scale_rounding=scale_rounding, search=search)
        rounded[:, here] = round_elements(part / scale, fmt) * scale
    return rounded


def _damp(moment: Tensor) -> Tensor:
    """H + DAMPING * mean of its diagonal * 1 in float64; a channel that no token used (or padding) stays apart."""
    damped = moment.to(torch.float64)
    mean = torch.diagonal(damped).mean()
    damping = torch.where(mean > 0, DAMPING * mean, torch.ones_like(mean))
    return damped + damping * torch.eye(len(damped), dtype=damped.dtype, device=damped.device)


def _inverse_factor(damped: Tensor) -> Tensor:
    """The upper Cholesky factor of the inverse: row j holds what an error in channel j does to those after it."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    return factor.to(torch.float32).contiguous()  # LAPACK's is not


def _compensate(
    weight: Tensor, formats: list[str], factor: Tensor, scale_rounding: ScaleRounding, search: bool, steps: BlockSteps
) -> tuple[Tensor, Tensor]:
    """The rounded weight (N, K) and the scales (N, K // 32) that it was rounded with."""
    left = weight.clone()  # the weights, with what the channels before ask them to make up for
    rounded = torch.empty_like(weight)
    scales = weight.new_empty(len(weight), len(formats))
    for block, name in enumerate(formats):
        start, stop = block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE
        fmt, part, inner = elem_format(name), left[:, start:stop], factor[start:stop, start:stop]
        importance = torch.diagonal(inner) ** -2
        scale = block_scales(part, fmt, importance, scale_rounding=scale_rounding, search=search)
        scales[:, block : block + 1] = scale
        rounded[:, start:stop], errors = steps.compensate(part, scale, inner, fmt)
        left[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return rounded, scales


def _descend(
    weight: Tensor, rounded: Tensor, scales: Tensor, formats: list[str], damped: Tensor, steps: BlockSteps
) -> Tensor:
    """Round every channel again, given all others as they now are; each step can only lower e H e^T."""
    rounded = rounded.clone()
    slopes = (rounded - weight) @ damped  # half the gradient of e H e^T
    for block, name in [*enumerate(formats)] * SWEEPS:
        here = slice(block * BLOCK_SIZE, (block + 1) * BLOCK_SIZE)
        scale = scales[:, block : block + 1]
        change = steps.descend(rounded[:, here], slopes[:, here], scale, damped[here, here], elem_format(name))
        slopes.addmm_(change, damped[here])
    return rounded


def compensate_block(part: Tensor, scale: Tensor, factor: Tensor, fmt: ElemFormat) -> tuple[Tensor, Tensor]:
    """Round column after column, each error made up for by the columns behind it.

    part: (N, 32) float32. scale: (N, 1) float32, powers of two. factor: (32, 32) float32, upper triangular: the block's
    part of the inverse's factor. Returns the rounded values and the errors over their pivots, both (N, 32) float32.
    """
    left, rounded, errors = part.clone(), torch.empty_like(part), torch.empty_like(part)
    for j in range(BLOCK_SIZE):
        value = left[:, j : j + 1]
        rounded[:, j : j + 1] = round_elements(value / scale, fmt) * scale
        errors[:, j : j + 1] = (value - rounded[:, j : j + 1]) / factor[j, j]
        left[:, j + 1 :] -= errors[:, j : j + 1] * factor[j, j + 1 :]
    return rounded, errors


def descend_block(part: Tensor, slope: Tensor, scale: Tensor, moment: Tensor, fmt: ElemFormat) -> Tensor:
    """Round column after column of `part`, in place, to the best value, given all others as they now are.

    part: (N, 32) float32, on the grid of scale (N, 1). slope: (N, 32) float32, half the gradient of the error with
    respect to part as it comes. moment: (32, 32) float32. Returns what was added to `part`.
    """
    before, slope = part.clone(), slope.clone()
    for j in range(BLOCK_SIZE):
        now = before[:, j : j + 1]
        better = round_elements((now - slope[:, j : j + 1] / moment[j, j]) / scale, fmt) * scale
        slope += (better - now) * moment[j]
        part[:, j : j + 1] = better
    return part - before


class BlockSteps(NamedTuple):
    """Who rounds a block: `compensate_block` and `descend_block`, or what computes the same."""

    compensate: Callable[[Tensor, Tensor, Tensor, ElemFormat], tuple[Tensor, Tensor]]
    descend: Callable[[Tensor, Tensor, Tensor, Tensor, ElemFormat], Tensor]


PLAIN_STEPS: Final = BlockSteps(compensate_block, descend_block)


def _output_error(error: Tensor, damped: Tensor) -> Tensor:
    """e H e^T of each row: (N, 1)."""
    wide = error.to(damped.dtype)
    return ((wide @ damped) * wide).sum(1, keepdim=True)

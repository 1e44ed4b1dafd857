"""Rounding of weights in order of their channels, one block of 32 a launch: see `numerics.rounding`.

Each channel's rounding changes what the ones after it are rounded from, so that the columns of a block are a chain,
and all rows are independent. Both kernels keep their rows in registers from the first column to the last. They make
the same values as the plain functions: every step is rounded once, for they are compiled without fused multiply-adds.
"""

import triton
import triton.language as tl


@triton.jit
def round_to_elements(x, MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_VALUE: tl.constexpr):
    """float32 rounded to the values of an element format, to nearest even, saturating. Finite."""
    magnitude = tl.minimum(tl.abs(x), MAX_VALUE)
    power = (magnitude.to(tl.int32, bitcast=True) >> 23) - 127
    step = ((tl.maximum(power, MIN_EXPONENT) + 127 - MANTISSA_BITS) << 23).to(tl.float32, bitcast=True)
    large = step * 12582912.0  # 1.5 * 2**23: what is added to it is rounded to whole steps
    rounded = tl.minimum((magnitude + large) - large, MAX_VALUE)
    sign = x.to(tl.int32, bitcast=True) & (-2147483647 - 1)
    return (rounded.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def _column(tile, is_column):
    # By their bits: as a sum of floats, -0 would lose its sign.
    bits = tl.sum(tl.where(is_column, tile.to(tl.int32, bitcast=True), 0), 1, keep_dims=True)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def compensate_block_kernel(
    part,  # (N, 32) float32, rows stride_part apart: what is to be rounded
    scale,  # (N,) float32, entries stride_scale apart
    factor,  # (32, 32) float32, upper triangular, rows stride_factor apart
    rounded,  # (N, 32) float32, rows stride_rounded apart
    errors,  # (N, 32) float32, contiguous: of each column over its pivot
    N, stride_part, stride_scale, stride_factor, stride_rounded,
    MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_VALUE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round column after column, each error made up for by the columns behind it. Grid: (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 32)[None, :]
    inside = row < N
    row = row.to(tl.int64)
    left = tl.load(part + row * stride_part + column, mask=inside, other=0.0)
    step = tl.load(scale + row * stride_scale, mask=inside, other=1.0)
    out = left
    error = left
    for j in range(32):
        is_column = column == j
        value = _column(left, is_column)
        to_later = tl.load(factor + j * stride_factor + column)
        pivot = tl.load(factor + j * stride_factor + j)
        nearest = round_to_elements(tl.div_rn(value, step), MANTISSA_BITS, MIN_EXPONENT, MAX_VALUE) * step
        missing = tl.div_rn(value - nearest, tl.broadcast_to(pivot, value.shape))
        out = tl.where(is_column, nearest, out)
        error = tl.where(is_column, missing, error)
        left = tl.where(column > j, left - missing * to_later, left)
    tl.store(rounded + row * stride_rounded + column, out, mask=inside)
    tl.store(errors + row * 32 + column, error, mask=inside)


@triton.jit
def descend_block_kernel(
    part,  # (N, 32) float32, rows stride_part apart: rounded values, rounded again in place
    slope,  # (N, 32) float32, rows stride_slope apart: half the gradient of the error in them, from before
    scale,  # (N,) float32, entries stride_scale apart
    moment,  # (32, 32) float32, rows stride_moment apart
    change,  # (N, 32) float32, contiguous: what was added to `part`
    N, stride_part, stride_slope, stride_scale, stride_moment,
    MANTISSA_BITS: tl.constexpr, MIN_EXPONENT: tl.constexpr, MAX_VALUE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Round column after column to the best value, given all others as they now are. Grid: (row tiles,)."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, 32)[None, :]
    inside = row < N
    row = row.to(tl.int64)
    before = tl.load(part + row * stride_part + column, mask=inside, other=0.0)
    downhill = tl.load(slope + row * stride_slope + column, mask=inside, other=0.0)
    step = tl.load(scale + row * stride_scale, mask=inside, other=1.0)
    out = before
    for j in range(32):
        is_column = column == j
        now = _column(out, is_column)
        curvature = tl.load(moment + j * stride_moment + column)
        pivot = tl.load(moment + j * stride_moment + j)
        target = now - tl.div_rn(_column(downhill, is_column), tl.broadcast_to(pivot, now.shape))
        better = round_to_elements(tl.div_rn(target, step), MANTISSA_BITS, MIN_EXPONENT, MAX_VALUE) * step
        downhill += (better - now) * curvature
        out = tl.where(is_column, better, out)
    tl.store(part + row * stride_part + column, out, mask=inside)
    tl.store(change + row * 32 + column, out - before, mask=inside)

"""What independent libraries (gfloat, ml_dtypes) and exact rational arithmetic make of formats, scales and blocks."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

import gfloat
import ml_dtypes
import numpy as np
import pytest
from gfloat import formats as gfloat_formats

from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS, ScaleRounding, elem_format

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

Quantized = tuple[np.ndarray, np.ndarray]

FORMATS = tuple(ELEM_FORMATS)
GFLOAT = {name: getattr(gfloat_formats, f"format_info_ocp_{name}") for name in FORMATS}
ML_DTYPES = {
    "e2m1": ml_dtypes.float4_e2m1fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}

per_format = pytest.mark.parametrize("name", FORMATS)
per_rounding = pytest.mark.parametrize("rounding", tuple(ScaleRounding))


def gfloat_encode(x: np.ndarray, name: str) -> np.ndarray:
    """uint8 codes of `x` by gfloat: nearest even, saturating."""
    rounded = gfloat.round_ndarray(GFLOAT[name], x.astype(np.float64), gfloat.RoundMode.TiesToEven, sat=True)
    return gfloat.encode_ndarray(GFLOAT[name], rounded).astype(np.uint8)


def gfloat_decode(codes: np.ndarray, name: str) -> np.ndarray:
    """float64 values of uint8 codes by gfloat."""
    return np.array([gfloat.decode_float(GFLOAT[name], int(code)).fval for code in codes.flat]).reshape(codes.shape)


def ml_dtypes_encode(x: np.ndarray, name: str) -> np.ndarray:
    """uint8 codes of float32 `x` by ml_dtypes, which overflows to NaN or infinity in FP8: clipped first."""
    limit = float(ml_dtypes.finfo(ML_DTYPES[name]).max)
    return np.clip(x.astype(np.float32), -limit, limit).astype(ML_DTYPES[name]).view(np.uint8)


def ml_dtypes_decode(codes: np.ndarray, name: str) -> np.ndarray:
    """float32 values of uint8 codes by ml_dtypes."""
    return codes.astype(np.uint8).view(ML_DTYPES[name]).astype(np.float32)


def floor_log2(value: Fraction) -> int:
    """The largest e with 2**e <= value, for value > 0."""
    e = value.numerator.bit_length() - value.denominator.bit_length()
    return e if Fraction(2) ** e <= value else e - 1


def exact_scale_byte(amax: float, name: str, rounding: ScaleRounding) -> int:
    """The formulas of `ScaleRounding` in rational arithmetic, with gfloat's constants. amax: finite, >= 0."""
    value, info = Fraction(amax), GFLOAT[name]
    if not value:
        return 0
    match rounding:
        case ScaleRounding.FLOOR:
            exponent = floor_log2(value) - info.emax
        case ScaleRounding.RCEIL:
            ratio = value / Fraction(info.max)
            exponent = floor_log2(ratio)
            exponent += ratio != Fraction(2) ** exponent
        case ScaleRounding.EVEN:
            step = Fraction(2) ** (floor_log2(value) - (info.precision - 1))
            exponent = floor_log2(round(value / step) * step) - info.emax  # round() takes ties to even
        case ScaleRounding.FIT:
            largest, step = Fraction(info.max), Fraction(2) ** (info.emax - (info.precision - 1))
            exponent = floor_log2(value) - info.emax
            exponent += value / Fraction(2) ** exponent > largest + step / 2
    return max(exponent, -127) + 127


def assert_same_floats(actual: np.ndarray, expected: np.ndarray) -> None:
    """Equal values, NaN where NaN, and zeros of the same sign."""
    np.testing.assert_array_equal(actual, expected)
    numbers = ~np.isnan(expected)
    np.testing.assert_array_equal(np.signbit(actual[numbers]), np.signbit(expected[numbers]))


def every_code(name: str) -> np.ndarray:
    return np.arange(1 << elem_format(name).bits, dtype=np.uint8)


def oracle_quantize(
    x: Tensor, name: str, rounding: ScaleRounding, encode: Callable[[np.ndarray, str], np.ndarray]
) -> Quantized:
    """Codes and scale bytes of `quantize`, with exact scales and another library's element encoding."""
    blocks = x.double().numpy().reshape(*x.shape[:-1], x.shape[-1] // BLOCK_SIZE, BLOCK_SIZE)
    amax = np.abs(blocks).max(-1)
    finite = np.isfinite(amax)
    scale = np.full(amax.shape, 255, dtype=np.uint8)
    scale[finite] = [exact_scale_byte(value, name, rounding) for value in amax[finite].tolist()]
    scaled = np.ldexp(np.where(finite[..., None], blocks, 0.0), 127 - scale.astype(np.int32)[..., None])
    return encode(scaled, name).reshape(x.shape), scale


def oracle_dequantize(codes: np.ndarray, scale: np.ndarray, name: str) -> np.ndarray:
    """float64 (..., K) values of codes and scale bytes."""
    factors = np.where(scale == 255, np.nan, np.ldexp(1.0, scale.astype(np.int32) - 127))
    return gfloat_decode(codes, name) * np.repeat(factors, BLOCK_SIZE, axis=-1)

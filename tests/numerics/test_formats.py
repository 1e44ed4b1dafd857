"""Element codec and scales against two independent libraries (gfloat, ml_dtypes) and exact rational arithmetic."""

from __future__ import annotations

import math

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat import formats as gfloat_formats
from hypothesis import given
from hypothesis import strategies as st
from support.oracles import (
    GFLOAT,
    assert_same_floats,
    every_code,
    exact_scale_byte,
    gfloat_decode,
    gfloat_encode,
    ml_dtypes_decode,
    ml_dtypes_encode,
    per_format,
    per_rounding,
)
from support.strategies import BOUNDARIES, NAN_AND_INF_BITS, Block, finite_blocks

from micromix_compile.numerics import reference
from micromix_compile.numerics.formats import ELEM_FORMATS, ElemFormat, ScaleRounding, elem_format

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def encode(x: np.ndarray, name: str) -> np.ndarray:
    return reference.encode(torch.from_numpy(x), elem_format(name)).numpy()


def finite_magnitudes(name: str) -> Block:
    """The format's non-negative finite values, ascending."""
    return ml_dtypes_decode(np.arange(elem_format(name).max_code + 1), name)


def with_neighbours(values: Block) -> Block:
    """Each value, the float32 before it and the one after it, in both signs."""
    above = np.nextafter(values, np.float32(np.inf))
    magnitudes = np.concatenate((np.nextafter(values, np.float32(-np.inf)), values, above))
    return np.concatenate((magnitudes, -magnitudes))


@per_format
def test_the_table_states_what_gfloat_states(name: str) -> None:
    fmt, info = elem_format(name), GFLOAT[name]
    assert (fmt.bits, fmt.bias, fmt.emax, fmt.max_value) == (info.k, info.bias, info.emax, info.max)
    assert (fmt.max_code, 2.0**fmt.min_exponent) == (info.code_of_max, info.smallest_normal)
    assert (fmt.exponent_bits, fmt.mantissa_bits) == (info.expBits, info.tSignificandBits)


@per_format
def test_every_code_decodes_as_in_gfloat_and_ml_dtypes(name: str) -> None:
    codes = every_code(name)
    values = reference.decode(torch.from_numpy(codes), elem_format(name)).numpy()
    assert_same_floats(values, gfloat_decode(codes, name))
    assert_same_floats(values, ml_dtypes_decode(codes, name))


@per_format
def test_every_finite_code_survives_decode_and_encode(name: str) -> None:
    codes = every_code(name)
    codes = codes[np.isfinite(gfloat_decode(codes, name))]
    values = reference.decode(torch.from_numpy(codes), elem_format(name))
    np.testing.assert_array_equal(reference.encode(values, elem_format(name)).numpy(), codes)


@per_format
def test_every_tie_every_value_and_their_neighbours_encode_as_in_gfloat_and_ml_dtypes(name: str) -> None:
    values = finite_magnitudes(name)
    ties = (values[:-1] + values[1:]) / 2
    x = with_neighbours(np.concatenate((values, ties)))
    np.testing.assert_array_equal(encode(x, name), gfloat_encode(x, name))
    np.testing.assert_array_equal(encode(x, name), ml_dtypes_encode(x, name))


@per_format
def test_every_tie_goes_to_the_even_code(name: str) -> None:
    values = finite_magnitudes(name)
    codes = encode((values[:-1] + values[1:]) / 2, name)
    lower = np.arange(len(values) - 1)
    np.testing.assert_array_equal(codes, lower + lower % 2)


@per_format
def test_everything_past_the_largest_value_saturates(name: str) -> None:
    fmt = elem_format(name)
    factors = np.array([1.0, 1.01, 1.0625, 1.125, 1.25, 1.5, 2.0, 3.0, 4.0, 1e9], dtype=np.float32)
    x = with_neighbours(np.append(factors * np.float32(fmt.max_value), np.float32(2.0**127)))
    x = np.append(x, np.finfo(np.float32).max)
    beyond = np.abs(x) >= fmt.max_value
    np.testing.assert_array_equal(encode(x, name)[beyond] & ((1 << (fmt.bits - 1)) - 1), fmt.max_code)
    np.testing.assert_array_equal(encode(x, name), gfloat_encode(x, name))
    np.testing.assert_array_equal(encode(x, name), ml_dtypes_encode(x, name))


@per_format
def test_boundary_values_encode_as_in_gfloat_and_ml_dtypes(name: str) -> None:
    np.testing.assert_array_equal(encode(BOUNDARIES, name), gfloat_encode(BOUNDARIES, name))
    np.testing.assert_array_equal(encode(BOUNDARIES, name), ml_dtypes_encode(BOUNDARIES, name))


@per_format
@given(x=finite_blocks)
def test_any_finite_float_encodes_as_in_gfloat_and_ml_dtypes(name: str, x: Block) -> None:
    np.testing.assert_array_equal(encode(x, name), gfloat_encode(x, name))
    np.testing.assert_array_equal(encode(x, name), ml_dtypes_encode(x, name))


def test_every_scale_byte_decodes_as_in_gfloat_and_ml_dtypes() -> None:
    scale_bytes = np.arange(256, dtype=np.uint8)
    values = reference.scale_value(torch.from_numpy(scale_bytes)).numpy()
    info = gfloat_formats.format_info_ocp_e8m0
    assert_same_floats(values, np.array([gfloat.decode_float(info, int(byte)).fval for byte in scale_bytes]))
    assert_same_floats(values, scale_bytes.view(ml_dtypes.float8_e8m0fnu).astype(np.float32))
    assert values[0] == 2.0**-127
    assert np.isnan(values[255])


def scale_edges(name: str) -> list[int]:
    """float32 mantissas where a scale rounding may change its mind, each with its neighbours."""
    fmt = elem_format(name)
    max_mantissa = round(math.frexp(fmt.max_value)[0] * 2**24) - 2**23
    half_step = 2 ** (22 - fmt.mantissa_bits)
    edges = (0, max_mantissa, max_mantissa + half_step, 2**23 - half_step, 2**22)
    around = (mantissa + ulp for mantissa in edges for ulp in (-1, 0, 1))
    return sorted({mantissa % 2**23 for mantissa in around})


@per_rounding
@per_format
def test_the_scale_at_every_exponent_and_edge_is_the_exact_one(name: str, rounding: ScaleRounding) -> None:
    bits = [exponent << 23 | mantissa for exponent in range(255) for mantissa in scale_edges(name)]
    amax = np.array(bits, dtype=np.int32).view(np.float32)
    actual = reference.scale_byte(torch.from_numpy(amax), elem_format(name), rounding).tolist()
    assert actual == [exact_scale_byte(value, name, rounding) for value in amax.tolist()]


@per_rounding
@per_format
@given(amax=st.floats(0.0, allow_infinity=False, allow_nan=False, width=32))
def test_the_scale_of_any_amax_is_the_exact_one(name: str, rounding: ScaleRounding, amax: float) -> None:
    actual = int(reference.scale_byte(torch.tensor(amax), elem_format(name), rounding))
    assert actual == exact_scale_byte(amax, name, rounding)


@per_format
def test_floor_is_the_scale_that_gfloat_computes(name: str) -> None:
    bits = [exponent << 23 | mantissa for exponent in range(255) for mantissa in scale_edges(name)]
    amax = np.array(bits, dtype=np.int32).view(np.float32)
    actual = reference.scale_byte(torch.from_numpy(amax), elem_format(name), ScaleRounding.FLOOR)
    expected = [gfloat.compute_scale_amax(GFLOAT[name].emax, np.array([value])) for value in amax.tolist()]
    np.testing.assert_array_equal(reference.scale_value(actual).numpy(), np.array(expected))


@per_rounding
@per_format
def test_an_infinite_or_nan_amax_gives_scale_255_whatever_its_sign_and_payload(
    name: str, rounding: ScaleRounding
) -> None:
    amax = torch.from_numpy(np.array(NAN_AND_INF_BITS, dtype=np.uint32).view(np.float32))
    assert reference.scale_byte(amax, elem_format(name), rounding).eq(255).all()


def test_an_unknown_format_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="elem_format must be one of e2m1, e2m3, e3m2, e4m3, e5m2, got 'e1m2'"):
        elem_format("e1m2")


def test_an_unknown_scale_rounding_is_refused() -> None:
    with pytest.raises(ValueError, match="'nearest' is not a valid ScaleRounding"):
        reference.scale_byte(torch.ones(1), elem_format("e2m1"), "nearest")  # type: ignore[arg-type]


def test_the_format_table_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        ELEM_FORMATS["e2m1"] = elem_format("e4m3")  # type: ignore[index]
    with pytest.raises(AttributeError):
        elem_format("e2m1").bias = 3  # type: ignore[misc]


OUTSIDE = ElemFormat(
    name="e2m2", exponent_bits=2, mantissa_bits=2, bias=1, emax=2, max_value=7.0, max_code=0x0F, e4m3_shift=None,
    in_memory="e2m2",
)  # fmt: skip


@per_rounding
def test_a_format_from_outside_quantizes_without_a_change_here(rounding: ScaleRounding) -> None:
    """A row is all that the codec, scales and rounding take. To be a segment of a split a format needs packing, too."""
    x = torch.randn(50, 64) * torch.exp2(torch.randint(-9, 9, (50, 1)))
    codes, scale = reference.quantize(x, OUTSIDE, scale_rounding=rounding)
    assert int(codes.max()) < 2**OUTSIDE.bits
    values = reference.decode(torch.arange(32, dtype=torch.uint8), OUTSIDE)
    assert values[: OUTSIDE.max_code + 1].tolist() == [
        *(n / 4 for n in range(8)),
        *(n / 2 for n in range(4, 8)),
        4,
        5,
        6,
        7,
    ]
    factor = reference.scale_value(scale).repeat_interleave(32, 1)
    nearest = (x[..., None] / factor[..., None] - values).abs().amin(-1) * factor
    assert torch.equal((reference.dequantize(codes, scale, OUTSIDE) - x).abs(), nearest)


def test_facts_about_formats_do_not_rename_compiled_kernels() -> None:
    """Their cache knows the table by its repr, and none of them reads these."""
    for fmt in ELEM_FORMATS.values():
        assert "planes" not in repr(fmt)
        assert "in_memory" not in repr(fmt)

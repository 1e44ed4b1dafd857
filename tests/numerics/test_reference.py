"""Block quantization, the reordered activation and the mixed product against independent oracles."""

from __future__ import annotations

import gfloat
import numpy as np
import pytest
import torch
from gfloat import formats as gfloat_formats
from hypothesis import example, given
from hypothesis import strategies as st
from support.oracles import (
    assert_same_floats,
    every_code,
    exact_scale_byte,
    gfloat_encode,
    ml_dtypes_encode,
    oracle_dequantize,
    oracle_quantize,
    per_format,
    per_rounding,
)
from support.strategies import (
    NAN_AND_INF_BITS,
    Block,
    ReorderCase,
    elem_formats,
    finite_blocks,
    float_dtypes,
    lattice_blocks,
    matrices,
    permutations,
    reorder_cases,
    scale_roundings,
)
from torch import Tensor

from micromix_compile.numerics import reference
from micromix_compile.numerics.checks import check_split
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding, elem_format
from micromix_compile.numerics.reference import dequantize, quantize, reorder_quantize

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


Quantized = tuple[np.ndarray, np.ndarray]


def assert_quantized(actual: tuple[Tensor, Tensor], expected: Quantized) -> None:
    """Equal bytes: scale, then codes."""
    assert all(part.dtype == torch.uint8 for part in actual)
    np.testing.assert_array_equal(actual[1].numpy(), expected[1])
    np.testing.assert_array_equal(actual[0].numpy(), expected[0])


def same_bytes(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


def segments(case: ReorderCase) -> list[tuple[str, Tensor]]:
    """(format, channels) of the three segments of x[:, perm], where -1 reads a column of zeros put after the last."""
    padded = torch.cat((case.x, torch.zeros(case.x.shape[0], 1)), dim=1)
    reordered = padded[:, case.channel_perm.long()]
    return list(zip(("e2m1", case.fp6, "e4m3"), reordered.split(case.split, dim=1), strict=True))


@per_rounding
@per_format
@given(x=matrices())
@example(x=torch.zeros(2, 64))
@example(x=torch.full((1, 32), -0.0))
@example(x=torch.full((1, 32), torch.finfo(torch.float32).max))
@example(x=torch.full((1, 32), 2.0**-149))
def test_codes_and_scales_are_the_oracles(name: str, rounding: ScaleRounding, x: Tensor) -> None:
    actual = quantize(x, name, scale_rounding=rounding)
    assert_quantized(actual, oracle_quantize(x, name, rounding, gfloat_encode))
    assert_quantized(actual, oracle_quantize(x, name, rounding, ml_dtypes_encode))


@per_rounding
@per_format
@given(block=finite_blocks)
def test_dequantized_blocks_are_those_of_gfloats_block_quantization(
    name: str, rounding: ScaleRounding, block: Block
) -> None:
    def compute_scale(emax: float, values: np.ndarray) -> float:
        if rounding == ScaleRounding.FLOOR:  # the rule that gfloat has itself
            return gfloat.compute_scale_amax(emax, values)
        return 2.0 ** (exact_scale_byte(float(np.abs(values).max()), name, rounding) - 127)

    kind = {"e2m1": "mxfp4", "e2m3": "mxfp6", "e3m2": "mxfp6", "e4m3": "mxfp8", "e5m2": "mxfp8"}[name]
    info = getattr(gfloat_formats, f"format_info_{kind}_{name}")
    expected = gfloat.quantize_block(info, block.astype(np.float64), compute_scale)
    actual = dequantize(*quantize(torch.from_numpy(block), name, scale_rounding=rounding), name)
    with np.errstate(over="ignore"):  # values that round up to 2**128
        assert_same_floats(actual.numpy(), expected.astype(np.float32))


@per_format
def test_every_code_under_every_scale_byte_dequantizes_to_the_rounded_exact_product(name: str) -> None:
    codes = np.tile(np.resize(every_code(name), max(BLOCK_SIZE, every_code(name).size)), (256, 1))
    scale = np.repeat(np.arange(256, dtype=np.uint8)[:, None], codes.shape[1] // BLOCK_SIZE, axis=1)
    with np.errstate(over="ignore"):  # the largest codes under the largest scales are infinite in float32
        expected = oracle_dequantize(codes, scale, name).astype(np.float32)
    assert_same_floats(dequantize(torch.from_numpy(codes), torch.from_numpy(scale), name).numpy(), expected)


@given(x=matrices(lattice_blocks(max_exponent=110)), name=elem_formats, rounding=scale_roundings)
def test_dequantized_values_quantize_to_themselves(x: Tensor, name: str, rounding: ScaleRounding) -> None:
    once = dequantize(*quantize(x, name, scale_rounding=rounding), name)
    again = dequantize(*quantize(once, name, scale_rounding=rounding), name)
    assert torch.equal(again, once)


@pytest.mark.parametrize("bits", NAN_AND_INF_BITS)
@per_format
def test_a_nan_or_infinity_poisons_its_own_block_and_no_other(name: str, bits: int) -> None:
    clean = torch.randn(3, 4 * BLOCK_SIZE)
    codes, scale = quantize(clean, name)
    for position in range(BLOCK_SIZE):
        x = clean.clone()
        x.numpy().view(np.uint32)[1, BLOCK_SIZE + position] = bits
        expected_codes, expected_scale = codes.clone(), scale.clone()
        expected_codes[1, BLOCK_SIZE : 2 * BLOCK_SIZE], expected_scale[1, 1] = 0, 255
        assert same_bytes(quantize(x, name), (expected_codes, expected_scale))
        poisoned = dequantize(expected_codes, expected_scale, name).isnan().unflatten(1, (4, BLOCK_SIZE))
        assert poisoned[1, 1].all()
        assert poisoned.sum() == BLOCK_SIZE


@per_rounding
@per_format
def test_a_block_of_zeros_has_scale_byte_0_and_keeps_its_signs(name: str, rounding: ScaleRounding) -> None:
    x = torch.tensor([0.0, -0.0]).repeat(1, BLOCK_SIZE // 2)
    codes, scale = quantize(x, name, scale_rounding=rounding)
    assert scale.tolist() == [[0]]
    assert codes.tolist() == [[0, 1 << (elem_format(name).bits - 1)] * (BLOCK_SIZE // 2)]


@per_format
def test_the_largest_magnitude_saturates_under_floor_and_does_not_under_rceil(name: str) -> None:
    fmt = elem_format(name)
    amax = 0.999 * 2.0 ** (fmt.emax + 1)  # between max_value and the next power of two
    x = torch.zeros(1, BLOCK_SIZE)
    x[0, 3], x[0, 5] = amax, -amax
    sign = 1 << (fmt.bits - 1)
    codes, scale = quantize(x, name, scale_rounding=ScaleRounding.FLOOR)
    assert (scale.item(), codes[0, 3].item(), codes[0, 5].item()) == (127, fmt.max_code, fmt.max_code | sign)
    codes, scale = quantize(x, name, scale_rounding=ScaleRounding.RCEIL)
    assert scale.item() == 128
    assert codes[0, 3].item() < fmt.max_code


@given(x=matrices(finite_blocks), name=elem_formats)
def test_no_element_is_further_off_with_fit_than_with_rceil(x: Tensor, name: str) -> None:
    fit, rceil = (
        (dequantize(*quantize(x, name, scale_rounding=rounding), name) - x).double().abs()
        for rounding in (ScaleRounding.FIT, ScaleRounding.RCEIL)
    )
    assert (fit <= rceil).all()


@given(x=matrices(), name=elem_formats, rounding=scale_roundings, dtype=float_dtypes)
def test_half_precision_quantizes_as_its_float32_cast(
    x: Tensor, name: str, rounding: ScaleRounding, dtype: torch.dtype
) -> None:
    half = x.to(dtype)
    actual = quantize(half, name, scale_rounding=rounding)
    assert_quantized(actual, oracle_quantize(half.to(torch.float32), name, rounding, gfloat_encode))


@given(x=matrices(), name=elem_formats)
def test_strides_and_leading_dimensions_do_not_change_the_bytes(x: Tensor, name: str) -> None:
    codes, scale = quantize(x, name)
    assert same_bytes(quantize(x.T.contiguous().T, name), (codes, scale))
    assert same_bytes(quantize(x[:, None, None], name), (codes[:, None, None], scale[:, None, None]))


def test_quantizing_leaves_its_input_alone() -> None:
    x = torch.randn(2, 64)
    before = x.clone()
    quantize(x, "e2m1")
    reorder_quantize(x, torch.arange(63, -1, -1), (32, 32, 0), fp6="e3m2")
    assert torch.equal(x, before)


@pytest.mark.parametrize(("name", "decibels"), [("e2m1", 18.8), ("e3m2", 25.5), ("e2m3", 30.9), ("e4m3", 31.5)])
def test_the_signal_to_noise_ratio_on_gaussian_blocks_is_the_known_one(name: str, decibels: float) -> None:
    x = torch.randn(8192, BLOCK_SIZE)
    error = dequantize(*quantize(x, name), name) - x
    sqnr_db = 10 * torch.log10(x.square().sum() / error.square().sum()).item()
    assert sqnr_db == pytest.approx(decibels, abs=0.3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool, torch.complex64])
def test_another_dtype_is_refused_by_name(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 64).to(dtype)
    with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
        quantize(x, "e2m1")
    with pytest.raises(TypeError, match=f"x must be float32, bfloat16 or float16, got {dtype}"):
        reorder_quantize(x, torch.arange(64), (64, 0, 0), fp6="e2m3")


@pytest.mark.parametrize("channels", [1, 31, 33, 100])
def test_channels_that_are_no_whole_blocks_are_refused_with_their_count(channels: int) -> None:
    with pytest.raises(ValueError, match=f"the last dimension must be a multiple of 32, got {channels}"):
        quantize(torch.zeros(2, channels), "e2m1")


@given(case=reorder_cases())
@example(case=ReorderCase(torch.zeros(0, 64), torch.arange(64), (32, 0, 32), "e2m3", ScaleRounding.RCEIL))
def test_reorder_quantize_equals_each_segment_quantized_by_the_oracle(case: ReorderCase) -> None:
    q4, q6, q8, scale = reorder_quantize(
        case.x, case.channel_perm, case.split, fp6=case.fp6, scale_rounding=case.scale_rounding
    )
    (codes4, scale4), (codes6, scale6), (codes8, scale8) = (
        oracle_quantize(part, name, case.scale_rounding, gfloat_encode) for name, part in segments(case)
    )
    s4, s6, s8 = scale.split([k // BLOCK_SIZE for k in case.split], dim=1)
    assert_quantized((q4, s4), (codes4[:, 0::2] + 16 * codes4[:, 1::2], scale4))
    assert_quantized((q8, s8), (codes8, scale8))
    assert q6.dtype == torch.uint8
    with np.errstate(over="ignore"):
        expected6 = oracle_dequantize(codes6, scale6, case.fp6).astype(np.float32)
        actual6 = oracle_dequantize(q6.numpy(), s6.numpy(), "e4m3").astype(np.float32)
    assert_same_floats(actual6, expected6)
    np.testing.assert_array_equal(s6.numpy() == 255, scale6 == 255)


@given(case=reorder_cases())
def test_a_dequantized_activation_has_the_values_of_its_segments(case: ReorderCase) -> None:
    quantized = reorder_quantize(
        case.x, case.channel_perm, case.split, fp6=case.fp6, scale_rounding=case.scale_rounding
    )
    values = [
        oracle_dequantize(*oracle_quantize(part, name, case.scale_rounding, gfloat_encode), name)
        for name, part in segments(case)
    ]
    with np.errstate(over="ignore"):
        expected = np.concatenate(values, axis=1).astype(np.float32)
    assert_same_floats(reference.dequantize_activation(*quantized).numpy(), expected)


@given(data=st.data(), channels=st.integers(1, 128))
def test_an_index_of_minus_one_reads_as_zero_even_beside_nan(data: st.DataObject, channels: int) -> None:
    channel_perm = data.draw(permutations(channels))
    reordered = reference.reorder(torch.full((2, channels), torch.nan), channel_perm)
    assert torch.equal(reordered.isnan(), (channel_perm >= 0).expand(2, -1))
    assert reordered[:, channel_perm < 0].eq(0).all()
    assert not reordered[:, channel_perm < 0].signbit().any()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_any_index_width_gives_the_same_bytes(dtype: torch.dtype) -> None:
    x, perm = torch.randn(3, 96), torch.randperm(96)
    expected = reorder_quantize(x, perm, (32, 32, 32), fp6="e2m3")
    assert same_bytes(reorder_quantize(x, perm.to(dtype), (32, 32, 32), fp6="e2m3"), expected)


@pytest.mark.parametrize(
    ("split", "channels", "message"),
    [
        ((-32, 64, 0), 32, "k4 must be a non-negative multiple of 32, got -32"),
        ((0, 33, 31), 64, "k6 must be a non-negative multiple of 32, got 33"),
        ((0, 32, 16), 48, "k8 must be a non-negative multiple of 32, got 16"),
        ((32, 32, 32), 64, r"split \(32, 32, 32\) sums to 96, but channel_perm has 64 entries"),
        ((0, 0, 0), 32, r"split \(0, 0, 0\) sums to 0, but channel_perm has 32 entries"),
    ],
)
def test_a_bad_split_is_refused_with_its_values(split: tuple[int, int, int], channels: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_split(split, channels)
    with pytest.raises(ValueError, match=message):
        reorder_quantize(torch.zeros(1, channels), torch.arange(channels), split, fp6="e2m3")


def test_bad_arguments_of_reorder_quantize_are_refused_by_name() -> None:
    x, perm = torch.zeros(2, 32), torch.arange(32)
    with pytest.raises(ValueError, match=r"x must be 2-dimensional \(M, C\), got shape \(1, 2, 32\)"):
        reorder_quantize(x[None], perm, (32, 0, 0), fp6="e2m3")
    with pytest.raises(ValueError, match="fp6 must be one of e2m3, e3m2, got 'e4m3'"):
        reorder_quantize(x, perm, (32, 0, 0), fp6="e4m3")
    with pytest.raises(TypeError, match=r"channel_perm must be int16, int32 or int64, got torch\.float32"):
        reorder_quantize(x, perm.float(), (32, 0, 0), fp6="e2m3")

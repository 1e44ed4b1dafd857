"""Activations of another format than their weights', and rotated ones, against independent oracles."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.oracles import exact_scale_byte, gfloat_encode, per_rounding
from support.strategies import (
    ReorderCase,
    activation_formats,
    blocks,
    finite_blocks,
    matrices,
    reorder_cases,
    scale_roundings,
)
from torch import Tensor

from micromix_compile.numerics import reference, rotation
from micromix_compile.numerics.formats import BLOCK_SIZE, E8M0_NAN, ScaleRounding
from micromix_compile.numerics.layout import activation_shapes, activation_split
from micromix_compile.numerics.reference import QuantizedActivation

pytestmark = pytest.mark.usefixtures("nan_filled_memory")


def quantized(case: ReorderCase, activations: str, rotated: int = 0) -> QuantizedActivation:
    x, perm, split, fp6, rounding = case
    return reference.reorder_quantize(
        x, perm, split, fp6=fp6, scale_rounding=rounding, activations=activations, rotated=rotated
    )


def same_bytes(a: QuantizedActivation, b: QuantizedActivation) -> bool:
    return all(torch.equal(left, right) for left, right in zip(a, b, strict=True))


@given(x=matrices(finite_blocks), rounding=scale_roundings)
@example(x=torch.zeros(2, 32), rounding=ScaleRounding.FIT)
@example(x=torch.full((1, 32), 2.0**-149), rounding=ScaleRounding.FLOOR)
def test_the_scale_of_a_row_is_the_oracles_of_its_largest_but_1_at_least(x: Tensor, rounding: ScaleRounding) -> None:
    expected = [max(exact_scale_byte(float(row.abs().max()) if row.numel() else 0.0, "e4m3", rounding), 1) for row in x]
    assert reference.row_scale_byte(x, rounding).tolist() == expected


@given(case=reorder_cases(of=finite_blocks))
def test_fp8_codes_are_the_oracles_under_the_scale_of_the_row(case: ReorderCase) -> None:
    q4, q6, q8, scale = quantized(case, "fp8")
    byte = reference.row_scale_byte(case.x, case.scale_rounding)
    assert not q4.numel()
    assert not q6.numel()
    assert torch.equal(scale, byte[:, None].expand_as(scale).to(torch.uint8))
    rows = reference.reorder(case.x, case.channel_perm).double().numpy()
    scaled = np.ldexp(rows, 127 - byte.numpy()[:, None])
    np.testing.assert_array_equal(q8.numpy(), gfloat_encode(scaled, "e4m3"))


@per_rounding
@pytest.mark.parametrize("bad", [torch.nan, -torch.nan, torch.inf, -torch.inf])
def test_under_fp8_a_nan_or_infinity_poisons_its_row_whether_it_is_read_or_not(
    rounding: ScaleRounding, bad: float
) -> None:
    x, perm = torch.randn(3, 65), torch.arange(64)
    x[1, 64] = bad
    for rotated in (0, 32):
        case = ReorderCase(x, perm, (32, 0, 32), "e2m3", rounding)
        _, _, q8, scale = quantized(case, "fp8", rotated)
        assert (scale == E8M0_NAN).all(1).tolist() == [False, True, False]
        assert not bool((scale == E8M0_NAN)[[0, 2]].any())
        assert not bool(q8[1].any())


@given(case=reorder_cases())
def test_mxfp6_is_the_two_wide_formats_side_by_side(case: ReorderCase) -> None:
    k4, k6, k8 = case.split
    _, q6, q8, scale = quantized(case._replace(split=(0, k4 + k6, k8)), "same")
    nothing = q8[:, :0]
    assert same_bytes(quantized(case, "mxfp6"), QuantizedActivation(nothing, nothing, torch.cat((q6, q8), 1), scale))


@given(case=reorder_cases(of=blocks), activations=activation_formats, count=st.integers(0, 5))
def test_rotated_activations_are_those_of_rotated_rows(case: ReorderCase, activations: str, count: int) -> None:
    """Under "fp8" in a row that has another largest value, so there the scale of the row as it came is put in."""
    rotated = min(count * BLOCK_SIZE, sum(case.split))
    actual = quantized(case, activations, rotated)
    rows = rotation.rotate_activation(reference.reorder(case.x, case.channel_perm).to(torch.float32), rotated)
    if activations == "fp8":
        finite = case.x.nan_to_num(nan=torch.inf, posinf=torch.inf, neginf=torch.inf)
        rows = torch.cat((rows, finite.abs().amax(1, keepdim=True)), 1)
    expected = case._replace(x=rows, channel_perm=torch.arange(sum(case.split)))
    assert same_bytes(actual, quantized(expected, activations))


@given(case=reorder_cases(), activations=activation_formats)
def test_quantized_activations_have_the_shapes_of_their_own_split(case: ReorderCase, activations: str) -> None:
    """And memory of their own, as the results of a custom op must."""
    shapes = activation_shapes(case.x.shape[0], activation_split(case.split, activations))
    parts = quantized(case, activations)
    assert tuple(part.shape for part in parts) == shapes
    assert len({part.untyped_storage()._cdata for part in parts}) == len(parts)


@pytest.mark.parametrize("rotated", [16, -32, 96])
def test_a_part_of_a_block_or_more_than_there_is_cannot_be_rotated(rotated: int) -> None:
    case = ReorderCase(torch.zeros(2, 64), torch.arange(64), (32, 0, 32), "e2m3", ScaleRounding.FIT)
    with pytest.raises(ValueError, match=f"rotated must be a multiple of 32 from 0 to 64, got {rotated}"):
        quantized(case, "same", rotated)
    with pytest.raises(ValueError, match="activations must be one of same, fp8, mxfp6, got 'fp4'"):
        quantized(case, "fp4")

"""A weight is known again in every dtype, and an edit of one element is seen."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile.recipe import fingerprint
from micromix_compile.recipe.fingerprint import Checksums, same_sample, weight_sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
INTEGERS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


def odd_weight(dtype: torch.dtype) -> Tensor:
    """With values that float16 takes for zero, subnormal and infinite."""
    return torch.cat((torch.randn(5, 64), torch.randn(2, 64) * 1e-7, torch.full((1, 64), 1e30))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_weight_is_recognized_after_rounding_and_told_from_another(dtype: torch.dtype) -> None:
    weight = torch.randn(48, 64) * 0.02
    assert same_sample(weight_sample(weight), weight_sample(weight.to(dtype)))
    assert not same_sample(weight_sample(weight), weight_sample(torch.randn(48, 64) * 0.02))


@pytest.mark.parametrize("made", DTYPES)
@pytest.mark.parametrize("met", DTYPES)
def test_a_conversion_is_no_change(made: torch.dtype, met: torch.dtype) -> None:
    weight = odd_weight(made)
    assert Checksums.of(weight).fit(weight.to(met))
    assert Checksums.of(weight).fit(weight.T.contiguous().T.to(met))  # as Conv1D holds it
    assert Checksums.of(weight.to(met)).fit(weight)  # calibrated as a converted copy
    assert Checksums.of(weight).fit(weight.double())
    for between in DTYPES:
        moderate = torch.randn(5, 64).to(made)
        if not {made, met, between} >= {torch.bfloat16, torch.float16}:  # which hold different values
            assert Checksums.of(moderate).fit(moderate.to(between).to(met))


@given(st.sampled_from(DTYPES), st.sampled_from(DTYPES), st.integers(0, 6), st.integers(0, 8), st.integers(0, 15))
def test_a_change_of_one_bit_is_seen(dtype: torch.dtype, made: torch.dtype, row: int, column: int, bit: int) -> None:
    weight = torch.randn(7, 9).to(made).to(dtype)
    checksums = Checksums.of(weight)
    weight.view(INTEGERS[dtype])[row, column] ^= 1 << bit if bit < 15 else -(1 << 15)
    assert not checksums.fit(weight)


@pytest.mark.parametrize("factor", [2.0, 0.5, 4.0, -1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_weight_times_a_power_of_two_is_another(dtype: torch.dtype, factor: float) -> None:
    weight = torch.randn(256, 256).to(dtype)  # all bits change by the same number
    assert not Checksums.of(weight).fit(weight * factor)


def test_rows_that_change_places_are_seen() -> None:
    weight = torch.randn(7, 9)
    assert not Checksums.of(weight).fit(weight.flip(0))
    assert not Checksums.of(weight).fit(weight.flip(1))


def test_checksums_do_not_depend_on_how_many_elements_are_summed_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(7, 9)
    whole = Checksums.of(weight)
    for chunk in (1, 9, 20, 62):
        monkeypatch.setattr(fingerprint, "_CHUNK", chunk)
        assert Checksums.of(weight) == whole


@pytest.mark.parametrize("shape", [(0, 4), (4, 0)])
def test_an_empty_weight_has_some(shape: tuple[int, int]) -> None:
    assert Checksums.of(torch.empty(shape)).fit(torch.empty(shape))


def test_plain_values_and_back() -> None:
    checksums = Checksums.of(torch.randn(3, 4))
    assert Checksums(**checksums.to_json()) == checksums

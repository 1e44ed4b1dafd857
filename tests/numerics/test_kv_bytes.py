"""Keys and values as bytes: what is written against independent libraries, what is read for every byte."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from support.oracles import exact_scale_byte, gfloat_encode
from support.strategies import blocks, matrices, scale_roundings

from micromix_compile.numerics import reference
from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.numerics.kv_cache import (
    CACHE_FORMATS,
    block_of,
    dequantize_kv,
    keep_position,
    keep_recent,
    put_states,
    read_kv,
    write_kv,
)

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.numerics.formats import ScaleRounding

E4M3_NAN = 0x7F


def written(x: Tensor, block_size: int, rounding: str) -> tuple[Tensor, Tensor]:
    """Codes and scales of rows (M, D), as keys of one head."""
    key = x[None, None]
    q = torch.zeros(key.shape, dtype=torch.uint8)
    scale = torch.zeros((*key.shape[:3], x.shape[1] // block_size), dtype=torch.uint8)
    write_kv(key, key, torch.arange(len(x)), q, scale, q.clone(), scale.clone(), rounding)
    return q[0, 0], scale[0, 0]


@given(matrices(blocks), scale_roundings)
def test_mxfp8_is_what_mx_has(x: Tensor, rounding: ScaleRounding) -> None:
    x = x if x.numel() else torch.ones(1, 32)
    codes, scale = reference.quantize(x, "e4m3", scale_rounding=rounding)
    q, byte = written(x, 32, str(rounding))
    assert torch.equal(q, codes)
    assert torch.equal(byte, scale)


@given(matrices(blocks), scale_roundings)
def test_fp8_has_the_scale_of_the_whole_head_and_the_nearest_codes(x: Tensor, rounding: ScaleRounding) -> None:
    x = x if x.numel() else torch.ones(1, 32)
    q, byte = written(x, x.shape[1], str(rounding))
    for row, codes, scale in zip(x.double().numpy(), q.numpy(), byte.flatten().tolist(), strict=True):
        largest = np.abs(row).max()
        if not np.isfinite(largest):
            assert scale == 255
            assert not codes.any()
            continue
        assert scale == exact_scale_byte(float(largest), "e4m3", rounding)
        np.testing.assert_array_equal(codes, gfloat_encode(np.ldexp(row, 127 - scale), "e4m3"))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("block_size", [1, 16, 256])
def test_every_code_with_every_scale_reads_as_the_reference_has_it(dtype: torch.dtype, block_size: int) -> None:
    """A cache of 256 tokens, each with all codes but E4M3's NaN, which nothing writes, and a scale of its own."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = torch.where((codes & E4M3_NAN) == E4M3_NAN, 0, codes)
    q = codes.expand(1, 1, 256, 256).contiguous()
    scale = torch.arange(256, dtype=torch.uint8)[None, None, :, None].repeat(1, 1, 1, 256 // block_size)
    got = dequantize_kv(q, scale, dtype)
    want = reference.dequantize(q, scale, "e4m3", block_size=block_size).to(dtype)
    assert got.dtype == dtype
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())
    assert torch.equal(got.signbit() | got.isnan(), want.signbit() | want.isnan())


@pytest.mark.parametrize("slots", [0, 1, 3, 8])
@pytest.mark.parametrize("calls", [[[0, 1, 2, 3, 4]], [[0, 1], [2], [3], [4, 5]], [[0, 1, 2, 3, 4], [1, 2]]])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_own_and_recent_tokens_are_read_as_they_came_and_others_from_bytes(
    slots: int, calls: list[list[int]], cache_format: str
) -> None:
    """Positions that are written again are read as they came last."""
    q = torch.zeros((2, 3, 6, 64), dtype=torch.uint8)
    scale = torch.zeros((2, 3, 6, 64 // block_of(cache_format, 64)), dtype=torch.uint8)
    recent, recent_position = torch.zeros(2, 3, slots, 64), torch.full((slots,), -1)
    came, exact = torch.zeros(2, 3, 6, 64), [-1] * slots
    for positions in calls:
        position, new = torch.tensor(positions), torch.randn(2, 3, len(positions), 64)
        values = read_kv(q, scale, recent, recent_position)
        write_kv(new, new, position, q, scale, q.clone(), scale.clone(), "fit")
        keep_recent(recent, new, position)
        keep_position(recent_position, position)
        got = put_states(values, new, position)
        came[:, :, positions] = new
        from_bytes = [place for place in range(6) if place not in {*positions, *exact}]
        as_they_came = [place for place in range(6) if place not in from_bytes]
        assert torch.equal(got[:, :, as_they_came], came[:, :, as_they_came])
        assert torch.equal(got[:, :, from_bytes], dequantize_kv(q, scale, torch.float32)[:, :, from_bytes])
        for place in positions if slots else []:
            exact[place % slots] = place


def test_heads_that_have_no_whole_blocks_and_other_names_are_refused() -> None:
    assert (block_of("fp8", 80), block_of("mxfp8", 96)) == (80, 32)
    with pytest.raises(ValueError, match=r"'mxfp8' takes heads of a multiple of 32 channels, got 80; 'fp8' takes any"):
        block_of("mxfp8", 80)
    with pytest.raises(ValueError, match=r"cache_format must be one of fp8, mxfp8, got 'int8'"):
        block_of("int8", 64)

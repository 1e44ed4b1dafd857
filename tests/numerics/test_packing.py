"""Byte layouts: exhaustive round trips, sizes, and the move of FP6 codes into E4M3 bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile.numerics import packing
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS, FP6_FORMATS, elem_format
from micromix_compile.numerics.reference import decode, dequantize

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("nan_filled_memory")]

per_fp6 = pytest.mark.parametrize("fp6", FP6_FORMATS)


def aligned_codes(fp6: str) -> Tensor:
    """(64,) uint8: every FP6 code as an E4M3 byte, in order."""
    codes = torch.arange(64, dtype=torch.uint8)[None]
    return packing.align_fp6(codes, torch.full((1, 2), 127, dtype=torch.uint8), fp6)[0][0]


def every_code_at_every_position(fp6: str, background: int) -> Tensor:
    """(32 * 64, 32) E4M3 bytes: row 64 p + c holds code c at position p and the code `background` elsewhere."""
    aligned = aligned_codes(fp6)
    rows = aligned[background].repeat(BLOCK_SIZE, 64, BLOCK_SIZE)
    for position in range(BLOCK_SIZE):
        rows[position, :, position] = aligned
    return rows.flatten(0, 1)


@pytest.mark.parametrize("name", ["e2m1", "e2m3", "e3m2", "e4m3"])
def test_every_fp4_and_fp6_code_is_an_e4m3_code_times_a_constant(name: str) -> None:
    fmt = elem_format(name)
    assert fmt.e4m3_shift is not None
    codes = torch.arange(1 << fmt.bits, dtype=torch.uint8)
    sign = codes >> (fmt.bits - 1) << 7
    magnitude = (codes & ((1 << (fmt.bits - 1)) - 1)) << (3 - fmt.mantissa_bits)
    expected = decode(sign | magnitude, elem_format("e4m3")) * 2.0**fmt.e4m3_shift
    torch.testing.assert_close(decode(codes, fmt), expected, rtol=0, atol=0, equal_nan=True)


def test_only_e5m2_has_no_place_in_e4m3() -> None:
    assert [fmt.name for fmt in ELEM_FORMATS.values() if fmt.e4m3_shift is None] == ["e5m2"]


@per_fp6
def test_aligned_codes_mean_the_same_under_every_scale_byte(fp6: str) -> None:
    # 0..254 includes the scales near the top of float32, where the code takes what the scale byte cannot hold.
    scale = torch.arange(256, dtype=torch.uint8)[:, None].expand(-1, 2)
    codes = torch.arange(64, dtype=torch.uint8).expand(256, -1)
    aligned, baked = packing.align_fp6(codes, scale, fp6)
    actual, expected = dequantize(aligned, baked, "e4m3"), dequantize(codes, scale, fp6)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit()[:255], expected.signbit()[:255])
    assert torch.equal(baked == 255, scale == 255)
    assert torch.equal(aligned[255], aligned_codes(fp6))


@per_fp6
def test_the_constant_is_in_the_scale_byte_while_it_fits(fp6: str) -> None:
    shift = elem_format(fp6).e4m3_shift
    assert shift is not None
    scale = torch.arange(255, dtype=torch.uint8)[:, None]
    _, baked = packing.align_fp6(torch.zeros(255, 32, dtype=torch.uint8), scale, fp6)
    assert torch.equal(baked.int(), (scale.int() + shift).clamp(max=254))


@pytest.mark.parametrize("background", [0, 63, 42])
@per_fp6
def test_every_fp6_code_at_every_position_survives_packing(fp6: str, background: int) -> None:
    aligned = every_code_at_every_position(fp6, background)
    assert torch.equal(packing.unpack_fp6(packing.pack_fp6(aligned, fp6), fp6), aligned)


@per_fp6
def test_each_plane_shows_its_own_quarter_in_the_bits_that_codes_use(fp6: str) -> None:
    used = int(np.bitwise_or.reduce(aligned_codes(fp6).numpy()))
    assert used.bit_count() == 6
    aligned = every_code_at_every_position(fp6, 63)
    planes = packing.pack_fp6(aligned, fp6)
    for j in range(3):
        assert torch.equal(planes[j] & used, aligned[:, 8 * j : 8 * j + 8])


@per_fp6
def test_a_code_changes_only_the_bytes_of_its_own_column(fp6: str) -> None:
    packed = packing.pack_fp6(every_code_at_every_position(fp6, 0), fp6).unflatten(1, (BLOCK_SIZE, 64))
    touched = packed.ne(0).any(2)  # (3, position, byte)
    assert torch.equal(touched.any(0), torch.eye(8, dtype=torch.bool).repeat(4, 1))
    own_plane = torch.eye(3, dtype=torch.bool).repeat_interleave(8, 1)  # (3, 24): position p lies in plane p // 8
    assert torch.equal(touched.any(2)[:, :24], own_plane)


@given(rows=st.integers(0, 5), blocks=st.integers(0, 6), fp6=st.sampled_from(FP6_FORMATS), seed=st.integers(0, 2**32))
def test_fp6_matrices_of_any_size_survive_packing_in_six_bits_an_element(
    rows: int, blocks: int, fp6: str, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    channels = blocks * BLOCK_SIZE
    aligned = aligned_codes(fp6)[torch.randint(64, (rows, channels), generator=generator)]
    planes = packing.pack_fp6(aligned, fp6)
    assert planes.dtype == torch.uint8
    assert planes.shape == (3, rows, channels // 4)
    assert 8 * planes.numel() == 6 * aligned.numel()
    assert torch.equal(packing.unpack_fp6(planes, fp6), aligned)


@per_fp6
def test_packing_leaves_its_input_alone(fp6: str) -> None:
    aligned = every_code_at_every_position(fp6, 21)
    before = aligned.clone()
    packing.pack_fp6(aligned, fp6)
    assert torch.equal(aligned, before)


@per_fp6
def test_every_byte_that_is_no_aligned_code_is_refused_with_its_row(fp6: str) -> None:
    good = set(aligned_codes(fp6).tolist())
    for byte in range(256):
        rows = torch.zeros(3, 64, dtype=torch.uint8)
        rows[2, 37] = byte
        if byte in good:
            packing.pack_fp6(rows, fp6)
        else:
            with pytest.raises(ValueError, match="row 2 holds magnitudes above"):
                packing.pack_fp6(rows, fp6)


def test_codes_raised_past_their_six_bits_are_refused() -> None:
    codes = torch.full((2, 32), 0x1F, dtype=torch.uint8)
    aligned, _ = packing.align_fp6(codes, torch.tensor([[248], [249]], dtype=torch.uint8), "e2m3")
    packing.pack_fp6(aligned[:1], "e2m3")
    with pytest.raises(ValueError, match="row 1 holds magnitudes above"):
        packing.pack_fp6(aligned, "e2m3")


def test_every_pair_of_fp4_codes_shares_a_byte_with_the_even_one_low() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack((low, high), -1).reshape(16, 32).to(torch.uint8)
    packed = packing.pack_fp4(codes)
    assert torch.equal(packed.int(), (low + 16 * high).reshape(16, 16).int())
    assert torch.equal(packing.unpack_fp4(packed), codes)


@pytest.mark.parametrize("shape", [(0, 64), (3, 0), (0, 0)])
def test_empty_matrices_pack_to_empty_matrices(shape: tuple[int, int]) -> None:
    codes = torch.empty(shape, dtype=torch.uint8)
    rows, channels = shape
    assert packing.pack_fp4(codes).shape == (rows, channels // 2)
    assert packing.unpack_fp4(packing.pack_fp4(codes)).shape == shape
    for fp6 in FP6_FORMATS:
        aligned, _ = packing.align_fp6(codes, codes[:, ::32], fp6)
        assert packing.unpack_fp6(packing.pack_fp6(aligned, fp6), fp6).shape == shape


@pytest.mark.parametrize("fp6", ["e4m3", "e2m1", "fp6"])
def test_another_format_is_refused_with_the_two_fp6_formats(fp6: str) -> None:
    codes = torch.zeros(1, 32, dtype=torch.uint8)
    for call in (
        lambda: packing.align_fp6(codes, codes[:, :1], fp6),
        lambda: packing.pack_fp6(codes, fp6),
        lambda: packing.unpack_fp6(codes.expand(3, 1, 32), fp6),
    ):
        with pytest.raises(ValueError, match=f"fp6 must be one of e2m3, e3m2, got '{fp6}'"):
            call()


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=2), min_size=1, max_size=5))
def test_tensors_in_one_storage_are_copies_on_boundaries_with_versions_of_their_own(shapes: list[list[int]]) -> None:
    parts = [torch.randint(0, 256, shape, dtype=torch.uint8) for shape in shapes]
    copies = packing.in_one_storage(parts, torch.device("cpu"))
    assert len({copy.untyped_storage().data_ptr() for copy in copies}) == 1
    for copy, part in zip(copies, parts, strict=True):
        assert torch.equal(copy, part)
        assert copy.is_contiguous()
        assert copy.storage_offset() % 256 == 0
    versions = [copy._version for copy in copies]
    copies[0].zero_()
    assert [copy._version for copy in copies[1:]] == versions[1:]
    assert all(torch.equal(copy, part) for copy, part in zip(copies[1:], parts[1:], strict=True))

"""Bytes of others' MX weights, against compressed-tensors' own decompression and against their codes, one by one."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import preset_name_to_scheme
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.integrations.mx_bytes import (
    SCALE,
    THEIR_FORMATS,
    one_segment,
    pack_fp6_words,
    packed_from,
    packed_to,
    unpack_fp6_words,
)
from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.layout import packed_shapes

COMPRESSED = {"mxfp4": "mxfp4-pack-quantized", "mxfp6": "mxfp6-pack-quantized", "mxfp8": "mxfp8-quantized"}
HELD = [("mxfp4", "mxfp4"), ("mxfp4", "mxfp8"), ("mxfp6", "mxfp6"), ("mxfp6", "mxfp8"), ("mxfp8", "mxfp8")]


def every_code(form: str) -> torch.Tensor:
    """All codes but NaN, in rows of 32, filled up with zeros."""
    codes = torch.arange(2 ** THEIR_FORMATS[form].bits, dtype=torch.uint8)
    if form == "mxfp8":
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
    return torch.cat((codes, codes.new_zeros(-len(codes) % 32))).reshape(-1, 32)


def their_tensors(form: str, codes: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
    """codes: (N, K) uint8. scale: (N, K // 32) uint8."""
    pack = {"mxfp4": packing.pack_fp4, "mxfp6": pack_fp6_words, "mxfp8": lambda c: c.view(torch.float8_e4m3fn)}
    return {THEIR_FORMATS[form].codes: pack[form](codes), SCALE: scale}


def every_code_and_scale(form: str, scales: torch.Tensor) -> dict[str, torch.Tensor]:
    codes = every_code(form)
    rows = codes.repeat(len(scales), 1)
    return their_tensors(form, rows, scales.repeat_interleave(len(codes))[:, None])


def values(tensors: dict[str, torch.Tensor], form: str, held: str) -> torch.Tensor:
    return reference.dequantize_weight(*packed_from(tensors, form, held), "e2m3")


@pytest.mark.parametrize(("form", "held"), HELD)
def test_every_code_under_every_scale_has_the_value_that_its_format_gives_it(form: str, held: str) -> None:
    """All scales but those at the top that E4M3 bytes cannot carry; the NaN scale, too."""
    most = 254 if held == form != "mxfp6" else 248
    scales = torch.tensor([*range(most + 1), 255], dtype=torch.uint8)
    tensors = every_code_and_scale(form, scales)
    codes = every_code(form).repeat(len(scales), 1)
    expected = reference.dequantize(codes, tensors[SCALE], THEIR_FORMATS[form].elem_format)
    found = values(tensors, form, held)
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.view(torch.int32)[~found.isnan()], expected.view(torch.int32)[~found.isnan()])


@pytest.mark.parametrize(("form", "held"), HELD)
def test_compressed_tensors_itself_decompresses_the_same_weight(form: str, held: str) -> None:
    """Under every scale with which bfloat16, in which it multiplies, keeps all products."""
    tensors = every_code_and_scale(form, torch.arange(10, 240, dtype=torch.uint8))
    scheme = preset_name_to_scheme(form, ["Linear"]) if form != "mxfp6" else preset_name_to_scheme("mxfp6a8", [])
    compressor = BaseCompressor.get_value_from_registry(COMPRESSED[form])
    theirs = compressor.decompress(tensors, scheme)["weight"]
    ours = values(tensors, form, held)
    assert torch.equal(ours.to(theirs.dtype).view(torch.uint8), theirs.contiguous().view(torch.uint8))
    assert torch.equal(ours, theirs.float())


@given(data=st.data(), form=st.sampled_from(tuple(THEIR_FORMATS)), n=st.integers(1, 3), blocks=st.integers(1, 4))
def test_there_and_back_the_bytes_are_the_same(data: st.DataObject, form: str, n: int, blocks: int) -> None:
    count = n * blocks * 32
    drawn = torch.frombuffer(bytearray(data.draw(st.binary(min_size=count, max_size=count))), dtype=torch.uint8)
    codes = (drawn & (2 ** THEIR_FORMATS[form].bits - 1)).reshape(n, -1)
    codes = torch.where(codes & 0x7F == 0x7F, 0, codes)
    most = 248 if form == "mxfp6" else 254
    scales = data.draw(st.lists(st.sampled_from([*range(most + 1), 255]), min_size=n * blocks, max_size=n * blocks))
    tensors = their_tensors(form, codes, torch.tensor(scales, dtype=torch.uint8).reshape(n, blocks))
    packed = packed_from(tensors, form, form)
    assert [tuple(part.shape) for part in packed] == list(packed_shapes(n, one_segment(form, blocks * 32)))
    back = packed_to(packed, form)
    assert {name: (t.dtype, tuple(t.shape)) for name, t in back.items()} == THEIR_FORMATS[form].shapes(n, blocks * 32)
    for name, tensor in tensors.items():
        assert torch.equal(back[name].view(torch.uint8), tensor.view(torch.uint8))


def test_words_of_six_bits_are_those_of_compressed_tensors() -> None:
    from compressed_tensors.compressors.mxfp6.helpers import pack_fp6_to_uint8, unpack_fp6_from_uint8

    codes = torch.arange(4096 * 4, dtype=torch.int32).mul(2654435761).bitwise_right_shift(7).remainder(64)
    codes = codes.to(torch.uint8).reshape(64, -1)
    numbers = reference.decode(codes, reference.elem_format("e2m3"))
    packed = pack_fp6_to_uint8(numbers)
    assert torch.equal(pack_fp6_words(codes), packed)
    assert torch.equal(unpack_fp6_words(packed), codes)
    assert torch.equal(unpack_fp6_from_uint8(packed, *codes.shape).float(), numbers)


@pytest.mark.parametrize(("form", "held"), [("mxfp4", "mxfp8"), ("mxfp6", "mxfp6"), ("mxfp6", "mxfp8")])
def test_a_scale_without_room_is_refused(form: str, held: str) -> None:
    tensors = their_tensors(form, torch.zeros((1, 64), dtype=torch.uint8), torch.tensor([[3, 249]], dtype=torch.uint8))
    with pytest.raises(ValueError, match=f"weight_scale must be 0 to 248 or 255 where {form} .* got 249"):
        packed_from(tensors, form, held)


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_a_nan_among_the_codes_is_refused(code: int) -> None:
    codes = torch.zeros((2, 32), dtype=torch.uint8)
    codes[1, 7] = code
    with pytest.raises(ValueError, match="weight holds NaN"):
        packed_from(their_tensors("mxfp8", codes, torch.full((2, 1), 127, dtype=torch.uint8)), "mxfp8", "mxfp8")

"""The Triton quantizer against the reference, byte for byte: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.covering import part
from support.products import INTERPRETED, SEGMENTS, one_format
from support.quantized import assert_same_bytes, launch, quantized_by_the_reference
from support.rows import each_arrangement, rows_of_every_size
from support.strategies import ReorderCase, activation_formats, float_dtypes, index_dtypes, reorder_cases
from torch import Tensor

from micromix_compile.numerics import reference
from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS, FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS, RowLayout
from micromix_compile.targets import quantizers

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.numerics.layout import Split

pytestmark = INTERPRETED

LARGEST = ReorderCase(torch.full((1, 32), 3.0e38), torch.arange(32), (0, 32, 0), "e2m3", ScaleRounding.RCEIL)
SMALLEST = ReorderCase(torch.full((1, 32), 1.0e-45), torch.arange(32), (32, 0, 0), "e2m3", ScaleRounding.FLOOR)
OTHER_FORMATS = [("same", 512), ("fp8", 0), ("fp8", 1024), ("mxfp6", 512)]
"""Activations and how many of 1,024 channels are rotated."""


def check_plain(x: Tensor, perm: Tensor, split: Split, *names: Any, device: str) -> None:
    """names: what `RowLayout` has behind the split."""
    got = launch(x.to(device), perm.to(device), *split, *names)
    assert_same_bytes(got, quantized_by_the_reference(x, perm, split, *names))


def check_one_format(x: Tensor, fmt: str, rounding: str, device: str) -> None:
    """Quantize all of x (M, K), in order, to one format."""
    channels = x.shape[1]
    check_plain(x, torch.arange(channels), *one_format(fmt, channels), rounding, device=device)


def finite_bfloat16() -> Tensor:
    """Every finite bfloat16, both zeros included: (65,280,)."""
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    return values[values.isfinite()]


# ---- any input


@settings(max_examples=200)
@given(reorder_cases(), float_dtypes, index_dtypes, activation_formats, st.integers(0, 5))
@example(LARGEST, torch.float32, torch.int64, "same", 0)
@example(LARGEST, torch.float32, torch.int64, "mxfp6", 1)
@example(SMALLEST, torch.float32, torch.int32, "fp8", 1)
def test_bytes_equal_the_reference(
    device: str, case: ReorderCase, dtype: torch.dtype, index_dtype: torch.dtype, activations: str, blocks: int
) -> None:
    rotated = min(blocks * BLOCK_SIZE, sum(case.split))
    perm, names = case.channel_perm.to(index_dtype), (case.fp6, case.scale_rounding, activations, rotated)
    check_plain(case.x.to(dtype), perm, case.split, *names, device=device)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_magnitudes_of_the_whole_range_and_specials_among_them(
    device: str, dtype: torch.dtype, scale_rounding: str
) -> None:
    for index, (_, x, perm) in enumerate(rows_of_every_size(5, 1000, 1024, dtype)):
        check_plain(x, perm, (416, 352, 256), FP6_FORMATS[index % 2], scale_rounding, device=device)


@pytest.mark.parametrize(("activations", "rotated"), OTHER_FORMATS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_magnitudes_of_the_whole_range_in_other_formats_and_rotated(
    device: str, dtype: torch.dtype, activations: str, rotated: int
) -> None:
    for index, (_, x, perm) in enumerate(rows_of_every_size(4, 1000, 1024, dtype)):
        names = (FP6_FORMATS[index % 2], tuple(ScaleRounding)[index % 4], activations, rotated)
        check_plain(x, perm, (416, 352, 256), *names, device=device)


@pytest.mark.parametrize("fmt", SEGMENTS)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_every_bfloat16_as_the_largest_of_its_block(device: str, fmt: str, scale_rounding: str) -> None:
    # All exponents of float32: every scale byte that can occur does. In a part, with every fifth mantissa, so that each
    # mantissa comes with every fifth exponent.
    largest = part(finite_bfloat16()[:32640], 5, device)
    largest = largest[: len(largest) // 255 * 255].reshape(-1, 255)
    largest[::2] *= -1
    x = largest.repeat_interleave(BLOCK_SIZE, 1)
    x[:, 1::BLOCK_SIZE] *= -0.59375
    x[:, 2::BLOCK_SIZE] *= 2.0**-5
    x[:, 3::BLOCK_SIZE] = 0.0
    check_one_format(x, fmt, scale_rounding, device)


@pytest.mark.parametrize("fmt", SEGMENTS)
def test_every_bfloat16_beside_a_block_that_fixes_the_scale(device: str, fmt: str) -> None:
    values = finite_bfloat16()
    values = values[values.abs() <= ELEM_FORMATS[fmt].max_value]
    rows = torch.nn.functional.pad(values, (0, -len(values) % (31 * 8))).reshape(8, -1, 31)
    anchor = torch.full((*rows.shape[:2], 1), ELEM_FORMATS[fmt].max_value, dtype=torch.bfloat16)
    check_one_format(torch.cat((rows, anchor), 2).flatten(1), fmt, "rceil", device)


@pytest.mark.parametrize("fmt", SEGMENTS)
@pytest.mark.parametrize("scale", [2.0**-130, 1.0, 2.0**110])
def test_ties_and_their_float32_neighbours(device: str, fmt: str, scale: float) -> None:
    form = ELEM_FORMATS[fmt]
    codes = torch.arange(form.max_code + 1, dtype=torch.uint8)
    values = reference.decode(codes, form)
    ties = (values[1:] + values[:-1]) / 2
    bits = torch.cat((values[1:], ties)).view(torch.int32)[:, None] + torch.tensor([-1, 0, 1], dtype=torch.int32)
    inner = bits.view(torch.float32).flatten().clamp(max=form.max_value)
    inner = torch.cat((inner, -inner))
    rows = torch.nn.functional.pad(inner, (0, -len(inner) % 31)).reshape(-1, 31)
    x = torch.cat((rows, torch.full((len(rows), 1), form.max_value)), 1) * scale
    check_one_format(x.reshape(1, -1), fmt, "rceil", device)


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_codes_take_what_the_scale_of_fp6_has_no_room_for(device: str, fp6: str, scale_rounding: str) -> None:
    form = ELEM_FORMATS[fp6]
    values = reference.decode(torch.arange(BLOCK_SIZE, dtype=torch.uint8), form) / 2.0**form.emax
    values[0] = 1.96875  # "rceil" and "even" raise the scale by one more for it
    x = torch.cat([torch.ldexp(values, torch.tensor(e)) * sign for e in range(115, 128) for sign in (1, -1)])
    check_one_format(x[None], fp6, scale_rounding, device)
    assert x.isfinite().all()
    assert int(reference.quantize(x, fp6)[1].max()) + (form.e4m3_shift or 0) > 254


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_special_value_poisons_its_block_alone(device: str, dtype: torch.dtype, special: float) -> None:
    x = -torch.rand(3, 192).to(dtype)
    for row, column in ((0, 5), (0, 70), (0, 191), (2, 33)):
        x[row, column] = special
    check_plain(x, torch.arange(192), (64, 64, 64), "e2m3", "rceil", device=device)
    scale = launch(x.to(device), torch.arange(192, device=device), 64, 64, 64, "e2m3", "rceil").scale
    assert (scale == 255).nonzero().tolist() == [[0, 0], [0, 2], [0, 5], [2, 1]]


@pytest.mark.parametrize("special", [torch.nan, torch.inf, -torch.inf])
def test_a_special_value_poisons_its_row_alone_where_a_row_has_one_scale(device: str, special: float) -> None:
    """Though no channel of the order reads it."""
    x, perm = -torch.rand(3, 192), torch.cat((torch.arange(70), torch.arange(71, 192), torch.tensor([-1])))
    x[1, 70] = special
    got = launch(x.to(device), perm.to(device), 64, 64, 64, "e2m3", "rceil", "fp8", 64)
    assert (got.scale == 255).all(1).tolist() == (got.q8 == 0).all(1).tolist() == [False, True, False]
    assert not bool((got.scale == 255)[[0, 2]].any())
    check_plain(x, perm, (64, 64, 64), "e2m3", "rceil", "fp8", 64, device=device)


# ---- shapes


@pytest.mark.parametrize("rows", [0, 1, 3, 17])
@pytest.mark.parametrize(
    "split", [(0, 0, 0), (32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 0, 96), (0, 160, 32), (2080, 0, 32)]
)
def test_any_rows_and_empty_segments(device: str, rows: int, split: tuple[int, int, int]) -> None:
    perm = torch.randint(-1, 45, (sum(split),), dtype=torch.int32)
    x = torch.randn(rows, 45)
    for activations in ACTIVATIONS:
        rotated = 0 if activations == "same" else sum(split) // 64 * 32
        check_plain(x, perm, split, "e3m2", "rceil", activations, rotated, device=device)


@pytest.mark.parametrize(
    ("rows", "channels", "folds", "block_k", "num_warps"),
    [
        (1, 4096, False, 1024, 8),
        (32, 4096, False, 1024, 8),
        (33, 4096, False, 2048, 8),
        (64, 4096, False, 2048, 8),
        (65, 4096, False, 4096, 8),
        (quantizers.FEW_ROWS, 4096, False, 4096, 8),
        (quantizers.FEW_ROWS + 1, 4096, False, 4096, 4),
        (0, 4096, False, 4096, 4),
        ("M", 4096, False, 4096, 4),
        ("M", 8192, True, 8192, 8),
        (16, 14336, False, 2048, 16),
        (16, 14336, True, 2048, 16),
        ("M", 14336, False, 16384, 16),
        ("M", 14336, True, 16384, 8),
        (1, 28672, False, 1024, 16),
        ("M", 28672, False, 16384, 16),
        ("M", 28672, True, 32768, 16),
        ("M", 40000, True, 8192, 8),
        (1, 96, False, 128, 4),
    ],
)
def test_tiles_of_few_and_many_rows(rows: object, channels: int, folds: bool, block_k: int, num_warps: int) -> None:
    """Few rows are shared among programs. Rows of a number unknown while compiling count as many."""
    x = SimpleNamespace(shape=(rows, channels), element_size=lambda: 2)
    tile = quantizers.quantizer_tile("none", x, None, channels, folds=folds)  # type: ignore[arg-type]
    assert channels <= tile.BLOCK_C * tile.ROW_CHUNKS
    assert (tile.HAS_ROOM, tile.ROW_CHUNKS > 1) == (channels in (14336, 28672, 96), channels > 32768)
    assert (tile.BLOCK_K, tile.num_warps) == (block_k, num_warps)
    behind_norm = quantizers.quantizer_tile("rms_norm", x, None, channels, folds=folds)  # type: ignore[arg-type]
    assert behind_norm == tile._replace(HAS_ROOM=False)


@pytest.mark.parametrize(
    ("dtype", "few"),
    [(torch.bfloat16, 64), (torch.bfloat16, 0), (torch.float32, 0)],
    ids=["in small parts", "in large parts", "in parts and chunks"],
)
def test_wide_rows(device: str, dtype: torch.dtype, few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "FEW_ROWS", few)
    channels = 28672 + 7
    x = torch.randn(2, channels).to(dtype)
    perm = torch.cat((torch.randperm(channels), torch.full((25,), -1)))[torch.randperm(28704)]
    for names in (("same", 0), ("fp8", 9600), ("mxfp6", 28704)):
        check_plain(x, perm, (16416, 8160, 4128), "e2m3", "rceil", *names, device=device)


@each_arrangement
def test_strided_rows(device: str, arrange: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(9, 64, dtype=torch.bfloat16, device=device)
    perm = torch.randperm(64).to(torch.int32)
    got = launch(arrange(x), perm.to(device), 32, 0, 32, "e2m3", "rceil")
    want = reference.reorder_quantize(arrange(x.cpu()).contiguous(), perm, (32, 0, 32), fp6="e2m3")
    assert_same_bytes(got, want)


def test_offsets_pass_32_bits(device: str) -> None:
    # Rows 2**30 elements apart: the third starts beyond 2**31. The storage is never touched between them.
    if device == "cuda" and torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB")
    storage = torch.empty(2**31 + 64, dtype=torch.bfloat16, device=device)
    x = storage.as_strided((3, 64), (2**30, 1))
    x.copy_(torch.randn(3, 64))
    perm = torch.randperm(64)
    check_strided = launch(x, perm.to(device), 32, 32, 0, "e2m3", "rceil")
    assert_same_bytes(check_strided, reference.reorder_quantize(x.cpu(), perm, (32, 32, 0), fp6="e2m3"))


def test_only_the_outputs_are_written(device: str) -> None:
    x, perm = torch.randn(3, 64, device=device), torch.arange(64, device=device)
    want = launch(x, perm, 32, 0, 32, "e2m3", "rceil")
    room = [torch.full((5, out.shape[1]), 0xA5, dtype=torch.uint8, device=device) for out in want]
    inner = reference.QuantizedActivation(*(buffer[1:4] for buffer in room))
    layout = RowLayout(32, 0, 32, "e2m3", "rceil")
    quantizers.reorder_quantize_call("none", x, None, 0.0, perm, inner, layout).launch()
    assert_same_bytes(inner, tuple(out.cpu() for out in want))
    assert all(bool((buffer[[0, 4]] == 0xA5).all()) for buffer in room)


# ---- arguments


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.int32)}, TypeError),
        ({"x": torch.zeros(64)}, ValueError),
        ({"perm": torch.zeros(64)}, TypeError),
        ({"split": (32, 0, 0)}, ValueError),
        ({"split": (48, 16, 0)}, ValueError),
        ({"split": (96, -32, 0)}, ValueError),
        ({"fp6": "e4m3"}, ValueError),
        ({"rounding": "up"}, ValueError),
        ({"activations": "fp4"}, ValueError),
        ({"rotated": 16}, ValueError),
        ({"rotated": 96}, ValueError),
    ],
)
def test_arguments_that_the_reference_refuses_are_refused(change: dict[str, object], error: type[Exception]) -> None:
    given_ = {
        "x": torch.zeros(2, 64),
        "perm": torch.arange(64),
        "split": (32, 0, 32),
        "fp6": "e2m3",
        "rounding": "rceil",
        "activations": "same",
        "rotated": 0,
    }
    x, perm, split, fp6, rounding, *others = (given_ | change).values()
    options = dict(zip(("activations", "rotated"), others, strict=True))
    with pytest.raises(error) as want:
        reference.reorder_quantize(x, perm, split, fp6=fp6, scale_rounding=rounding, **options)  # type: ignore[arg-type]
    with pytest.raises(error) as got:
        launch(x, perm, *split, fp6, rounding, *others)  # type: ignore[arg-type, misc]
    assert str(got.value) == str(want.value)

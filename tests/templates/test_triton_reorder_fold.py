"""The kernel that reorders, quantizes and folds against `folding`, byte for byte: interpreted, or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.covering import part
from support.folded_rows import assert_folds, check_fold
from support.products import INTERPRETED, SEGMENTS, one_format
from support.rows import (
    each_arrangement,
    gates_of_one_rounding,
    rows_of_every_size,
    rows_with_an_exact_mean,
)
from support.strategies import ReorderCase, activation_formats, float_dtypes, index_dtypes, reorder_cases
from torch import Tensor
from torch.nn.functional import silu

from micromix_compile import ops
from micromix_compile.numerics import folding
from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS
from micromix_compile.targets import quantizers
from micromix_compile.targets.folded_tiles import FOLDED_SM_90
from micromix_compile.targets.hopper import TritonFolded, reorder_fold_call
from micromix_compile.targets.kernels import Residual

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

TOP = ReorderCase(torch.full((1, 32), 3.4e38), torch.arange(32), (32, 0, 0), "e2m3", ScaleRounding.RCEIL)


@settings(max_examples=80)
@given(reorder_cases(), float_dtypes, index_dtypes, st.booleans(), activation_formats, st.integers(0, 5))
@example(TOP, torch.float32, torch.int64, False, "same", 0)
@example(TOP, torch.float32, torch.int64, False, "fp8", 1)
def test_activations_equal_the_two_steps(
    device: str,
    case: ReorderCase,
    dtype: torch.dtype,
    index_dtype: torch.dtype,
    w_fp4: bool,
    activations: str,
    blocks: int,
) -> None:
    perm, rotated = case.channel_perm.to(index_dtype), min(blocks * BLOCK_SIZE, len(case.channel_perm))
    check_fold(
        device, case.x.to(dtype), perm, case.split, case.fp6, case.scale_rounding, w_fp4=w_fp4,
        activations=activations, rotated=rotated,
    )  # fmt: skip


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_format_of_activations_rotated_or_not(device: str, activations: str, dtype: torch.dtype) -> None:
    """In all segments, of which that of MXFP6 has an odd number of blocks; rotation ends within any of them, too."""
    x, perm = torch.randn(3, 352).to(dtype), torch.randperm(352)
    for index, rotated in enumerate((0, 96, 256, 352)):
        check_fold(
            device, x, perm, (160, 96, 96), FP6_FORMATS[index % 2], "fit", w_fp4=index % 3 == 1,
            activations=activations, rotated=rotated,
        )  # fmt: skip


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_magnitudes_of_the_whole_range_with_specials_in_some_rows(
    device: str, dtype: torch.dtype, scale_rounding: str
) -> None:
    for index, (center, x, perm) in enumerate(rows_of_every_size(5, 1000, 1024, dtype)):
        x[:3] = torch.where(x[:3].abs().float() <= 2.0 ** min(center + 4, 127), x[:3], 0.0)
        x[3] = torch.where(x[3].isfinite(), x[3], 0.0)  # with the dtype's largest value
        check_fold(device, x, perm, (416, 352, 256), FP6_FORMATS[index % 2], scale_rounding, w_fp4=index % 3 == 1)
        activations, rotated = (("same", 1024), ("fp8", 0), ("fp8", 416), ("mxfp6", 0), ("mxfp6", 416))[index % 5]
        check_fold(
            device, x, perm, (416, 352, 256), FP6_FORMATS[index % 2], scale_rounding, w_fp4=index % 3 == 1,
            activations=activations, rotated=rotated,
        )  # fmt: skip


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_every_exponent_of_the_largest_value(device: str, fp6: str, scale_rounding: str) -> None:
    """With the mantissas around 1.5, where the row's exponent steps. Each case interprets another part of them."""
    mantissas = torch.tensor([0x00, 0x3F, 0x40, 0x41, 0x7F], dtype=torch.int32)
    largest = ((torch.arange(255, dtype=torch.int32) << 7)[:, None] + mantissas).flatten()
    start = 9 * (2 * list(ScaleRounding).index(ScaleRounding(scale_rounding)) + FP6_FORMATS.index(fp6))
    largest = part(largest, 74, device, start)
    x = largest.to(torch.uint16).view(torch.bfloat16)[:, None].repeat(1, 192)
    x[:, 1::7] *= -0.59375
    x[:, 2::7] *= 2.0**-5
    x[:, 96:] *= 2.0**-9  # every second block
    check_fold(
        device, x, torch.arange(192).reshape(2, 3, 32).transpose(0, 1).flatten(), (64, 64, 64), fp6, scale_rounding
    )


@pytest.mark.parametrize("fmt", SEGMENTS)
@pytest.mark.parametrize("w_fp4", [False, True])
def test_every_bfloat16_beside_a_block_that_fixes_the_row(device: str, fmt: str, w_fp4: bool) -> None:
    """In order, so that a block has values of one size: down to where E4M3 rounds all to zero."""
    values = torch.arange(32768, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[(values >= 2.0**-14) & (values <= 384)]
    signs = torch.where(torch.arange(len(values)) % 3 == 0, -1, 1).to(torch.bfloat16)
    x = torch.cat((values * signs, torch.full((-len(values) % BLOCK_SIZE + BLOCK_SIZE,), 384.0).bfloat16()))[None]
    for rounding in ScaleRounding:
        check_fold(device, x, torch.arange(x.shape[1]), *one_format(fmt, x.shape[1]), rounding, w_fp4=w_fp4)


@pytest.mark.parametrize(
    ("dtype", "special", "channels"),
    [(dtype, special, 192) for dtype in FLOAT_DTYPES for special in (torch.nan, torch.inf, -torch.inf)]
    + [(torch.bfloat16, torch.nan, 20000)],
)
def test_a_special_value_takes_its_rows_scale_alone(
    device: str, dtype: torch.dtype, special: float, channels: int
) -> None:
    x = -torch.rand(4, channels).to(dtype)
    x[0, 5], x[2, channels - 1] = special, special
    perm = torch.arange(channels)
    got = TritonFolded().quantize(
        "none", x.to(device), None, 0.0, perm.to(device), (64, 64, channels - 128), "e2m3", "rceil", w_fp4=False
    )
    assert got.row_scale.isnan().tolist() == [True, False, True, False]
    assert_folds(got, x, perm, (64, 64, channels - 128), "e2m3", "rceil", w_fp4=False)


@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("split", [(32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 0, 96), (0, 160, 32), (2080, 0, 32)])
def test_any_rows_and_empty_segments(device: str, rows: int, split: Split) -> None:
    channels = sum(split) - 3
    perm = torch.cat((torch.randperm(channels), torch.full((3,), -1, dtype=torch.int64))).to(torch.int32)
    for w_fp4 in (False, True):
        check_fold(device, torch.randn(rows, channels), perm, split, "e3m2", "rceil", w_fp4=w_fp4)


@pytest.mark.parametrize(
    ("dtype", "channels", "few", "w_fp4"),
    [
        (torch.bfloat16, 28679, 64, False),
        (torch.bfloat16, 28679, 0, True),
        (torch.bfloat16, 33007, 0, False),
        (torch.float32, 28679, 0, False),
    ],
    ids=["in parts", "as wholes", "in parts and chunks", "float32 in parts and chunks"],
)
def test_wide_rows(
    device: str, dtype: torch.dtype, channels: int, few: int, w_fp4: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All programs of a row have its scale, wherever its largest value is."""
    monkeypatch.setattr(quantizers, "FEW_ROWS", few)
    x = torch.randn(3, channels).to(dtype)
    x[0, 3], x[1, -1], x[2, 20000] = 1000.0, -777.0, 50.0
    padding = torch.full((-channels % BLOCK_SIZE,), -1)
    perm = torch.cat((torch.randperm(channels), padding))[torch.randperm(channels + len(padding))]
    check_fold(device, x, perm, (len(perm) - 12288, 8160, 4128), "e2m3", "rceil", w_fp4=w_fp4)


@each_arrangement
def test_strided_rows(device: str, arrange: Callable[[Tensor], Tensor]) -> None:
    x = torch.randn(9, 64, dtype=torch.bfloat16, device=device)
    perm = torch.randperm(64)
    got = TritonFolded().quantize(
        "none", arrange(x), None, 0.0, perm.to(device), (32, 0, 32), "e2m3", "rceil", w_fp4=False
    )
    assert_folds(got, arrange(x.cpu()).contiguous(), perm, (32, 0, 32), "e2m3", "rceil", w_fp4=False)


def test_only_the_outputs_of_a_fold_are_written(device: str) -> None:
    split = (64, 32, 32)  # the MXFP6 block has no second: a block of zeros in its place, and three to whole lines
    x, perm = torch.randn(3, 128, device=device), torch.arange(128, device=device)
    want = TritonFolded().quantize("none", x, None, 0.0, perm, split, "e2m3", "rceil", w_fp4=False)
    q = torch.full((5, folding.fold_width(split, w_fp4=False)), 0xA5, dtype=torch.uint8, device=device)
    assert q.shape[1] == 256
    row_scale, locks = torch.full((5,), 7.0, device=device), torch.full((folding.LOCKS + 2,), 7, device=device).int()
    inner = FoldedActivation(q[1:4], row_scale[1:4], locks[1:-1])
    reorder_fold_call(
        "none",
        x,
        None,
        0.0,
        perm,
        split,
        inner,
        fp6="e2m3",
        scale_rounding="rceil",
        w_fp4=False,
        tiles=FOLDED_SM_90,
    ).launch()
    assert all(torch.equal(got, wanted) for got, wanted in zip(inner, want, strict=True))
    assert bool((q[[0, 4]] == 0xA5).all())
    assert row_scale[[0, 4]].tolist() == [7.0, 7.0]
    assert locks[[0, -1]].tolist() == [7, 7]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("channels", "w_fp4"), [(32, False), (256, True), (1024, False)])
def test_norm_and_fold_equals_its_steps_where_the_mean_is_exact(
    device: str, dtype: torch.dtype, channels: int, w_fp4: bool
) -> None:
    x, weight, perm, split = rows_with_an_exact_mean(9, channels, dtype)
    x, weight, rounding = x.to(device), weight.to(device), "rceil" if w_fp4 else "fit"
    got = TritonFolded().quantize("rms_norm", x, weight, 1e-5, perm.to(device), split, "e2m3", rounding, w_fp4=w_fp4)
    assert_folds(got, ops.rms_norm(x, weight, 1e-5).cpu(), perm, split, "e2m3", rounding, w_fp4=w_fp4)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(("rows", "channels", "few"), [(9, 256, 128), (1, 4096, 128), (18, 128, 0)])
def test_sum_norm_and_fold_equals_its_steps_where_the_mean_is_exact(
    device: str, dtype: torch.dtype, rows: int, channels: int, few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one program and of four, as parts of wider matrices; the sum is whole and is of the row's own."""
    monkeypatch.setattr(quantizers, "FEW_ROWS", few)
    x, residual = (torch.randint(-7, 8, (rows, channels + 8), device=device).to(dtype)[:, :channels] for _ in range(2))
    weight, perm = torch.randn(channels, device=device).to(dtype), torch.randperm(channels)
    split = (channels // 2, channels // 4, channels // 4)
    layout = (perm.to(device), *split, "e2m3", "fit", "same", 0, False)
    total, *folded = ops.add_rms_norm_reorder_fold(x, residual, weight, 1e-5, *layout)
    assert torch.equal(total, x + residual)
    want = ops.rms_norm(x + residual, weight, 1e-5).cpu()
    assert_folds(FoldedActivation(*folded), want, perm, split, "e2m3", "fit", w_fp4=False)
    added = Residual(residual, torch.full((rows, channels), torch.nan, dtype=dtype, device=device))
    launched = TritonFolded().quantize(
        "rms_norm", x, weight, 1e-5, layout[0], split, "e2m3", "fit", w_fp4=False, residual=added
    )
    assert torch.equal(added.total, x + residual)
    assert_folds(launched, want, perm, split, "e2m3", "fit", w_fp4=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_sum_rounds_as_eager_does(device: str, dtype: torch.dtype) -> None:
    """Values of all exponents, whose sums are halfway between two numbers now and then."""
    bits = torch.randint(0, 65536, (2, 4, 2048), dtype=torch.int32).to(torch.uint16).view(dtype)
    x, residual = torch.where(bits.isfinite(), bits, 0).to(device)
    added = Residual(residual, torch.empty_like(x))
    perm = torch.arange(2048, device=device)
    TritonFolded().quantize(
        "rms_norm", x, torch.ones_like(x[0]), 1e-5, perm, (2048, 0, 0), "e2m3", "fit", w_fp4=False, residual=added
    )
    assert torch.equal(added.total.cpu(), x.cpu() + residual.cpu())


def test_a_residual_of_another_shape_or_dtype_is_refused(device: str) -> None:
    x, weight, perm = torch.zeros(3, 64, device=device), torch.ones(64, device=device), torch.arange(64, device=device)
    layout = (perm, 64, 0, 0, "e2m3", "fit", "same", 0, False)
    with pytest.raises(ValueError, match=r"residual must have shape \(3, 64\), got \(1, 64\)"):
        ops.add_rms_norm_reorder_fold(x, x[:1], weight, 1e-5, *layout)
    with pytest.raises(TypeError, match=r"residual must have x's dtype torch.float32, got torch.bfloat16"):
        ops.add_rms_norm_reorder_fold(x, x.bfloat16(), weight, 1e-5, *layout)


def test_norm_and_fold_of_a_row_wider_than_one_tile(device: str) -> None:
    """32768 channels that are 0 or ±4: their mean square is exact in any order, and so is their norm."""
    channels = 32768
    x = torch.zeros(2, channels, device=device)
    x[0, ::4], x[1, 1::4], x[1, 5::8] = 4.0, -4.0, 4.0
    weight = 1 + torch.rand(channels, device=device)
    perm = torch.randperm(channels)
    split = (16384, 8192, 8192)
    got = TritonFolded().quantize("rms_norm", x, weight, 0.0, perm.to(device), split, "e2m3", "rceil", w_fp4=False)
    assert_folds(got, ops.rms_norm(x, weight, 0.0).cpu(), perm, split, "e2m3", "rceil", w_fp4=False)


@pytest.mark.parametrize(
    ("dtype", "w_fp4"),
    [
        *((torch.bfloat16, False), (torch.float16, True)),
        *(pytest.param(*case, marks=pytest.mark.deep) for case in ((torch.bfloat16, True), (torch.float16, False))),
    ],
)
def test_silu_mul_and_fold_equals_its_steps_for_every_gate(device: str, dtype: torch.dtype, w_fp4: bool) -> None:
    gate, up = gates_of_one_rounding(dtype)
    perm, split, rounding = torch.randperm(2048), (1024, 512, 512), "rceil" if w_fp4 else "fit"
    got = TritonFolded().quantize(
        "silu_mul", gate.to(device), up.to(device), 0.0, perm.to(device), split, "e2m3", rounding, w_fp4=w_fp4
    )
    assert_folds(got, silu(gate) * up, perm, split, "e2m3", rounding, w_fp4=w_fp4)

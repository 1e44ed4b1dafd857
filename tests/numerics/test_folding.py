"""Folding in plain PyTorch: order, exactness, bounds, and the product, each as `folding` states it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.products import (
    assert_folded_product_is_exact,
    assert_within_folding,
    folded_weight,
    pack_activation,
)
from support.strategies import (
    MatmulCase,
    ReorderCase,
    blocks,
    finite_blocks,
    fp6_formats,
    matmul_cases,
    matrices,
    reorder_cases,
    scale_roundings,
    splits,
)
from torch import Tensor

from micromix_compile.numerics import folding, packing, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, E8M0_NAN, ELEM_FORMATS, FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.kernels import PLAIN_FOLDED

Split = tuple[int, int, int]

E4M3 = ELEM_FORMATS["e4m3"]
LEAST_SCALE = 2.0**-126
EXACT = {"e2m1": (-8, 6), "e2m3": (-6, 5), "e3m2": (-5, 4)}
"""Exponents of a block relative to its row at which every code is an E4M3 value."""

TOP = ReorderCase(torch.full((1, 32), 3.4e38), torch.arange(32), (32, 0, 0), "e2m3", ScaleRounding.RCEIL)
ROW_OF_ANOTHER_SIZE = torch.cat((torch.full((1, 32), 2.0**30), torch.ones(1, 224)), 1)


def mx_values(q: QuantizedActivation) -> Tensor:
    """Values of an activation in float64: at the top of float32's range an element passes it."""
    elements = reference.dequantize_activation(q.q4, q.q6, q.q8, torch.full_like(q.scale, 127)).double()
    scale = torch.exp2(q.scale.double() - 127).where(q.scale != E8M0_NAN, torch.nan)
    return elements * scale.repeat_interleave(BLOCK_SIZE, 1)


def decoded(q: Tensor) -> Tensor:
    return reference.decode(q, E4M3).double()


def sorted_back(folded: Tensor, split: Split, *, w_fp4: bool) -> Tensor:
    """The columns of a folded operand in the order of the channels; all others are zeros."""
    order = folding.fold_order(split, w_fp4=w_fp4)
    assert folded.shape[1] == len(order)
    assert not folded[:, order < 0].any()
    return folded[:, order.argsort()[(order < 0).sum() :]]


# ---- order

SPLITS = [(0, 0, 0), (32, 0, 0), (0, 32, 0), (0, 0, 32), (96, 64, 32), (64, 160, 0), (0, 96, 96)]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("w_fp4", [False, True])
def test_the_order_holds_every_channel_once_and_leaves_mxfp8_as_it_is(split: Split, w_fp4: bool) -> None:
    order = folding.fold_order(split, w_fp4=w_fp4)
    assert len(order) == folding.fold_width(split, w_fp4=w_fp4)
    assert order[order >= 0].sort().values.tolist() == list(range(sum(split)))
    if not w_fp4 and split[2]:
        start = split[0] + -(-split[1] // 64) * 64
        assert order[start : start + split[2]].tolist() == list(range(split[0] + split[1], sum(split)))


def test_rows_are_longer_only_behind_an_odd_number_of_mxfp6_blocks_and_then_whole_lines() -> None:
    for split in [*SPLITS, (2048, 1440, 608), (3072, 800, 224)]:
        width, channels = folding.fold_width(split, w_fp4=False), sum(split)
        assert folding.fold_width(split, w_fp4=True) == channels
        if split[1] % 64:
            assert width % 128 == 0
            assert channels + 32 <= width < channels + 32 + 128
        else:
            assert width == channels


@pytest.mark.parametrize("k", [32, 96, 256])
def test_fp4_unpacks_to_registers_that_one_thread_has(k: int) -> None:
    """One channel at a time is packed: its byte says the word and which half of it.

    Thread t of four has the words of 4 bytes t and t + 4 of each 32 bytes of an operand's row (PTX ISA, wgmma with A in
    registers), and of packed weights the words t modulo 4.
    """
    byte = packing.pack_fp4(torch.eye(k, dtype=torch.uint8)).argmax(1)
    word, second_half = byte // 4, byte % 4 // 2
    place = word // 4 * 32 + second_half * 16 + word % 4 * 4 + torch.arange(k) % 4
    assert torch.equal(folding.fold_order((k, 0, 0), w_fp4=False), place.argsort())
    assert torch.equal(folding.fold_order((0, k, 0), w_fp4=True), place.argsort())


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("k", [32, 96, 256])
def test_fp6_unpacks_to_registers_that_one_thread_has(k: int, fp6: str) -> None:
    """One channel at a time is packed: it lies in one plane at a column, or in bits of all three, which is a fourth.

    As for FP4, but a word of the planes becomes four words, which two times 32 bytes have in one thread.
    """
    largest = ELEM_FORMATS[fp6].max_code | 0x20
    codes = torch.eye(k, dtype=torch.uint8) * largest
    aligned, _ = packing.align_fp6(codes, torch.zeros(k, k // BLOCK_SIZE, dtype=torch.uint8), fp6)
    used = packing.pack_fp6(aligned, fp6).permute(1, 0, 2) != 0  # (channel, plane, column)
    plane = torch.where(used.any(2).sum(1) == 3, 3, used.any(2).int().argmax(1))
    column = used.any(1).int().argmax(1)
    word = column // 4
    want = torch.full((folding.fold_width((0, k, 0), w_fp4=False),), -1)
    want[word // 4 * 64 + plane * 16 + word % 4 * 4 + column % 4] = torch.arange(k)
    assert torch.equal(folding.fold_order((0, k, 0), w_fp4=False), want)


# ---- exactness


def one_block_a_row(fmt: str, exponents: Tensor) -> QuantizedActivation:
    """Every code of a format, one row for each exponent of the scale."""
    codes = torch.arange(64 if fmt in FP6_FORMATS else 16, dtype=torch.uint8).repeat(2)[:64]
    codes = codes.repeat(64 // len(codes)).expand(len(exponents), 64)
    scale = (exponents + 127).to(torch.uint8)[:, None].expand(-1, 2)
    nothing = torch.empty(len(exponents), 0, dtype=torch.uint8)
    if fmt == "e2m1":
        return QuantizedActivation(packing.pack_fp4(codes), nothing, nothing, scale)
    aligned, baked = packing.align_fp6(codes, scale, fmt)
    return QuantizedActivation(nothing, aligned, nothing, baked)


@pytest.mark.parametrize("fmt", EXACT)
@pytest.mark.parametrize("row_exponent", [-100, 0, 90])
def test_every_code_of_an_activation_is_exact_in_its_range_and_one_is_not_beyond(fmt: str, row_exponent: int) -> None:
    low, high = EXACT[fmt]
    for relative, is_exact in ((torch.arange(low, high + 1), True), (torch.tensor([low - 1, high + 1]), False)):
        x = one_block_a_row(fmt, relative + row_exponent)
        amax = torch.full((len(relative),), 300.0 * 2.0**row_exponent)
        folded = folding.fold_activation(x, amax, w_fp4=False)
        assert (folded.row_scale == 2.0**row_exponent).all()
        split = (2 * x.q4.shape[1], x.q6.shape[1], 0)
        got = sorted_back(decoded(folded.q), split, w_fp4=False) * folded.row_scale.double()[:, None]
        assert (got == mx_values(x)).all(1).tolist() == [is_exact] * len(relative)


@pytest.mark.parametrize("fmt", EXACT)
def test_every_code_of_a_weight_is_exact_in_its_range(fmt: str) -> None:
    """A row of all exponents: its largest, and no smaller one, decides the row's scale."""
    low, high = max(EXACT[fmt][0], folding.MIN_FP4_EXPONENT if fmt == "e2m1" else -99), EXACT[fmt][1]
    x = one_block_a_row(fmt, torch.arange(low, high + 1))
    row = QuantizedActivation(*(part.reshape(1, -1) for part in x))
    w4, w6, w8 = row.q4, packing.pack_fp6(row.q6, fmt if fmt in FP6_FORMATS else "e2m3"), row.q8
    fp6 = fmt if fmt in FP6_FORMATS else "e2m3"
    row_scale = folding.weight_row_scale(w4, w6, w8, row.scale, fp6)
    assert row_scale.item() == 1.0
    factor = folding.weight_factor(w4, w6, w8, row.scale, row_scale)
    split = (2 * w4.shape[1], 4 * w6.shape[2], 0)
    assert torch.equal(
        sorted_back(decoded(folding.fold_weight(w4, w6, w8, factor, fp6)), split, w_fp4=False), mx_values(row)
    )


# ---- activations


@given(reorder_cases(blocks), st.booleans())
@example(TOP, False)
def test_a_folded_activation_is_the_mx_activation_but_for_what_is_subnormal(case: ReorderCase, w_fp4: bool) -> None:
    """Relative to the row's scale, |value| <= 384, so nothing saturates: 384 is on every format's grid at every scale.

    From 2**-6 on E4M3 has as many bits as any MX element: exact. Below, its step is 2**-9: off by 2**-10 at most.
    """
    x = reference.reorder_quantize(
        case.x, case.channel_perm, case.split, fp6=case.fp6, scale_rounding=case.scale_rounding
    )
    amax = case.x.abs().amax(1)
    folded = folding.fold_activation(x, amax, w_fp4=w_fp4)
    finite = amax.isfinite()
    assert torch.equal(folded.row_scale.isnan(), ~finite)
    assert not folded.q[~finite].any()
    assert folded.locks.dtype == torch.int32
    assert not folded.locks.any()

    row_scale = folded.row_scale[finite].double()
    largest = amax[finite].double() / row_scale
    assert (largest <= 384).all()
    assert ((largest > 192) | (row_scale == LEAST_SCALE)).all()
    assert (row_scale.frexp().mantissa == 0.5).all()

    want = mx_values(x)[finite] / row_scale[:, None]
    q = sorted_back(folded.q[finite], case.split, w_fp4=w_fp4)
    error = (decoded(q) - want).abs()
    assert (error <= 2.0**-10).all()
    assert not error[want.abs() >= 2.0**-6].any()
    assert not q[want == 0].any(), "a zero has a sign"


def test_a_row_with_a_special_value_has_no_scale_and_its_neighbours_have_theirs() -> None:
    values = torch.ones(4, 64)
    values[0, 3], values[1, 40], values[2, 63] = torch.nan, torch.inf, -torch.inf
    x = reference.reorder_quantize(values, torch.arange(64), (32, 32, 0), fp6="e2m3")
    folded = folding.fold_activation(x, values.abs().amax(1), w_fp4=False)
    assert folded.row_scale.isnan().tolist() == [True, True, True, False]
    values = sorted_back(decoded(folded.q), (32, 32, 0), w_fp4=False) * folded.row_scale[:, None]
    assert (values[3] == 1).all()


@given(reorder_cases(blocks), st.booleans(), st.integers(0, 5))
@example(TOP, False, 1)
def test_rows_of_one_scale_fold_to_what_they_are_bit_for_bit(case: ReorderCase, w_fp4: bool, count: int) -> None:
    rotated = min(count * BLOCK_SIZE, len(case.channel_perm))
    x = reference.reorder_quantize(
        case.x, case.channel_perm, case.split, fp6=case.fp6, scale_rounding=case.scale_rounding, activations="fp8",
        rotated=rotated,
    )  # fmt: skip
    byte = reference.row_scale_byte(case.x, case.scale_rounding)
    folded = folding.fold_rows(x.q8, byte, case.split, w_fp4=w_fp4)
    is_special = ~case.x.isfinite().all(1)
    assert torch.equal(folded.row_scale.isnan(), is_special)
    assert not folded.q[is_special].any()
    assert not folded.locks.any()
    got = sorted_back(folded.q, case.split, w_fp4=w_fp4)
    assert torch.equal(got, x.q8)
    values = reference.decode(got, E4M3) * folded.row_scale[:, None]
    want = reference.dequantize_activation(*x)
    assert torch.equal(values[~is_special].view(torch.int32), want[~is_special].view(torch.int32))
    assert (folded.row_scale[~is_special] >= LEAST_SCALE).all()


@given(reorder_cases(finite_blocks), st.booleans())
def test_mxfp6_at_least_is_folded_in_the_order_of_its_weights(case: ReorderCase, w_fp4: bool) -> None:
    """The values are those of the split whose MXFP4 is MXFP6, in other places."""
    k4, k6, k8 = case.split
    layout = {"fp6": case.fp6, "scale_rounding": case.scale_rounding}
    wide = reference.reorder_quantize(case.x, case.channel_perm, case.split, activations="mxfp6", **layout)  # type: ignore[arg-type]
    narrow = reference.reorder_quantize(case.x, case.channel_perm, (0, k4 + k6, k8), **layout)  # type: ignore[arg-type]
    amax = case.x.abs().amax(1)
    got = folding.fold_activation(wide, amax, w_fp4=w_fp4, w_split=case.split)
    want = folding.fold_activation(narrow, amax, w_fp4=False)
    assert torch.equal(got.row_scale, want.row_scale)
    assert torch.equal(sorted_back(got.q, case.split, w_fp4=w_fp4), sorted_back(want.q, (0, k4 + k6, k8), w_fp4=False))


# ---- weights


@st.composite
def weight_cases(draw: st.DrawFn) -> tuple[Tensor, Split, str, ScaleRounding]:
    """Rows of finite blocks up to 2**100, which MXFP6 can store, and how to quantize them."""
    w = draw(matrices(finite_blocks, channels=st.integers(1, 6).map(lambda n: n * BLOCK_SIZE)))
    return w.clamp(-(2.0**100), 2.0**100), draw(splits(w.shape[1])), draw(fp6_formats), draw(scale_roundings)


@given(weight_cases())
@example((ROW_OF_ANOTHER_SIZE, (96, 96, 64), "e3m2", ScaleRounding.RCEIL))
@example((ROW_OF_ANOTHER_SIZE.flip(1), (96, 96, 64), "e2m3", ScaleRounding.FLOOR))
def test_a_folded_weight_is_the_mx_weight_within_the_bounds(case: tuple[Tensor, Split, str, ScaleRounding]) -> None:
    """Relative to the row's scale the error of a value v of a block with exponent e is at most

    MXFP4: |v| (2**-5 / 2**e - 1) for e < -5, up to 6 * 2**-5; nothing from there on.
    MXFP6: 2**-10 below 2**-6, nothing from there on; factors that are zero stand for less than 2**-10.
    MXFP8: the same, and |v| <= 448 * 2**-17 for e < -16.

    The row's largest value is at least 120 (3.75 * 2**5 in E2M3), so all that is below 2**-9 of it.
    """
    values, split, fp6, scale_rounding = case
    x = reference.reorder_quantize(values, torch.arange(values.shape[1]), split, fp6=fp6, scale_rounding=scale_rounding)
    weight = folded_weight(x, fp6)
    row_scale = weight.row_scale.double()[:, None]
    assert (row_scale.frexp().mantissa == 0.5).all()
    exponent = (x.scale.double() - 127).repeat_interleave(BLOCK_SIZE, 1) - row_scale.log2()
    want = reference.dequantize_weight(weight.w4, weight.w6, weight.w8, x.scale, fp6).double() / row_scale
    folded = folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, fp6)
    got = sorted_back(decoded(folded), split, w_fp4=False)
    error = (got - want).abs()

    k4, k6, _ = split
    raised = want.abs() * (torch.exp2(folding.MIN_FP4_EXPONENT - exponent) - 1).clamp(min=0)
    rounded = torch.where(want.abs() < 2.0**-6, 2.0**-10, 0.0)
    dropped = torch.where(exponent < -16, want.abs(), rounded)
    assert (error <= torch.cat((raised[:, :k4], rounded[:, k4 : k4 + k6], dropped[:, k4 + k6 :]), 1)).all()
    assert (want.abs() <= folding.LARGEST).all()

    largest = want.abs().amax(1, keepdim=True)
    has_scale = (row_scale > LEAST_SCALE)[:, 0]
    assert (largest[has_scale] >= 120).all()
    assert (error <= 2.0**-9 * largest)[has_scale].all()


@pytest.mark.parametrize("split", [*SPLITS, (17 * 32, 32 * 32, 16 * 32)])
def test_factors_fill_whole_words_with_zeros(split: Split) -> None:
    x = reference.reorder_quantize(torch.randn(3, sum(split)), torch.arange(sum(split)), split, fp6="e2m3")
    factor = folded_weight(x, "e2m3").factor
    words = [-(-k // (BLOCK_SIZE * folding.FACTOR_WORD)) for k in split]
    assert factor.shape == folding.factor_shape(3, split) == (sum(words), 3, folding.FACTOR_WORD)
    for part, k in zip(factor.split(words), split, strict=True):
        assert not part.transpose(0, 1).flatten(1)[:, k // BLOCK_SIZE :].any()


def test_factors_are_what_the_docstring_says_for_every_exponent() -> None:
    """MXFP4 eight times the exponent and to -5; the others the upper byte of a power of two in float16."""
    relative = torch.arange(-40, 1)
    blocks_ = len(relative)
    scale = (relative + 127).to(torch.uint8).repeat(3)[None]
    w4 = torch.zeros(1, 16 * blocks_, dtype=torch.uint8)
    w6 = torch.zeros(3, 1, 8 * blocks_, dtype=torch.uint8)
    w8 = torch.zeros(1, 32 * blocks_, dtype=torch.uint8)
    assert folding.weight_row_scale(w4, w6, w8, scale, "e2m3").item() == 1.0
    factor = folding.weight_factor(w4, w6, w8, scale, torch.ones(1)).reshape(3, -1)[:, :blocks_]
    assert torch.equal(factor[0].int(), 8 * (relative.clamp(min=-5) + 5).int())
    want = torch.where(relative < -16, 0.0, torch.exp2(relative.float()))
    for part in factor[1:]:
        assert torch.equal((part.to(torch.int16) << 8).view(torch.float16).float(), want)


def test_a_nan_block_leaves_its_row_without_a_scale() -> None:
    x = reference.reorder_quantize(torch.randn(3, 96), torch.arange(96), (32, 32, 32), fp6="e3m2")
    for segment in range(3):
        x.scale[segment] = 127
        x.scale[segment, segment] = E8M0_NAN
        row_scale = folded_weight(x, "e3m2").row_scale
        assert row_scale.isnan().tolist() == [row <= segment for row in range(3)]


# ---- product


@given(matmul_cases(), st.booleans(), st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_product_is_exact_but_for_float32_sums(case: MatmulCase, w_fp4: bool, out_dtype: torch.dtype) -> None:
    x = pack_activation(case.x, case.split, case.fp6, w_fp4=w_fp4)
    channels = case.weight.shape[1]
    w_split = (channels, 0, 0) if w_fp4 else case.split
    quantized = reference.reorder_quantize(case.weight, torch.arange(channels), w_split, fp6=case.fp6)
    weight = folded_weight(quantized, case.fp6, case.bias)
    folded = folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, case.fp6)
    twice = [(folded, weight.row_scale)] * 2
    got = torch.cat(folding.folded_mm(x.q, x.row_scale, twice, [case.bias] * 2, out_dtype), 1)
    assert got.dtype == out_dtype
    assert_folded_product_is_exact(got, x, [weight, weight], case.fp6)


@pytest.mark.parametrize("w_fp4", [False, True])
@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("rotated", [0, 96])
def test_a_folded_product_is_near_the_mx_product(w_fp4: bool, activations: str, rotated: int) -> None:
    split = (96, 64, 32)
    w_split = (192, 0, 0) if w_fp4 else split
    values, rounding = torch.randn(7, 192), ScaleRounding.FIT
    x = PLAIN_FOLDED.quantize(
        "none", values, None, 0.0, torch.arange(192), split, "e2m3", rounding, w_fp4=w_fp4, residual=None,
        activations=activations, rotated=rotated,
    )  # fmt: skip
    quantized = reference.reorder_quantize(torch.randn(9, 192), torch.arange(192), w_split, fp6="e2m3")
    weight = folded_weight(quantized, "e2m3")
    folded = folding.fold_weight(weight.w4, weight.w6, weight.w8, weight.factor, "e2m3")
    (got,) = folding.folded_mm(x.q, x.row_scale, [(folded, weight.row_scale)], [None], torch.float32)
    left = reference.dequantize_activation(
        *reference.reorder_quantize(
            values, torch.arange(192), split, fp6="e2m3", scale_rounding=rounding, activations=activations,
            rotated=rotated,
        )
    )  # fmt: skip
    right = reference.dequantize_weight(weight.w4, weight.w6, weight.w8, quantized.scale, "e2m3")
    assert_within_folding(got, left @ right.T, left, right, activations)


# ---- the ops

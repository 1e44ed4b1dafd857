"""The compiled CPU kernels against the reference: bytes of the quantizers, error bounds of the product."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.grouped import packed_experts
from support.products import assert_product_is_exact, packed_rows, quantized_rows
from support.rows import each_arrangement, rows_of_every_size, rows_with_an_exact_mean
from support.strategies import activation_formats, fp6_formats, hostile_rows, scale_roundings
from torch import Tensor

from micromix_compile import ops
from micromix_compile.numerics import kv_cache, packing, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS, ScaleRounding, elem_format
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets import cpu

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Split = tuple[int, int, int]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
VARIANTS = {
    "micromix": (),
    "micromix_avx512": ("-DMICROMIX_NO_AMX", "-DMICROMIX_NAMESPACE=micromix_avx512"),
    "micromix_portable": ("-DMICROMIX_PORTABLE", "-DMICROMIX_NAMESPACE=micromix_portable"),
}
OP_NAMES = ("reorder_quantize", "rms_norm_reorder_quantize", "mixed_mx_mm", "grouped_mx_mm", "write_kv")


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Without this, a machine that cannot compile would test the plain PyTorch path against itself."""
    assert cpu.load(), cpu.status().reason


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Iterator[Any]:
    """The ops as compiled for one instruction set: the product's own, and what other machines would run."""
    name: str = request.param
    if name == "micromix":
        yield torch.ops.micromix
        return
    library = torch.library.Library(name, "DEF")
    for op in OP_NAMES:
        schema = str(getattr(torch.ops.micromix, op).default._schema)
        library.define(schema.partition("::")[2])
    torch.ops.load_library(str(cpu.build(VARIANTS[name])))
    yield getattr(torch.ops, name)


def equal_bytes(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(got, want, strict=True))


@st.composite
def quantizer_cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, Split]:
    k4, k6, k8 = (BLOCK_SIZE * draw(st.integers(0, 3)) for _ in range(3))
    split = (k4, k6, k8)
    k, rows = sum(split), draw(st.sampled_from((0, 1, 2, 5, 40)))
    channels = draw(st.integers(1, k + 40))
    dtype = draw(st.sampled_from(DTYPES))
    center = draw(st.integers(-20, 12) if dtype == torch.float16 else st.integers(-148, 127))
    seed = draw(st.integers(0, 2**32 - 1))
    perm = torch.randint(-1, channels, (k,), generator=torch.Generator().manual_seed(seed))
    perm_dtype = draw(st.sampled_from((torch.int32, torch.int64)))
    return hostile_rows(rows, channels, dtype, seed, center), perm.to(perm_dtype), split


@settings(max_examples=300, deadline=None)
@given(quantizer_cases(), fp6_formats, scale_roundings, activation_formats, st.integers(0, 9))
@example((torch.full((1, 32), 3.0e38), torch.arange(32), (0, 32, 0)), "e2m3", ScaleRounding.RCEIL, "same", 0)
@example((torch.full((1, 32), 1.0e-45), torch.arange(32), (32, 0, 0)), "e2m3", ScaleRounding.FLOOR, "same", 0)
@example((torch.full((1, 32), 1.0e-45), torch.arange(32), (32, 0, 0)), "e2m3", ScaleRounding.FLOOR, "fp8", 1)
def test_quantizer_bytes_equal_the_reference(
    case: tuple[Tensor, Tensor, Split], fp6: str, scale_rounding: ScaleRounding, activations: str, blocks: int
) -> None:
    x, perm, split = case
    rotated = min(blocks * BLOCK_SIZE, sum(split))
    got = ops.reorder_quantize(x, perm, *split, fp6, scale_rounding.value, activations, rotated)
    want = reference.reorder_quantize(
        x, perm, split, fp6=fp6, scale_rounding=scale_rounding, activations=activations, rotated=rotated
    )
    assert equal_bytes(got, want)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
def test_every_variant_quantizes_to_the_same_bytes(
    variant: Any, dtype: torch.dtype, fp6: str, scale_rounding: ScaleRounding
) -> None:
    for _, x, perm in rows_of_every_size(70, 230, 256, dtype, (-140, -60, 0, 100, 126)):
        for activations, rotated in (("same", 0), ("same", 128), ("fp8", 0), ("fp8", 256), ("mxfp6", 96)):
            got = variant.reorder_quantize(x, perm, 96, 96, 64, fp6, scale_rounding.value, activations, rotated)
            want = reference.reorder_quantize(
                x, perm, (96, 96, 64), fp6=fp6, scale_rounding=scale_rounding, activations=activations, rotated=rotated
            )
            assert equal_bytes(got, want)


@each_arrangement
def test_strided_rows_are_quantized_where_they_lie(arrange: Callable[[Tensor], Tensor]) -> None:
    x = arrange(torch.randn(9, 64))
    perm = torch.randperm(64)
    got = ops.reorder_quantize(x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0)
    want = reference.reorder_quantize(x.contiguous(), perm, (32, 0, 32), fp6="e2m3")
    assert equal_bytes(got, want)


# ---- RMSNorm before the quantizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [32, 256, 1024])
def test_norm_and_quantize_equals_its_two_steps_where_the_mean_is_exact(
    variant: Any, dtype: torch.dtype, channels: int
) -> None:
    x, weight, perm, split = rows_with_an_exact_mean(33, channels, dtype)
    y = ops.rms_norm(x, weight, 1e-5)
    for activations, rotated in (("same", 0), ("fp8", 32), ("mxfp6", channels)):
        got = variant.rms_norm_reorder_quantize(x, weight, 1e-5, perm, *split, "e2m3", "rceil", activations, rotated)
        want = reference.reorder_quantize(y, perm, split, fp6="e2m3", activations=activations, rotated=rotated)
        assert equal_bytes(got, want)


@pytest.mark.parametrize("fmt", ["e2m1", "e2m3", "e3m2", "e4m3"])
def test_normalized_values_are_quantized_to_the_nearest_code(variant: Any, fmt: str) -> None:
    # Against the norm in float64: rounding to a code of step s moves a value by at most s / 2, that is 2**-(m + 1) of
    # a normal value or half the subnormal step; the float32 norm itself (sum, sqrt, division, two products) adds less
    # than 2**-20 of the value.
    form = elem_format(fmt)
    fp6 = fmt if fmt in FP6_FORMATS else "e2m3"
    x, weight = torch.randn(50, 576) * 3 + 0.5, torch.randn(576)
    split = (576 * (fmt == "e2m1"), 576 * (fmt in FP6_FORMATS), 576 * (fmt == "e4m3"))
    perm = torch.arange(576, dtype=torch.int32)
    q = QuantizedActivation(*variant.rms_norm_reorder_quantize(x, weight, 1e-6, perm, *split, fp6, "rceil", "same", 0))
    wide = x.double()
    exact = weight.double() * wide / (wide.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    shift = (form.e4m3_shift or 0) if fmt in FP6_FORMATS else 0
    scale = reference.scale_value(q.scale).double().repeat_interleave(BLOCK_SIZE, 1) * 2.0**-shift
    half_step = torch.maximum(
        exact.abs() * 2.0 ** -(form.mantissa_bits + 1), scale * 2.0 ** (form.min_exponent - form.mantissa_bits - 1)
    )
    error = (reference.dequantize_activation(*q).double() - exact).abs()
    assert bool((error <= half_step + exact.abs() * 2.0**-20).all())


def test_norm_accepts_a_float32_weight_for_a_bfloat16_model() -> None:
    x, weight = torch.randint(-15, 16, (5, 64)).bfloat16(), torch.randn(64)
    perm = torch.arange(64, dtype=torch.int32)
    got = ops.rms_norm_reorder_quantize(x, weight, 1e-5, perm, 32, 32, 0, "e2m3", "even", "same", 0)
    want = reference.reorder_quantize(
        ops.rms_norm(x, weight, 1e-5), perm, (32, 32, 0), fp6="e2m3", scale_rounding=ScaleRounding.EVEN
    )
    assert equal_bytes(got, want)


# ---- The product


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "x_split", "w_split"),
    [
        pytest.param(1, 48, (320, 192, 64), (320, 192, 64), id="decode"),
        pytest.param(1, 1, (0, 32, 0), (0, 32, 0), id="one block"),
        pytest.param(3, 37, (96, 64, 32), (96, 64, 32), id="few rows, ragged N"),
        pytest.param(8, 65, (96, 64, 32), (192, 0, 0), id="eight rows, FP4 weights"),
        pytest.param(1, 33, (96, 64, 32), (192, 0, 0), id="decode, FP4 weights"),
        pytest.param(9, 16, (32, 0, 64), (32, 0, 64), id="nine rows"),
        pytest.param(17, 100, (0, 64, 32), (32, 32, 32), id="another split"),
        pytest.param(1, 70, (0, 0, 192), (96, 64, 32), id="decode, FP8 activations"),
        pytest.param(40, 70, (0, 0, 192), (96, 64, 32), id="FP8 activations"),
        pytest.param(33, 31, (64, 0, 0), (0, 0, 64), id="formats that differ"),
        pytest.param(50, 70, (1344, 768, 96), (1344, 768, 96), id="several passes along K"),
        pytest.param(5, 70, (1344, 768, 96), (1344, 768, 96), id="one tile of x, several passes"),
        pytest.param(530, 45, (64, 32, 32), (64, 32, 32), id="more rows than a slab"),
        pytest.param(64, 700, (64, 32, 32), (64, 32, 32), id="more columns than a panel"),
    ],
)
def test_product_is_exact_up_to_accumulation(
    variant: Any, rows: int, columns: int, x_split: Split, w_split: Split, fp6: str
) -> None:
    x, weight = quantized_rows(rows, x_split, fp6), packed_rows(columns, w_split, fp6)
    for out_dtype, bias in zip(DTYPES, (None, torch.randn(columns), torch.randn(columns).half()), strict=True):
        got = variant.mixed_mx_mm(*x, *weight, bias, fp6, out_dtype)
        assert got.dtype == out_dtype
        assert_product_is_exact(got, x, weight, bias, fp6)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize(
    ("rows", "columns"),
    [
        pytest.param(3, 700, id="few rows"),
        pytest.param(530, 45, id="divided along x"),
        pytest.param(64, 700, id="divided along w"),
        pytest.param(50, 40, id="divided along w and x"),
    ],
)
def test_products_and_quantizers_are_right_on_any_number_of_threads(threads: int, rows: int, columns: int) -> None:
    split = (96, 64, 32)
    values, perm, before = torch.randn(rows, 192), torch.randperm(192), torch.get_num_threads()
    x, weight = quantized_rows(rows, split, "e2m3"), packed_rows(columns, split, "e2m3")
    torch.set_num_threads(threads)
    try:
        product = ops.mixed_mx_mm(*x, *weight, None, "e2m3", torch.float32)
        quantized = ops.reorder_quantize(values, perm, *split, "e2m3", "rceil", "same", 0)
    finally:
        torch.set_num_threads(before)
    assert_product_is_exact(product, x, weight, None, "e2m3")
    assert equal_bytes(quantized, reference.reorder_quantize(values, perm, split, fp6="e2m3"))


@st.composite
def splits_of(draw: st.DrawFn, blocks: int) -> Split:
    first = draw(st.integers(0, blocks))
    second = draw(st.integers(0, blocks - first))
    return (first * BLOCK_SIZE, second * BLOCK_SIZE, (blocks - first - second) * BLOCK_SIZE)


@settings(max_examples=80, deadline=None)
@given(st.data(), st.integers(0, 40), st.integers(0, 70), st.integers(0, 24), st.sampled_from(FP6_FORMATS))
def test_product_of_any_shape(data: st.DataObject, rows: int, columns: int, blocks: int, fp6: str) -> None:
    x_split, w_split = data.draw(splits_of(blocks)), data.draw(splits_of(blocks))
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    magnitude = 2.0 ** data.draw(st.sampled_from((-100, 0, 100)))
    x, weight = quantized_rows(rows, x_split, fp6, magnitude), packed_rows(columns, w_split, fp6)
    bias = torch.randn(columns) if data.draw(st.booleans()) else None
    got = ops.mixed_mx_mm(*x, *weight, bias, fp6, torch.float32)
    assert_product_is_exact(got, x, weight, bias, fp6)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("segment", [0, 1, 2])
def test_a_nan_scale_reaches_its_row_or_column_and_no_other(variant: Any, rows: int, segment: int) -> None:
    x, weight = quantized_rows(rows, (32, 32, 32), "e3m2"), packed_rows(20, (32, 32, 32), "e3m2")
    x.scale[rows - 1, segment] = 255
    weight[3][7, segment] = 255
    got = variant.mixed_mx_mm(*x, *weight, None, "e3m2", torch.bfloat16)
    expected = torch.zeros(rows, 20, dtype=torch.bool)
    expected[rows - 1, :] = expected[:, 7] = True
    assert torch.equal(got.isnan(), expected)


@pytest.mark.parametrize("rows", [1, 40])
def test_the_nan_code_of_e4m3_decodes_to_nan(variant: Any, rows: int) -> None:
    x, weight = quantized_rows(rows, (0, 0, 64), "e2m3"), packed_rows(5, (0, 0, 64), "e2m3")
    weight[2][3, 40] = 0x7F
    x.q8[0, 1] = 0xFF
    nan = variant.mixed_mx_mm(*x, *weight, None, "e2m3", torch.float32).isnan()
    assert bool(nan[0].all())
    assert nan[1:].sum() == nan[1:, 3].sum() == rows - 1


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("split", [(32, 0, 0), (0, 32, 0), (0, 0, 32)])
@pytest.mark.parametrize("fp6", FP6_FORMATS)
def test_every_code_decodes_under_every_scale(variant: Any, rows: int, split: Split, fp6: str) -> None:
    """Each of the 32 columns of x picks one channel, so the product lists the decoded weights."""
    k4, k6, k8 = split
    one = torch.eye(32).repeat(rows // 32 + 1, 1)[: max(rows, 32)]
    x = reference.reorder_quantize(one, torch.arange(32), (0, 0, 32), fp6=fp6)
    codes = torch.arange(256, dtype=torch.uint8).reshape(8, 32)
    scale = torch.arange(1, 246, dtype=torch.uint8).repeat_interleave(8)  # what bf16 and float32 hold without rounding
    bits = codes.repeat(245, 1)
    form = elem_format(fp6)
    fp6_codes = bits & 0x3F
    aligned = ((fp6_codes & 0x20) << 2) | ((fp6_codes & 0x1F) << (3 - form.mantissa_bits))
    n = len(scale)
    weight = (
        packing.pack_fp4(bits & 0xF) if k4 else torch.empty(n, 0, dtype=torch.uint8),
        packing.pack_fp6(aligned, fp6) if k6 else torch.empty(3, n, 0, dtype=torch.uint8),
        torch.where((bits & 0x7F) == 0x7F, 0, bits) if k8 else torch.empty(n, 0, dtype=torch.uint8),
        scale.unsqueeze(1),
    )
    values = reference.dequantize_weight(*weight, fp6)  # (N, 32)
    smallest_normal = 2.0**-126  # bf16 instructions flush what is below
    for first in range(0, len(one), rows):
        part = QuantizedActivation(*(t[first : first + rows] for t in x))
        got = variant.mixed_mx_mm(*part, *weight, None, fp6, torch.float32)
        want = (one[first : first + rows] @ values.T).float()
        normal = want.abs() >= smallest_normal
        assert torch.equal(got[normal], want[normal])
        assert bool((got[~normal].abs() < smallest_normal).all())


# ---- Arguments, registration, and what happens without a compiler

QUANTIZER_ARGS: dict[str, Any] = {
    "x": torch.zeros(2, 64),
    "channel_perm": torch.arange(64),
    "k4": 32,
    "k6": 32,
    "k8": 0,
    "fp6": "e2m3",
    "scale_rounding": "rceil",
    "activations": "same",
    "rotated": 0,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 64, dtype=torch.float64)}, TypeError, "bfloat16 or float16, got torch.float64"),
        ({"x": torch.zeros(2, 2, 64)}, ValueError, r"2-dimensional \(M, C\), got shape \(2, 2, 64\)"),
        ({"k4": 16}, ValueError, "k4 must be a non-negative multiple of 32, got 16"),
        ({"k6": -32, "k4": 96}, ValueError, "k6 must be a non-negative multiple of 32, got -32"),
        ({"k8": 32}, ValueError, r"split \(32, 32, 32\) sums to 96, but channel_perm has 64 entries"),
        ({"fp6": "e4m3"}, ValueError, "fp6 must be one of e2m3, e3m2, got 'e4m3'"),
        ({"scale_rounding": "up"}, ValueError, "'up' is not a valid ScaleRounding"),
        ({"activations": "bf16"}, ValueError, "activations must be one of same, fp8, mxfp6, got 'bf16'"),
        ({"rotated": 16}, ValueError, "rotated must be a multiple of 32 from 0 to 64, got 16"),
        ({"rotated": 96}, ValueError, "rotated must be a multiple of 32 from 0 to 64, got 96"),
        ({"rotated": -32}, ValueError, "rotated must be a multiple of 32 from 0 to 64, got -32"),
        ({"channel_perm": torch.full((64,), 64)}, ValueError, r"channel_perm\[0\] must be in \[-1, 64\), got 64"),
        ({"channel_perm": torch.full((64,), -2)}, ValueError, r"channel_perm\[0\] must be in \[-1, 64\), got -2"),
        ({"channel_perm": torch.zeros(64)}, TypeError, "must hold integers, got torch.float32"),
        ({"channel_perm": torch.zeros(8, 8).long()}, ValueError, r"1-dimensional, got shape \(8, 8\)"),
    ],
)
def test_quantizer_refuses_bad_arguments(change: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ops.reorder_quantize(**{**QUANTIZER_ARGS, **change})


def test_norm_refuses_a_weight_of_another_length() -> None:
    args = {**QUANTIZER_ARGS, "weight": torch.ones(63), "eps": 1e-5}
    with pytest.raises(ValueError, match=r"weight must have shape \(64,\), got \(63,\)"):
        ops.rms_norm_reorder_quantize(**args)


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("out_dtype", DTYPES)
def test_every_variant_computes_each_experts_rows_as_a_product_of_their_own(
    variant: Any, fp6: str, out_dtype: torch.dtype
) -> None:
    """Experts with no row, with few, which are multiplied as they are read, and with many."""
    split, counts = (64, 96, 32), (3, 0, 40, 1)
    x, w, bias = (
        quantized_rows(20, split, fp6),
        packed_experts(len(counts), 37, split, fp6),
        torch.randn(len(counts), 37),
    )
    rows = torch.randint(0, 20, (sum(counts) + 2,), dtype=torch.int32)
    offs = torch.tensor(counts).cumsum(0).int()
    got = variant.grouped_mx_mm(*x, rows, offs, *w, bias, fp6, out_dtype)
    for expert, run in enumerate(rows[:-2].split(counts)):
        part = [one[run] for one in x]
        want = variant.mixed_mx_mm(*part, *(one[expert] for one in w), bias[expert], fp6, out_dtype)
        assert torch.equal(got[offs[expert] - len(run) : offs[expert]], want)
    assert not got[-2:].any()


@pytest.mark.parametrize("block_size", [80, 16])
def test_every_variant_writes_the_same_cache(variant: Any, block_size: int) -> None:
    """Rows of every magnitude, of 80 channels, which are no whole number of vectors."""
    for _, x, _ in rows_of_every_size(4, 80, 80, torch.bfloat16):
        states, position = x.view(1, 1, *x.shape), torch.randperm(len(x))
        got, want = ([torch.zeros(1, 1, len(x), n).byte() for n in (80, 80 // block_size) * 2] for _ in range(2))
        variant.write_kv(states, states, position, *got, "fit")
        kv_cache.write_kv(states, states, position, *want, "fit")
        assert equal_bytes(tuple(got), tuple(want))


@pytest.mark.parametrize("op", [*OP_NAMES[:3], "silu_mul_reorder_quantize", "dequantize_weight"])
@pytest.mark.parametrize(("activations", "rotated"), [("same", 0), ("same", 96), ("fp8", 32), ("mxfp6", 0)])
def test_opcheck_finds_nothing(op: str, activations: str, rotated: int) -> None:
    perm, split = torch.arange(96, dtype=torch.int32), (32, 32, 32)
    layout = (perm, *split, "e2m3", "rceil", activations, rotated)
    x = torch.randn(4, 96)
    quantized, weight = ops.reorder_quantize(x, *layout), packed_rows(6, split, "e2m3")
    args: dict[str, tuple[Any, ...]] = {
        "reorder_quantize": (x, *layout),
        "rms_norm_reorder_quantize": (x, torch.ones(96), 1e-5, *layout),
        "silu_mul_reorder_quantize": (x, x, *layout),
        "mixed_mx_mm": (*quantized, *weight, torch.zeros(6), "e2m3", torch.bfloat16),
        "dequantize_weight": (*weight, perm, 96, "e2m3", rotated, torch.bfloat16),
    }
    torch.library.opcheck(getattr(torch.ops.micromix, op).default, args[op])

"""Folded products, and weights expanded for them, against `folding`: kernels interpreted, or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from unittest.mock import MagicMock

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.folded import (
    assert_equal_but_for_one_rounding,
    check_expanded,
    exact_integers,
    folded_rows,
    integers,
    mma_channels,
    multiply,
    on,
    random_weight,
    tiles_on,
)
from support.products import (
    INTERPRETED,
    SEGMENTS,
    assert_folded_product_is_exact,
    folded_weight,
)

from micromix_compile.numerics import folding, packing, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.targets.expansion import ExpandedWeights, expand_call
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile, Parts, tiles_of
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.hopper import TritonFolded, folded_mm_call, reorder_fold_call
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.templates.triton.folded_mm import _bound

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

WIDE_TILES = [tile for _, tile in FOLDED_SM_90.wide]


# ---- weights: expanded


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("columns", [(0,), (1,), (7,), (5, 3), (3, 9, 6), (4, 0, 1)])
@pytest.mark.parametrize(
    "split", [(32, 0, 0), (0, 32, 0), (0, 0, 32), (64, 0, 96), (0, 160, 32), (1056, 544, 32), (992, 1024, 1056)]
)
def test_expanded_weights_equal_the_definition(device: str, fp6: str, columns: tuple[int, ...], split: Split) -> None:
    check_expanded(device, [random_weight(n, split, fp6, bias=len(columns) > 1) for n in columns], fp6)


def test_weights_without_channels_still_have_scales_and_biases(device: str) -> None:
    none = torch.zeros(5, 0, dtype=torch.uint8)
    factor = torch.zeros(folding.factor_shape(5, (0, 0, 0)), dtype=torch.uint8)
    weight = FoldedWeight(none, none.expand(3, 5, 0), none, factor, torch.ones(5), torch.randn(5).bfloat16())
    check_expanded(device, [weight] * 2, "e2m3")


POWERS = [2.0**e for e in range(-16, 12)]


def every_code_under_every_factor(fmt: str) -> FoldedWeight:
    """A row a factor. All that a factor byte can be, and all codes but E4M3's NaN."""
    if fmt == "e2m1":
        factors = 8 * torch.arange(12, dtype=torch.uint8)
        codes = torch.arange(32, dtype=torch.uint8) % 16
    else:
        upper = torch.tensor(POWERS, dtype=torch.float16).view(torch.int16) >> 8
        factors = torch.cat((torch.zeros(1, dtype=torch.uint8), upper.to(torch.uint8)))
        codes = torch.arange(256 if fmt == "e4m3" else 64, dtype=torch.uint8)
        codes = torch.where(codes & 0x7F == 0x7F, 0, codes) if fmt == "e4m3" else codes
    codes = codes.repeat(len(factors), 1)
    aligned = codes[:, :0]
    if fmt in FP6_FORMATS:
        aligned, _ = packing.align_fp6(codes, codes.new_zeros(len(codes), 2), fmt)
    w4 = packing.pack_fp4(codes) if fmt == "e2m1" else codes[:, :0]
    w6 = packing.pack_fp6(aligned, fmt if fmt in FP6_FORMATS else "e2m3")
    w8 = codes if fmt == "e4m3" else codes[:, :0]
    words = -(-codes.shape[1] // (BLOCK_SIZE * folding.FACTOR_WORD))
    factor = factors[None, :, None].repeat(words, 1, folding.FACTOR_WORD)
    return FoldedWeight(w4, w6, w8, factor, torch.ones(len(factors)))


@pytest.mark.parametrize("fmt", SEGMENTS)
def test_every_code_is_folded_under_every_factor(device: str, fmt: str) -> None:
    check_expanded(device, [every_code_under_every_factor(fmt)], fmt if fmt in FP6_FORMATS else "e2m3")


# ---- products


@settings(max_examples=8)
@given(
    st.data(), st.tuples(*[st.integers(0, 3).map(lambda n: n * BLOCK_SIZE)] * 3).filter(any),
    st.sampled_from(FP6_FORMATS), st.lists(st.integers(1, 40), min_size=1, max_size=MAX_GROUP),
    st.sampled_from([1, 2, 4, 8]), st.booleans(), st.booleans(),
)  # fmt: skip
@example(None, (32, 32, 32), "e2m3", [33, 1, 2], 8, True, False)
def test_product_of_any_shape_and_group(
    device: str, data: st.DataObject | None, split: Split, fp6: str, columns: list[int], split_k: int, bias: bool,
    w_fp4: bool,
) -> None:  # fmt: skip
    rows = data.draw(st.integers(1, 40)) if data else 17
    tile = data.draw(st.sampled_from(tiles_on(device))) if data else tiles_on(device)[0]
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)) if data else 0)
    w_split = (sum(split), 0, 0) if w_fp4 else split
    x = folded_rows(rows, split, fp6, w_fp4=w_fp4, device=device)
    weights = [random_weight(n, w_split, fp6, bias=bias, device=device) for n in columns]
    got = multiply(x, weights, fp6, tile, split_k)
    assert_folded_product_is_exact(got, x, weights, fp6, mma_channels=0 if device == "cpu" else mma_channels(tile, x))


@pytest.mark.parametrize(("split_k", "columns"), [(1, (33, 16, 5)), (2, (1,)), (4, (35,)), (8, (33, 5))])
def test_products_of_integers_are_exact(device: str, split_k: int, columns: tuple[int, ...]) -> None:
    for tile in tiles_on(device):
        for rows, split, fp6 in ((1, (416, 0, 32), "e2m3"), (tile.BLOCK_M + 3, (96, 160, 96), "e3m2")):
            x, weights = integers(rows, columns, split, fp6, w_fp4=rows == 1, bias=rows > 1, device=device)
            want = exact_integers(x, weights, fp6)
            assert_equal_but_for_one_rounding(multiply(x, weights, fp6, tile, split_k), want)


@pytest.mark.parametrize("split_k", [1, 4])
def test_the_sum_is_rounded_once(device: str, split_k: int) -> None:
    """The interpreter's own cast to bfloat16 truncates."""
    x = folded_rows(21, (96, 64, 64), "e2m3", device=device)
    weights = [random_weight(n, (96, 64, 64), "e2m3", bias=True, device=device) for n in (50, 3)]
    wide = multiply(x, weights, "e2m3", tiles_on(device)[0], split_k)
    for out_dtype in (torch.float16,) if device == "cpu" else (torch.float16, torch.bfloat16):
        narrow = multiply(x, weights, "e2m3", tiles_on(device)[0], split_k, out_dtype)
        assert torch.equal(narrow, wide.to(out_dtype))


@pytest.mark.parametrize("split_k", [1, 2])
def test_a_row_without_a_scale_is_nan_in_the_product_and_no_other(device: str, split_k: int) -> None:
    split = (64, 32, 32)
    values = torch.randn(19, 128)
    values[18, 70], values[2, 1] = torch.nan, torch.inf
    perm = torch.arange(128, device=device)
    x = TritonFolded().quantize("none", values.to(device), None, 0.0, perm, split, "e2m3", "rceil", w_fp4=False)
    quantized = reference.reorder_quantize(torch.randn(21, 128), torch.arange(128), split, fp6="e2m3")
    quantized.scale[20, 1] = 255
    weight = on(device, folded_weight(quantized, "e2m3"))
    got = multiply(x, [weight], "e2m3", tiles_on(device)[0], split_k).cpu()
    want = torch.zeros(19, 21, dtype=torch.bool)
    want[18], want[2], want[:, 20] = True, True, True
    assert torch.equal(got.isnan(), want)


@pytest.mark.parametrize("split_k", [1, 2])
def test_no_rows_or_no_columns_are_no_product(device: str, split_k: int) -> None:
    for rows, columns in ((0, 5), (3, 0)):
        x, weights = integers(rows, [columns], (32, 32, 0), "e2m3", device=device)
        assert multiply(x, weights, "e2m3", tiles_on(device)[0], split_k).shape == (rows, columns)


def test_the_product_reads_what_the_fold_wrote(device: str) -> None:
    """From rows to the product of a group, both kernels, twice with one activation: its locks are free again."""
    values, split = torch.randn(18, 352), (160, 128, 64)
    perm = torch.randperm(352)
    x = TritonFolded().quantize(
        "none", values.to(device), None, 0.0, perm.to(device), split, "e3m2", "rceil", w_fp4=False
    )
    weights = [random_weight(n, split, "e3m2", bias=True, device=device) for n in (35, 16)]
    tile = tiles_on(device)[0]
    first = multiply(x, weights, "e3m2", tile, 2)
    assert_folded_product_is_exact(
        first, x, weights, "e3m2", mma_channels=0 if device == "cpu" else mma_channels(tile, x)
    )
    assert torch.equal(multiply(x, weights, "e3m2", tile, 2), first)


def test_shared_tiles_that_fill_the_registers_are_added_in_pieces(device: str) -> None:
    tile = WIDE_TILES[-1]
    x, weights = integers(200, (150, 20), (160, 128, 128), "e2m3", device=device)
    want = exact_integers(x, weights, "e2m3")
    assert_equal_but_for_one_rounding(multiply(x, weights, "e2m3", tile, 3), want)


@pytest.mark.parametrize("whole", [1, 4, 5])
def test_some_tiles_are_whole_and_some_shared(device: str, whole: int) -> None:
    x, weights = integers(20, (200, 70), (96, 64, 32), "e2m3", device=device)
    tile = tiles_on(device)[0]
    want = exact_integers(x, weights, "e2m3")
    assert tiles_of(20, (200, 70), tile) > whole
    for split_k in (2, 3):
        assert_equal_but_for_one_rounding(multiply(x, weights, "e2m3", tile, split_k, whole=whole), want)


def test_more_shared_tiles_than_locks_are_refused(device: str) -> None:
    x, weights = integers(1, (16,), (32, 0, 0), "e2m3", device=device)
    tile = FoldedTile(16, 16, 64, 4, 2)
    many = x._replace(q=x.q.expand(16 * (folding.LOCKS + 1), 32), row_scale=x.row_scale.expand(16 * folding.LOCKS + 16))
    with pytest.raises(ValueError, match=r"Parts\(whole=0, split=2\) takes a lock .* at most 1024, got 1025 shared"):
        multiply(many, weights, "e2m3", tile, 2)


def test_only_kernels_that_wait_for_their_inputs_are_launched_to_start_ahead(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interpreted or not: nothing runs here."""
    x, weights = (
        folded_rows(3, (64, 0, 0), "e2m3", device=device),
        [random_weight(5, (64, 0, 0), "e2m3", device=device)],
    )
    values, perm = torch.zeros(3, 64, device=device), torch.arange(64, device=device)
    out, tile = torch.empty(3, 5, device=device), FOLDED_SM_90.small[0][1]
    fold = reorder_fold_call(
        "none",
        values,
        None,
        0.0,
        perm,
        (64, 0, 0),
        x,
        fp6="e2m3",
        scale_rounding="rceil",
        w_fp4=False,
        tiles=FOLDED_SM_90,
    )
    multiplication = folded_mm_call(x, weights, [out], out, fp6="e2m3", tile=tile, parts=Parts(1, 1))
    expansion = expand_call(weights, ExpandedWeights.empty(weights, x.q), fp6="e2m3")
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    usual = replace(expansion, constexprs={**expansion.constexprs, "LAUNCH_PDL": False})
    for call, starts_ahead in ((fold, True), (multiplication, True), (expansion, True), (usual, False)):
        kernel = MagicMock()
        replace(call, kernel=kernel).launch()
        (launched,) = kernel.__getitem__.return_value.call_args_list
        assert launched.kwargs.get("launch_pdl", False) == starts_ahead


@triton.jit(do_not_specialize=["steps4", "steps6", "steps8", "parts"])
def bounds_kernel(out, steps4, steps6, steps8, parts, start: tl.constexpr):  # noqa: ANN001, ANN201 - a Triton kernel
    """The bounds of all parts, one after the other."""
    for part in range(parts + 1):
        tl.store(out + part, _bound(part, steps4, steps6, steps8, parts, start))


@settings(max_examples=40)
@given(st.integers(0, 60), st.integers(0, 30), st.integers(0, 30), st.integers(1, 8), st.integers(0, 3))
@example(12, 4, 1, 4, 0)
@example(12, 4, 1, 4, 1)
def test_parts_hold_all_steps_and_equal_work_but_for_a_step(
    device: str, steps4: int, steps6: int, steps8: int, parts: int, start: int
) -> None:
    """Work: bytes, in 4096 of 64 rows, and what a segment counts for that begins, which a part may end with."""
    out = torch.full((parts + 1,), -1, dtype=torch.int32, device=device)
    bounds_kernel[(1,)](out, steps4, steps6, steps8, parts, start)
    bounds = out.tolist()
    steps = [2] * steps4, [3 + start, *[3] * (steps6 - 1)][:steps6], [4 + start, *[4] * (steps8 - 1)][:steps8]
    work = torch.tensor([0, *chain(*steps)]).cumsum(0)
    assert bounds == sorted(bounds)
    assert (bounds[0], bounds[-1]) == (0, len(work) - 1)
    assert bool(((work[bounds].diff() - work[-1] / parts).abs() < 4 + start).all())

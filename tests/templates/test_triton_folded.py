"""Folded products, and weights expanded for them, against `folding`: kernels interpreted, or on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain, pairwise, product
from typing import TYPE_CHECKING
from unittest.mock import MagicMock

import pytest
import sympy
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.products import (
    INTERPRETED,
    SEGMENTS,
    assert_folded_product_is_exact,
    folded_product,
    folded_weight,
    one_format,
    pack_activation,
)
from torch import Tensor

from micromix_compile.numerics import folding, packing, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.targets.expansion import ExpandedWeights, expand_call, expand_weights
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile, FoldedTiles, Parts, tiles_of
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.hopper import TritonFolded, folded_mm_call, reorder_fold_call
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.templates.triton.folded_mm import _bound

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from micromix_compile.numerics.folding import FoldedActivation

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

WIDE_TILES = [tile for _, tile in FOLDED_SM_90.wide]
ALL_TILES = FOLDED_SM_90.tiles


# ---- weights: expanded


def on(device: str | torch.device, weight: FoldedWeight) -> FoldedWeight:
    return FoldedWeight(*(None if part is None else part.to(device) for part in weight))  # type: ignore[arg-type]


def random_weight(columns: int, split: Split, fp6: str, *, bias: bool = False, device: str = "cpu") -> FoldedWeight:
    """Rows of blocks of all sizes that folding treats differently."""
    k = sum(split)
    w = torch.randn(columns, k, device=device)
    w *= torch.exp2(torch.randint(-18, 3, (columns, k // BLOCK_SIZE), device=device)).repeat_interleave(BLOCK_SIZE, 1)
    quantized = reference.reorder_quantize(w, torch.arange(k, device=device), split, fp6=fp6)
    return folded_weight(quantized, fp6, torch.randn(columns, device=device).bfloat16() if bias else None)


def check_expanded(device: str, weights: Sequence[FoldedWeight], fp6: str) -> None:
    """Equal bytes, scales and biases, below each other, and nothing before or behind them."""
    weights = [on(device, one) for one in weights]
    want = torch.cat([folding.fold_weight(one.w4, one.w6, one.w8, one.factor, fp6) for one in weights])
    rows = want.shape[0] + 2
    room = torch.full((rows, want.shape[1]), 0xA5, dtype=torch.uint8, device=device)
    scales, biases = torch.full((rows,), 7.0, device=device), torch.full((rows,), 7.0, device=device).bfloat16()
    has_bias = weights[0].bias is not None
    out = ExpandedWeights(room[1:-1], scales[1:-1], biases[1:-1] if has_bias else None)
    expand_weights(weights, out, fp6=fp6)
    wrong = (room[1:-1] != want).nonzero()
    assert not len(wrong), f"{len(wrong)} bytes differ, first at {wrong[0].tolist()}"
    assert torch.equal(out.row_scale, torch.cat([one.row_scale for one in weights]))
    if out.bias is not None:
        assert torch.equal(out.bias, torch.cat([one.bias for one in weights if one.bias is not None]))
    assert bool((room[[0, -1]] == 0xA5).all())
    assert bool((scales[[0, -1]] == 7.0).all())
    assert bool((biases[[0, -1]] == 7.0).all())


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


def tiles_on(device: str) -> tuple[FoldedTile, ...]:
    """All tiles on a GPU; in the interpreter small ones, for several programs and steps."""
    if device == "cpu":
        return FoldedTile(16, 32, 64, 2, 2), FoldedTile(32, 32, 128, 1, 2, SUM_STEPS=False)
    return ALL_TILES


def multiply(
    x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, tile: FoldedTile | None, split_k: int | None,
    out_dtype: torch.dtype = torch.float32, whole: int = 0,
) -> Tensor:  # fmt: skip
    """The products side by side. whole: tiles that are not shared."""
    parts = None if split_k is None else Parts(whole, split_k)
    outs = TritonFolded().multiply(x, weights, fp6=fp6, out_dtype=out_dtype, tile=tile, parts=parts)
    assert all(out.dtype == out_dtype and out.is_contiguous() for out in outs)
    assert not x.locks.any(), "locks are left"
    return torch.cat(outs, 1)


def folded_rows(rows: int, split: Split, fp6: str, *, w_fp4: bool = False, device: str = "cpu") -> FoldedActivation:
    k = sum(split)
    x = torch.randn(rows, k, device=device) * torch.exp2(torch.randint(-6, 3, (rows, k), device=device))
    return pack_activation(x, split, fp6, w_fp4=w_fp4)


def integers(
    rows: int, columns: Sequence[int], split: Split, fp6: str, *, w_fp4: bool = False, bias: bool = True,
    device: str = "cpu",
) -> tuple[FoldedActivation, list[FoldedWeight]]:  # fmt: skip
    """Operands of which every sum is exact, in any order, in float32 and in the 14 bits of sm_90's FP8 MMA.

    x has four entries of ±1 or ±2 a block, w integers up to 7 or twice that: a step of 8 blocks adds at most 32
    products up to 28, 896 < 2**13, and 28,672 channels less than 2**17. Up to 2,048 channels stay below 2**13 too, and
    all do that the instruction adds in one sum: 2**13 is 12 standard deviations of 28,672 channels' sum.
    """
    blocks = sum(split) // BLOCK_SIZE

    def doubled(values: Tensor) -> Tensor:
        factor = torch.randint(1, 3, (len(values), blocks, 1), device=device)
        return (values.unflatten(1, (blocks, BLOCK_SIZE)) * factor).flatten(1).float()

    nonzero = torch.rand(rows, blocks, BLOCK_SIZE, device=device).argsort(2) < 4
    x = doubled(nonzero.flatten(1) * (2 * torch.randint(0, 2, (rows, sum(split)), device=device) - 1))
    weights = []
    for n in columns:
        w = torch.randint(-7, 8, (n, sum(split)), device=device)
        first = w[:, : sum(split) if w_fp4 else split[0]]
        first[first.abs() == 5] = 3  # E2M1 has no 5 and no 7
        first[first.abs() == 7] = -6
        w_split = (sum(split), 0, 0) if w_fp4 else split
        quantized = reference.reorder_quantize(doubled(w), torch.arange(sum(split), device=device), w_split, fp6=fp6)
        offset = torch.randint(-50, 51, (n,), device=device).bfloat16() if bias else None
        weights.append(folded_weight(quantized, fp6, offset))
    return pack_activation(x, split, fp6, w_fp4=w_fp4), weights


def exact_integers(x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str) -> Tensor:
    """The product in float64."""
    exact, _ = folded_product(x, weights, fp6)
    assert torch.equal(exact, exact.round())
    return exact


def assert_equal_but_for_one_rounding(got: Tensor, exact: Tensor) -> None:
    assert torch.equal(exact.float().double(), exact)
    assert torch.equal(got, exact.float().to(got.dtype))


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


def mma_channels(tile: FoldedTile, x: FoldedActivation) -> int:
    """The most that matrix instructions add to one sum."""
    return tile.BLOCK_K if tile.SUM_STEPS else x.q.shape[1]


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


@pytest.mark.parametrize(
    ("rows", "columns", "channels", "whole", "split"),
    [
        (16, [14336, 14336], 4096, 396, 2), (16, [4096], 4096, 0, 4), (1, [4096, 1024, 1024], 4096, 0, 4),
        (16, [8192], 28672, 0, 3), (16, [152_064], 4096, 2376, 1), (64, [4096], 14336, 0, 6), (16, [576], 576, 9, 1),
        (16, [1536], 1536, 0, 3), (128, [14336, 14336], 4096, 448, 1), (256, [14336, 14336], 4096, 448, 1),
        (256, [4096], 14336, 0, 4), (256, [4096, 1024, 1024], 4096, 384, 1),
    ],
)  # fmt: skip
def test_tiles_are_shared_where_they_would_leave_processors_idle(
    rows: int, columns: list[int], channels: int, whole: int, split: int
) -> None:
    tile = FOLDED_SM_90.tile_for(rows, columns, channels)
    assert FOLDED_SM_90.parts_for(rows, columns, channels, tile) == (whole, split)


def test_tiles_follow_rows_and_columns() -> None:
    def rows_of_tile(rows: int, columns: int, channels: int) -> int:
        return FOLDED_SM_90.tile_for(rows, [columns // 2, columns - columns // 2], channels).BLOCK_M

    few = [(rows_of_tile(rows, 16_895, 8191), rows) for rows in (1, 16, 17, 32, 33, 64, 65, 999)]
    assert few == [(16, 1), (16, 16), (32, 17), (32, 32), (64, 33), (64, 64), (64, 65), (64, 999)]
    many = [(rows_of_tile(rows, 16_896, 8191), rows) for rows in (16, 64, 65, 128, 129, 999)]
    assert many == [(16, 16), (64, 64), (128, 65), (128, 128), (256, 129), (256, 999)]
    long = [(rows_of_tile(rows, 4096, 8192), rows) for rows in (16, 64, 128, 129)]
    assert long == [(16, 16), (64, 64), (64, 128), (256, 129)]


@pytest.mark.parametrize("rows", [1, 32])
@pytest.mark.parametrize(
    ("columns", "channels", "shared"),
    [(4096, 4096, True), (14336, 4096, False), (28672, 4096, False), (4096, 256, False), (4096, 28672, True)],
)
def test_steps_of_few_rows_have_sums_of_their_own_unless_all_tiles_are_shared(
    rows: int, columns: int, channels: int, shared: bool
) -> None:
    tile = FOLDED_SM_90.tile_for(rows, [columns], channels)
    parts = FOLDED_SM_90.parts_for(rows, [columns], channels, tile)
    assert (parts.whole == 0) == shared
    assert tile.SUM_STEPS is not shared


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


def test_shared_tiles_never_outnumber_the_locks_nor_parts_the_steps() -> None:
    for rows in (1, 16, 17, 64, 65, 1000, 100_000):
        for columns in ([1], [4096], [4096, 1024, 1024], [14336, 14336], [152_064]):
            for channels in (32, 576, 4096, 14336, 28672):
                tile = FOLDED_SM_90.tile_for(rows, columns, channels)
                assert rows <= tile.BLOCK_M or tile in (FOLDED_SM_90.small[-1][1], WIDE_TILES[-1])
                tiles = tiles_of(rows, columns, tile)
                whole, split = FOLDED_SM_90.parts_for(rows, columns, channels, tile)
                assert 0 <= whole <= tiles
                assert whole == tiles if split == 1 else tiles - whole <= folding.LOCKS
                assert split == 1 or channels >= split * tile.BLOCK_K


def test_the_library_is_asked_for_what_it_takes() -> None:
    def asked(rows: int, columns: list[int], out_dtype: torch.dtype, bias: torch.dtype | None = None) -> bool:
        weights = [random_weight(n, (32, 0, 0), "e2m3") for n in columns]
        biased = [w._replace(bias=None if bias is None else torch.zeros(8, dtype=bias)) for w in weights]
        return FOLDED_SM_90.uses_library(rows, biased, out_dtype)

    most, bf16 = FOLDED_SM_90.expand_from, torch.bfloat16
    assert asked(most, [64], bf16)
    assert asked(most, [64, 32], bf16, bf16)
    assert not asked(most - 1, [64], bf16)
    assert not asked(most, [72], bf16)
    assert not asked(most, [64, 24], bf16)
    assert not asked(most, [64], torch.float32)
    assert not asked(most, [64], bf16, torch.float32)


@given(st.lists(st.integers(1, 200_000), min_size=1, max_size=3), st.sampled_from([1024, 4096, 28672]))
@example([4096, 1024, 1024], 4096)
@example([14336, 14336], 4096)
def test_weights_are_expanded_together_as_far_as_they_fit(columns: list[int], width: int) -> None:
    runs = [columns[run] for run in FOLDED_SM_90.expansion_runs(columns, width)]
    assert [*chain(*runs)] == columns
    assert all(len(run) == 1 or sum(run) * width <= FOLDED_SM_90.max_expanded for run in runs)
    assert all((sum(run) + other[0]) * width > FOLDED_SM_90.max_expanded for run, other in pairwise(runs))


def test_loads_of_mxfp8_run_less_far_ahead_where_it_is_little_and_registers_suffice() -> None:
    precise, shared, wider = FOLDED_SM_90.small[0][1], FOLDED_SM_90.shared[0][1], FOLDED_SM_90.shared[-1][1]
    little, much = (3072, 832, 192), (3264, 0, 832)
    assert [shared.stages8(little, 1), wider.stages8(little, 3)] == [2, 2]
    assert [shared.stages8(much, 1), precise.stages8(little, 2), wider.stages8(little, 1)] == [3, 3, 3]


# ---- real sizes, on a GPU


def share(channels: int, share4: float, share6: float) -> Split:
    k4, k6 = (int(channels * part) // BLOCK_SIZE * BLOCK_SIZE for part in (share4, share6))
    return k4, k6, channels - k4 - k6


SHARES = ((0.75, 0.2), (0.5, 0.35), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0))
SIZES = [(1, 1, 64), (3, 5, 96), (7, 999, 160), (16, 576, 576), (17, 1536, 576), (33, 49, 1088), (1, 6144, 4096)]
SIZES += [(16, 4096, 4096), (63, 4097, 4096), (64, 513, 14336), (5, 4096, 14336), (1, 1025, 28672), (31, 257, 28672)]
SIZES += [(129, 257, 8192), (300, 152, 18944), (1000, 999, 2048), (16, 16_000, 576), (100, 12_000, 576)]


@pytest.mark.gpu
@pytest.mark.parametrize("index", range(len(SIZES)))
@pytest.mark.parametrize("shares", SHARES)
def test_no_size_is_special(index: int, shares: tuple[float, float]) -> None:
    """With what `folded_mm` chooses for few rows, and with every tile and number of parts."""
    rows, columns, channels = SIZES[index]
    split, fp6 = share(channels, *shares), FP6_FORMATS[index % 2]
    group = [columns, 3 * columns // 4 + 1, 7][: index % 3 + 1]
    x, weights = integers(rows, group, split, fp6, bias=index % 2 == 0, device="cuda")
    want = exact_integers(x, weights, fp6)
    chosen = [FOLDED_SM_90.tile_for(rows, group, channels)] if channels > 8192 else ALL_TILES
    for tile in chosen:
        tiles = tiles_of(rows, group, tile)
        for split_k in (1, 2, 3, 8) if tiles <= folding.LOCKS else (1,):
            for whole in {0, tiles // 2} if split_k > 1 else {0}:
                assert_equal_but_for_one_rounding(multiply(x, weights, fp6, tile, split_k, whole=whole), want)
    assert_equal_but_for_one_rounding(multiply(x, weights, fp6, None, None), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [64, 256])
def test_matrix_instructions_end_before_their_operand_is_overwritten(rows: int) -> None:
    """Which they did not with 8 warps: each launch of `wide` differed, by up to 3 % of the norm."""
    split = (3072, 832, 192)
    x, weights = folded_rows(rows, split, "e2m3", device="cuda"), [random_weight(4096, split, "e2m3", device="cuda")]
    narrow, wide = FoldedTile(64, 64, 128, 4, 3, SUM_STEPS=False), FoldedTile(256, 128, 128, 8, 3, SUM_STEPS=False)
    for tile in (narrow, wide):
        want = multiply(x, weights, "e2m3", replace(tile, num_stages=1), 4)
        assert_near_by_norm(want, x, weights, "e2m3")
        for _ in range(20):
            assert torch.equal(multiply(x, weights, "e2m3", tile, 4), want)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 4, 64])
@pytest.mark.parametrize("release", ["start", "stores", "end"])
def test_kernels_that_start_ahead_read_what_those_before_them_wrote(
    rows: int, release: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twelve linears in a CUDA graph, in memory that they reuse, against one after the other."""
    monkeypatch.setattr(FoldedTiles, "release_for", lambda *_: release)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # by kernels in between
    split, fp6 = (3072, 832, 192), "e2m3"
    perm = torch.randperm(4096, device="cuda").to(torch.int16)
    weights = [random_weight(4096, split, fp6, device="cuda") for _ in range(3)]
    first = torch.randn(rows, 4096, device="cuda", dtype=torch.bfloat16)

    def run(between: Callable[[], object]) -> Tensor:
        x = first
        for i in range(12):
            q = TritonFolded().quantize("none", x, None, 0.0, perm, split, fp6, "fit", w_fp4=False)
            between()
            (y,) = TritonFolded().multiply(q, [weights[i % 3]], fp6=fp6, out_dtype=torch.bfloat16)
            x = y if i % 4 else y / y.abs().max()  # now and then behind a kernel that starts as usual
            between()
        return x

    want, graph = run(torch.cuda.synchronize), torch.cuda.CUDAGraph()
    assert want.isfinite().all()
    with torch.cuda.graph(graph):
        got = run(lambda: None)
    for _ in range(50):
        got.zero_()
        graph.replay()
        assert torch.equal(got, want)


def test_products_start_before_their_quantizer_ends_where_that_was_measured() -> None:
    o, gate_up = [[4096]], [[14336, 14336]]
    for rows in (1, 64):
        assert FOLDED_SM_90.release_for(rows, 4096, o) == "start"
    for rows in (1, 4):
        assert FOLDED_SM_90.release_for(rows, 4096, gate_up) == "stores"
        assert FOLDED_SM_90.release_for(rows, 4096, o + gate_up) == "stores"
        assert FOLDED_SM_90.release_for(rows, 14336, o) == "stores"
        assert FOLDED_SM_90.release_for(rows, 4096) == "stores"
    assert FOLDED_SM_90.release_for(4, 4096, o) == "stores"
    for columns, split in ([4608, 4608], 2), ([8192], 3):  # of which more programs fit a processor
        assert FOLDED_SM_90.parts_for(64, columns, 4096, FOLDED_SM_90.shared[-1][1]) == (0, split)
        assert FOLDED_SM_90.release_for(64, 4096, [columns]) == "end"
        assert FOLDED_SM_90.release_for(1, 4096, [columns]) == "start"
    for rows in (0, 5, 16, 17, 32, 65, 8192, sympy.Symbol("s0")):
        assert FOLDED_SM_90.release_for(rows, 4096, o) == "end"
    for rows in (33, 64):
        assert FOLDED_SM_90.release_for(rows, 4096, gate_up) == "end"


@pytest.mark.gpu
@pytest.mark.parametrize("tile", ALL_TILES, ids=str)
@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("w_fp4", [False, True])
def test_every_tile_stays_within_the_bound_of_fp8_mma(tile: FoldedTile, fp6: str, w_fp4: bool) -> None:
    split = (1056, 544, 288)
    x = folded_rows(tile.BLOCK_M + 3, split, fp6, w_fp4=w_fp4, device="cuda")
    weights = [random_weight(n, (1888, 0, 0) if w_fp4 else split, fp6, bias=True, device="cuda") for n in (301, 64, 5)]
    for split_k in (1, 2, 4, 8):
        got = multiply(x, weights, fp6, tile, split_k)
        assert_folded_product_is_exact(got, x, weights, fp6, mma_channels=mma_channels(tile, x))
        assert_near_by_norm(got, x, weights, fp6)


def assert_near_by_norm(got: Tensor, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str) -> None:
    """Within 1 % of the product's norm: what 14 bits can do to thousands of channels at worst says little.

    A channel out of place or a wrong scale errs by as much as the product; BF16's rounding by 0.2 %.
    """
    exact, _ = folded_product(x, weights, fp6)
    assert float((got.double() - exact).norm()) <= 0.01 * float(exact.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "tile"), [(most, tile) for most, tile in FOLDED_SM_90.small if tile.SUM_STEPS])
@pytest.mark.parametrize("fmt", SEGMENTS)
def test_a_sum_for_each_step_keeps_what_14_bits_would_lose(rows: int, tile: FoldedTile, fmt: str) -> None:
    """Ones in weights, ones and zeros in x: a step adds at most 256, all together an odd number above 2**14."""
    channels, ones = 20_480, 17_477
    split, fp6 = one_format(fmt, channels)
    values = (torch.arange(channels, device="cuda") < ones).float()[torch.randperm(channels, device="cuda")]
    w = torch.ones(64, channels, device="cuda")
    quantized = reference.reorder_quantize(w, torch.arange(channels, device="cuda"), split, fp6=fp6)
    x = pack_activation(values.repeat(rows, 1), split, fp6)
    got = multiply(x, [folded_weight(quantized, fp6, None)], fp6, tile, 1)
    assert bool((got == ones).all())


@pytest.mark.gpu
def test_parts_of_k_are_added_in_one_order() -> None:
    """Whichever program comes last: the same bits, again and again."""
    split = share(14336, 0.75, 0.2)
    for rows in (1, 16, 64):
        x = folded_rows(rows, split, "e2m3", device="cuda")
        weights = [random_weight(n, split, "e2m3", device="cuda") for n in (1024, 512)]
        first = multiply(x, weights, "e2m3", None, 8)
        for _ in range(20):
            assert torch.equal(multiply(x, weights, "e2m3", None, 8), first)


@pytest.mark.gpu
@pytest.mark.parametrize(("group", "rows"), list(product([(64,), (528, 16), (4096, 1024, 1024)], [257, 1000])))
@pytest.mark.parametrize("fp6", FP6_FORMATS)
def test_products_of_many_rows_by_way_of_the_library(group: tuple[int, ...], rows: int, fp6: str) -> None:
    """Integers exactly, as long as all of K stays below 2**13; anything else within the bound of one sum over all K.

    The library may round to the output type before it adds the bias, and again.
    """
    x, weights = integers(rows, group, share(2048, 0.5, 0.35), fp6, bias=False, device="cuda")
    assert FOLDED_SM_90.uses_library(rows, weights, torch.bfloat16)
    want = exact_integers(x, weights, fp6)
    assert_equal_but_for_one_rounding(multiply(x, weights, fp6, None, None, torch.bfloat16), want)
    biases = [torch.randint(-50, 51, (n,), device="cuda").bfloat16() for n in group]
    biased = [weight._replace(bias=bias) for weight, bias in zip(weights, biases, strict=True)]
    total = want + torch.cat(biases).double()
    got = multiply(x, biased, fp6, None, None, torch.bfloat16)
    assert bool(((got.double() - total).abs() <= 2.0**-8 * (1.01 * total.abs() + want.abs())).all())
    x = folded_rows(rows, share(4096, 0.75, 0.2), fp6, device="cuda")
    weights = [random_weight(n, share(4096, 0.75, 0.2), fp6, bias=True, device="cuda") for n in group]
    got = multiply(x, weights, fp6, None, None, torch.bfloat16)
    assert_folded_product_is_exact(got, x, weights, fp6, mma_channels=4096)
    assert_near_by_norm(got, x, weights, fp6)


@pytest.mark.gpu
def test_bytes_of_large_weights_equal_the_definition() -> None:
    for columns, channels in (((4096, 1024, 1024), 4096), ((1001,), 14336), ((257, 30), 28672)):
        for fp6 in FP6_FORMATS:
            split = share(channels, 0.75, 0.2)
            check_expanded("cuda", [random_weight(n, split, fp6, bias=True, device="cuda") for n in columns], fp6)

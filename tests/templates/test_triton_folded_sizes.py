"""The folded kernels at real sizes, on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import pytest
import sympy
import torch
from support.folded import (
    assert_equal_but_for_one_rounding,
    check_expanded,
    exact_integers,
    folded_rows,
    integers,
    mma_channels,
    multiply,
    random_weight,
)
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

from micromix_compile.numerics import folding, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile, FoldedTiles, tiles_of
from micromix_compile.targets.hopper import TritonFolded

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.kernels import FoldedWeight

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

ALL_TILES = FOLDED_SM_90.tiles


def share(channels: int, share4: float, share6: float) -> Split:
    k4, k6 = (int(channels * part) // BLOCK_SIZE * BLOCK_SIZE for part in (share4, share6))
    return k4, k6, channels - k4 - k6


SHARES = ((0.75, 0.2), (0.5, 0.35), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0))
SIZES = [(1, 1, 64), (3, 5, 96), (7, 999, 160), (16, 576, 576), (17, 1536, 576), (33, 49, 1088), (1, 6144, 4096)]
SIZES += [(16, 4096, 4096), (63, 4097, 4096), (64, 513, 14336), (5, 4096, 14336), (1, 1025, 28672), (31, 257, 28672)]
SIZES += [(129, 257, 8192), (300, 152, 18944), (1000, 999, 2048), (16, 16_000, 576), (100, 12_000, 576)]


@pytest.mark.gpu
@pytest.mark.parametrize("shares", SHARES)
@pytest.mark.parametrize("index", range(len(SIZES)))  # of one size one after the other: their kernels are the same
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

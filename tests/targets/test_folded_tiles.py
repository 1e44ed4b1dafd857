"""Which tiles the folded product takes for some rows, how they are shared, when the library multiplies."""

from __future__ import annotations

from itertools import chain, pairwise

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.folded import (
    random_weight,
)
from support.products import (
    INTERPRETED,
)

from micromix_compile.numerics import folding
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, tiles_of

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]


WIDE_TILES = [tile for _, tile in FOLDED_SM_90.wide]


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

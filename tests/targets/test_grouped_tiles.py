"""Which tile the products of experts take, by how many rows there are for how many experts."""

from __future__ import annotations

import pytest

from micromix_compile.targets.folded_tiles import MAX_LONG_SPLIT, PROCESSORS, PROGRAMS
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90, most_row_tiles, rows_to_hold

QWEN3, MIXTRAL = (128, 1536, 2048), (8, 28672, 4096)
"""(experts, columns, channels) of gate and up in Qwen3-30B-A3B and Mixtral-8x7B."""


@pytest.mark.parametrize(
    ("rows", "shape", "block_m", "split"),
    [
        (8, QWEN3, 16, 2), (128, QWEN3, 16, 1), (512, QWEN3, 16, 1), (4096, QWEN3, 64, 1), (32768, QWEN3, 256, 1),
        (2, MIXTRAL, 16, 1), (32, MIXTRAL, 16, 1), (128, MIXTRAL, 32, 1), (1024, MIXTRAL, 256, 1),
        (8192, MIXTRAL, 256, 1), (2, (8, 4096, 14336), 16, 3), (1, (1, 64, 28672), 16, MAX_LONG_SPLIT),
        (0, QWEN3, 16, 4), (2, (8, 4096, 512), 16, 1),
    ],
)  # fmt: skip
def test_a_tile_holds_half_as_many_rows_again_as_the_mean_and_few_tiles_are_shared(
    rows: int, shape: tuple[int, int, int], block_m: int, split: int
) -> None:
    tile, found = GROUPED_SM_90.tile_for(rows, *shape)
    assert (tile.BLOCK_M, found) == (block_m, split)
    assert tile in GROUPED_SM_90.tiles
    assert (tile.SEGMENT_START > 0) == (split > 1)


def test_shared_tiles_are_no_more_programs_than_run_at_a_time() -> None:
    """Nor are there more parts than pairs of steps, or the sums that they leave take more than 32 MB."""
    for rows in range(1, 200):
        for experts, columns, channels in (QWEN3, MIXTRAL, (4, 64, 14336), (1, 4096, 4096)):
            tile, split = GROUPED_SM_90.tile_for(rows, experts, columns, channels)
            if split > 1:
                tiles = most_row_tiles(rows, experts, tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
                assert tiles * split <= PROGRAMS * PROCESSORS
                assert split * 2 * tile.BLOCK_K <= channels


@pytest.mark.parametrize(
    ("rows", "experts", "hold"), [(0, 8, 0), (1, 8, 1), (8, 8, 2), (10, 1, 15), (128, 8, 24), (32768, 128, 384)]
)
def test_rows_to_hold_are_half_as_many_again_as_the_mean(rows: int, experts: int, hold: int) -> None:
    assert rows_to_hold(rows, experts) == hold

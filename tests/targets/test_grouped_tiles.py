"""Which tile the products of experts take, by how many rows there are for how many experts."""

from __future__ import annotations

import pytest
import torch

from micromix_compile.numerics.folding import factor_shape
from micromix_compile.numerics.layout import packed_shapes
from micromix_compile.targets.folded_tiles import MAX_LONG_SPLIT, PROCESSORS, PROGRAMS
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90, most_row_tiles, rows_to_hold
from micromix_compile.targets.kernels import FoldedWeight

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


def weight(
    experts: int, columns: int, split: tuple[int, int, int], bias: torch.dtype | None = torch.bfloat16
) -> FoldedWeight:
    """Shapes and types only."""
    shapes = (*packed_shapes(columns, split)[:3], factor_shape(columns, split))
    w4, w6, w8, factor = (torch.empty(experts, *shape, dtype=torch.uint8, device="meta") for shape in shapes)
    row_scale = torch.empty(experts, columns, device="meta")
    offset = None if bias is None else torch.empty(experts, columns, dtype=bias, device="meta")
    return FoldedWeight(w4, w6, w8, factor, row_scale, offset)


@pytest.mark.parametrize(
    ("rows", "experts", "block_m"),
    [(least * experts * 2 // 3, experts, tile.BLOCK_M) for least, tile in GROUPED_SM_90.many for experts in (3, 128)],
)
def test_experts_of_many_rows_are_the_persistent_kernel_s(rows: int, experts: int, block_m: int) -> None:
    (least, _), *_ = GROUPED_SM_90.many
    for split in ((1536, 384, 128), (0, 0, 64), (64, 0, 0)):
        tile = GROUPED_SM_90.gluon_tile_for(rows, weight(experts, 768, split), torch.bfloat16)
        assert tile is not None
        assert block_m == tile.BLOCK_M
        few = GROUPED_SM_90.gluon_tile_for((least - 2) * experts * 2 // 3, weight(experts, 768, split), torch.bfloat16)
        assert few is None


@pytest.mark.parametrize(
    ("columns", "split", "bias", "dtype"),
    [
        (772, (64, 0, 0), torch.bfloat16, torch.bfloat16), (768, (64, 96, 32), torch.bfloat16, torch.bfloat16),
        (768, (0, 0, 0), None, torch.bfloat16), (768, (64, 0, 0), torch.float32, torch.bfloat16),
        (768, (64, 0, 0), None, torch.float32),
    ],
)  # fmt: skip
def test_what_the_persistent_kernel_cannot_take_goes_another_way(
    columns: int, split: tuple[int, int, int], bias: torch.dtype | None, dtype: torch.dtype
) -> None:
    assert GROUPED_SM_90.gluon_tile_for(100_000, weight(2, columns, split, bias), dtype) is None

"""The persistent kernel of experts on a GPU that it is made for (sm_90): exact, for any routing, in graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.folded import assert_equal_but_for_one_rounding, exact_integers, folded_rows, integers, random_weight
from support.gpu import launches, needs_folding
from support.products import assert_folded_product_is_exact

from micromix_compile import ops
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.grouped import runs_of
from micromix_compile.targets.grouped import TritonGrouped
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from micromix_compile.targets.gluon_tiles import GluonTile

pytestmark = [pytest.mark.gpu, needs_folding, pytest.mark.usefixtures("nan_filled_memory")]

Split = tuple[int, int, int]

SPLIT: Split = (1024, 320, 96)
TOKENS = 300
TILES = tuple(dict.fromkeys(tile for _, tile in GROUPED_SM_90.many))
each_tile = pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.BLOCK_M}x{tile.BLOCK_N}")


def kernels() -> TritonGrouped:
    """Of the GPU that is here."""
    found = target_of(torch.device("cuda")).grouped
    assert isinstance(found, TritonGrouped)
    assert found.folded is not None
    assert found.folded.many, "the image's Triton compiles the kernel"
    return found


def stacked(weights: Sequence[FoldedWeight]) -> FoldedWeight:
    """The weights of experts as one."""
    return FoldedWeight(*(None if part[0] is None else torch.stack(part) for part in zip(*weights, strict=True)))  # type: ignore[arg-type]


def routing_of(counts: list[int], behind: int = 0) -> tuple[Tensor, Tensor]:
    """So many rows for each expert and behind the last, of random tokens: rows and offs."""
    rows = torch.randint(0, TOKENS, (sum(counts) + behind,), dtype=torch.int32, device="cuda")
    return rows, torch.tensor(counts, device="cuda").cumsum(0, dtype=torch.int32)


def multiply(x: FoldedActivation, rows: Tensor, offs: Tensor, w: FoldedWeight, fp6: str, tile: GluonTile) -> Tensor:
    product = kernels().multiply_many(x.q, x.row_scale, rows, offs, w, fp6, tile)
    assert product is not None
    return product


def part_of(x: FoldedActivation, rows: Tensor) -> FoldedActivation:
    """Some rows."""
    return FoldedActivation(x.q[rows.long()], x.row_scale[rows.long()], x.locks)


COUNTS = {
    "one row": ([0, 1, 0], 0),
    "uneven": ([130, 1, 0, 257, 64, 3], 0),
    "all to one": ([0, 0, 700, 0], 0),
    "none": ([0, 0], 0),
    "behind the last": ([65, 0, 3], 140),
    "only behind": ([0], 70),
}


@each_tile
@pytest.mark.parametrize("counts", list(COUNTS), ids=str)
@pytest.mark.parametrize(
    ("columns", "split", "fp6", "bias"),
    [(200, SPLIT, "e2m3", True), (8, (64, 64, 32), "e3m2", False), (264, (0, 0, 160), "e2m3", True)],
)
def test_products_of_integers_are_exact_for_any_routing(
    tile: GluonTile, counts: str, columns: int, split: Split, fp6: str, bias: bool
) -> None:
    per_expert, behind = COUNTS[counts]
    x, weights = integers(TOKENS, [columns] * len(per_expert), split, fp6, bias=bias, device="cuda")
    rows, offs = routing_of(per_expert, behind)
    if not len(rows):
        return
    got = multiply(x, rows, offs, stacked(weights), fp6, tile)
    for weight, run in zip(weights, runs_of(rows, offs), strict=True):
        if run.stop > run.start:
            want = exact_integers(part_of(x, rows[run]), [weight], fp6)
            assert_equal_but_for_one_rounding(got[run], want)
    assert not got[sum(per_expert) :].any()


@each_tile
def test_products_stay_within_the_derived_bound(tile: GluonTile) -> None:
    x = folded_rows(TOKENS, SPLIT, "e2m3", device="cuda")
    weights = [random_weight(136, SPLIT, "e2m3", device="cuda") for _ in range(3)]
    rows, offs = routing_of([129, 0, 70])
    got = multiply(x, rows, offs, stacked(weights), "e2m3", tile)
    for weight, run in zip(weights, runs_of(rows, offs), strict=True):
        if run.stop > run.start:
            some = part_of(x, rows[run])
            assert_folded_product_is_exact(got[run], some, [weight], "e2m3", mma_channels=x.q.shape[1])


@each_tile
def test_what_nobody_needs_is_not_in_a_product(tile: GluonTile) -> None:
    """Experts without rows, tokens that nobody reads, and weights that rows behind the last are multiplied with."""
    split: Split = (64, 64, 32)
    x = folded_rows(TOKENS, split, "e2m3", device="cuda")
    weights = [random_weight(72, split, "e2m3", bias=True, device="cuda") for _ in range(3)]
    w = stacked(weights)
    w.row_scale[[0, 2]], x.row_scale[5] = torch.nan, torch.nan
    rows, offs = routing_of([0, 66, 0], behind=9)
    rows[rows == 5] = 6
    rows[66:] = 1 << 30  # of no token
    got = multiply(x, rows, offs, w, "e2m3", tile)
    assert bool(got.isfinite().all())
    assert not got[66:].any()


def test_the_operation_takes_the_kernel_where_experts_have_many_rows() -> None:
    x = folded_rows(TOKENS, SPLIT, "e2m3", device="cuda")
    w = stacked([random_weight(256, SPLIT, "e2m3", device="cuda") for _ in range(4)])

    def names(counts: list[int], dtype: torch.dtype) -> list[str]:
        rows, offs = routing_of(counts)
        return launches(lambda: ops.grouped_folded_mm(x.q, x.row_scale, rows, offs, *w, "e2m3", dtype))

    for counts in ([70, 300, 0, 90], [900, 0, 500, 1300]):
        assert sum("grouped_mm_rows" in name for name in names(counts, torch.bfloat16)) == 1
    assert not any("grouped_mm_rows" in name for name in names([3, 4, 1, 0], torch.bfloat16))
    assert not any("grouped_mm_rows" in name for name in names([900, 0, 500, 1300], torch.float32))


@each_tile
def test_one_graph_takes_other_rows_of_other_experts(tile: GluonTile) -> None:
    """The same every time, while others crowd the memory."""
    x = folded_rows(TOKENS, SPLIT, "e2m3", device="cuda")
    w = stacked([random_weight(1032, SPLIT, "e2m3", device="cuda") for _ in range(4)])
    rows, offs = routing_of([500, 100, 0, 424])
    noise, side = torch.randn(64, 2**20, device="cuda"), torch.cuda.Stream()
    multiply(x, rows, offs, w, "e2m3", tile)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multiply(x, rows, offs, w, "e2m3", tile)
    for counts in ([1024, 0, 0, 0], [1, 511, 512, 0], [0, 0, 0, 700]):
        new_rows, new_offs = routing_of(counts, 1024 - sum(counts))
        rows.copy_(new_rows)
        offs.copy_(new_offs)
        want = multiply(x, rows, offs, w, "e2m3", tile).clone()
        for _ in range(4):
            captured.fill_(torch.nan)
            with torch.cuda.stream(side):
                noise.add_(1)
            graph.replay()
            assert torch.equal(captured, want)

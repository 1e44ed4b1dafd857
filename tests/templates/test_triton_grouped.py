"""Products of experts in Triton against the product of each expert: kernels interpreted, or compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.folded import assert_equal_but_for_one_rounding, exact_integers, folded_rows, integers, mma_channels
from support.grouped import expert_of_rows, folded_experts, packed_experts
from support.products import (
    INTERPRETED,
    assert_folded_product_is_exact,
    assert_product_is_exact,
    quantized_rows,
)
from support.strategies import Routing

from micromix_compile import ops
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.numerics.grouped import expert_of, runs_of
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.folded_tiles import FoldedTile
from micromix_compile.targets.gluon_grouped import gather_call
from micromix_compile.targets.grouped import TritonGrouped, grouped_folded_mm_call
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90, most_row_tiles
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of
from micromix_compile.targets.tiles import MIXED_TILES, Tile
from micromix_compile.templates.triton.expert_tiles import expert_tile

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from micromix_compile.targets.launch import KernelCall

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

Split = tuple[int, int, int]

FOLDED = TritonGrouped(MIXED_TILES["sm_90"], GROUPED_SM_90)
UNIT = {"cpu": 2.0**-24, "cuda": 2.0**-23}
TOKENS = 9


def routing_of(counts: list[int], behind: int = 0) -> Routing:
    """So many rows for each expert and behind the last, of random tokens."""
    rows = torch.randint(0, TOKENS, (sum(counts) + behind,), dtype=torch.int32)
    return Routing(rows, torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32))


ROUTINGS = {
    "one row": ([0, 1, 0], 0),
    "all rows to one": ([0, 0, 17, 0], 0),
    "several rows of tiles": ([17, 0, 16], 0),
    "no rows": ([0, 0], 0),
    "rows behind the last": ([3, 0], 17),
    "only rows behind": ([0], 5),
}
counts = st.lists(st.sampled_from([0, 0, 1, 2, 7, 16, 17]), min_size=1, max_size=4)
splits = st.tuples(*[st.integers(0, 3).map(lambda n: n * BLOCK_SIZE)] * 3).filter(any)


def folded_tiles_on(device: str) -> tuple[tuple[FoldedTile, int], ...]:
    """(tile, programs that share one): all on a GPU; in the interpreter small ones, for several programs and steps."""
    if device == "cpu":
        return (FoldedTile(16, 32, 64, 2, 2), 1), (FoldedTile(16, 32, 64, 2, 2, SUM_STEPS=False), 3)
    return (*((tile, 1) for _, tile in GROUPED_SM_90.whole), *((tile, 3) for _, tile in GROUPED_SM_90.shared))


def mixed_tiles_on(device: str) -> tuple[TritonGrouped, tuple[Tile, ...]]:
    """What serves the device, and tiles: the GPU's own, or the interpreter's float32 arithmetic with small ones."""
    if device == "cpu":
        tiles = Tile(16, 32, 64, 4, 2), Tile(32, 16, 128, 4, 2, SWAP=True)
        return TritonGrouped(replace(MIXED_TILES["bf16"], mode="f32")), tiles
    kernels = target_of(torch.device(device)).grouped
    assert isinstance(kernels, TritonGrouped)
    return kernels, tuple(tiles[0] for _, tiles in kernels.tiles.tiles)


def each_expert(got: Tensor, routing: Routing, check: Callable[[Tensor, Tensor, int], None]) -> None:
    """check(rows of the product, rows of x, expert) for each expert that has any; the rest must be zeros."""
    for expert, run in enumerate(runs_of(*routing)):
        if run.stop > run.start:
            check(got[run], routing.rows[run].long(), expert)
    behind = [expert is None for expert in expert_of_rows(*routing)]
    assert not got[torch.tensor(behind, dtype=torch.bool)].any()


def check_folded(
    device: str, routing: Routing, columns: int, split: Split, fp6: str, *, bias: bool, tile: FoldedTile, shared: int
) -> None:
    """One product from memory that is NaN where nobody wrote."""
    x = folded_rows(TOKENS, split, fp6)
    w = folded_experts(len(routing.offs), columns, split, fp6, bias=bias)
    on_device = FoldedWeight(*(None if part is None else part.to(device) for part in w))  # type: ignore[arg-type]
    operands = (part.to(device) for part in (x.q, x.row_scale, *routing))
    got = FOLDED.multiply_folded(*operands, on_device, fp6, torch.float32, tile=tile, split=shared).cpu()
    assert got.shape == (len(routing.rows), columns)

    def check(out: Tensor, rows: Tensor, expert: int) -> None:
        read = FoldedActivation(x.q[rows], x.row_scale[rows], x.locks)
        weight = FoldedWeight(*(None if part is None else part[expert] for part in w))  # type: ignore[arg-type]
        channels = 0 if device == "cpu" else mma_channels(tile, x)
        assert_folded_product_is_exact(out, read, [weight], fp6, mma_channels=channels)

    each_expert(got, routing, check)


def check_mixed(
    device: str, routing: Routing, columns: int, splits: tuple[Split, Split], fp6: str, *, bias: bool, tile: Tile
) -> None:
    """The same with block scales. splits: of activations and of weights."""
    x, w = quantized_rows(TOKENS, splits[0], fp6), packed_experts(len(routing.offs), columns, splits[1], fp6)
    offsets = torch.randn(len(routing.offs), columns) if bias else None
    got = mixed_tiles_on(device)[0].multiply(
        QuantizedActivation(*(part.to(device) for part in x)), *(part.to(device) for part in routing),
        PackedWeight(*(part.to(device) for part in w)), None if offsets is None else offsets.to(device), fp6,
        torch.float32, tile=tile,
    ).cpu()  # fmt: skip
    assert got.shape == (len(routing.rows), columns)

    def check(out: Tensor, rows: Tensor, expert: int) -> None:
        read = QuantizedActivation(*(part[rows] for part in x))
        own = None if offsets is None else offsets[expert]
        assert_product_is_exact(out, read, expert_of(w, expert), own, fp6, unit=UNIT[device])

    each_expert(got, routing, check)


# ---- which tile a program has


@triton.jit(do_not_specialize=["tiles", "column_tiles", "R", "E"])
def tiles_kernel(out, offs, tiles, column_tiles, R, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):  # noqa: ANN001, ANN201, N803 - a Triton kernel
    """What each of `tiles` programs finds: four numbers."""
    for tile in range(tiles):
        expert, first, end, column = expert_tile(offs, tile, column_tiles, R, E, BLOCK_E, BLOCK_M)
        tl.store(out + tile * 4, expert)
        tl.store(out + tile * 4 + 1, first)
        tl.store(out + tile * 4 + 2, end)
        tl.store(out + tile * 4 + 3, column)


@settings(max_examples=12)
@given(counts, st.integers(0, 20), st.integers(1, 3))
@example([0] * 128, 3, 2)
@example([1] * 128 + [16], 0, 1)
@example([16] * 7, 16, 1)
def test_tiles_cover_each_row_and_column_once_and_none_is_missing(
    device: str, counts: list[int], behind: int, column_tiles: int
) -> None:
    offs, rows = torch.tensor(counts).cumsum(0, dtype=torch.int32), sum(counts) + behind
    tiles = most_row_tiles(rows, len(counts), 16) * column_tiles
    found = torch.zeros(tiles, 4, dtype=torch.int32, device=device)
    block_e = triton.next_power_of_2(len(counts))
    tiles_kernel[(1,)](found, offs.to(device), tiles, column_tiles, rows, len(counts), BLOCK_E=block_e, BLOCK_M=16)
    owners = [expert for expert, count in enumerate([*counts, behind]) for _ in range(count)]
    seen = [
        (row, column, expert)
        for expert, first, end, column in found.tolist()
        for row in range(first, min(first + 16, end))
        if column < column_tiles
    ]
    assert sorted(seen) == [(row, column, owners[row]) for row in range(rows) for column in range(column_tiles)]


@settings(max_examples=30)
@given(st.integers(0, 300), st.integers(1, 40), st.sampled_from([16, 32, 64]))
def test_the_worst_distribution_of_rows_needs_as_many_tiles_as_are_launched(rows: int, experts: int, size: int) -> None:
    """A row for each, and all that is left to one of them. One more group has the rows that no expert has."""
    groups = [int(rows > expert) for expert in range(experts + 1)]
    groups[0] += rows - sum(groups)
    assert sum(-(-group // size) for group in groups) == most_row_tiles(rows, experts, size)


# ---- products


@settings(max_examples=6)
@given(st.data(), counts, st.integers(0, 20), splits, st.sampled_from(FP6_FORMATS), st.integers(1, 40), st.booleans())
def test_folded_product_of_any_shape(
    device: str, data: st.DataObject, counts: list[int], behind: int, split: Split, fp6: str, columns: int, bias: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    tile, shared = data.draw(st.sampled_from(folded_tiles_on(device)))
    check_folded(device, routing_of(counts, behind), columns, split, fp6, bias=bias, tile=tile, shared=shared)


@settings(max_examples=8)
@given(st.data(), counts, st.integers(0, 20), splits, st.sampled_from(FP6_FORMATS), st.integers(1, 40), st.booleans())
def test_mixed_product_of_any_shape(
    device: str, data: st.DataObject, counts: list[int], behind: int, split: Split, fp6: str, columns: int, bias: bool
) -> None:
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    tile = data.draw(st.sampled_from(mixed_tiles_on(device)[1]))
    channels = sum(split)
    both = data.draw(st.sampled_from([(split, split), (split, (channels, 0, 0)), ((0, 0, channels), split)]))
    check_mixed(device, routing_of(counts, behind), columns, both, fp6, bias=bias, tile=tile)


@pytest.mark.parametrize("name", ROUTINGS)
def test_products_of_any_routing(device: str, name: str) -> None:
    routing, split = routing_of(*ROUTINGS[name]), (32, 32, 96)
    columns = 33 if device == "cpu" else 200
    for tile, shared in folded_tiles_on(device):
        check_folded(device, routing, columns, split, "e2m3", bias=True, tile=tile, shared=shared)
    for mixed in mixed_tiles_on(device)[1]:
        check_mixed(device, routing, columns, (split, split), "e3m2", bias=True, tile=mixed)


def stacked(weights: list[FoldedWeight]) -> FoldedWeight:
    """Weights of experts from one of each."""
    return FoldedWeight(*(torch.stack(part) for part in zip(*weights, strict=True)))  # type: ignore[arg-type]


def test_products_of_integers_are_exact(device: str) -> None:
    """On a GPU with as many channels as models have, so that loads of all kinds run ahead of each other."""
    split, columns = ((96, 64, 32), 9) if device == "cpu" else ((3072, 832, 192), 200)
    x, weights = integers(TOKENS, [columns] * 5, split, "e2m3", device=device)
    routing = Routing(*(part.to(device) for part in routing_of([3, 0, 70 if device == "cuda" else 18, 1, 16], 2)))
    each = exact_integers(x, weights, "e2m3").unflatten(1, (5, columns))
    owners = [expert for expert in expert_of_rows(*routing) if expert is not None]
    want = each[routing.rows[: len(owners)].long(), torch.tensor(owners, device=device)]
    for tile, shared in folded_tiles_on(device):
        operands = (x.q, x.row_scale, *routing, stacked(weights), "e2m3", torch.float32)
        got = FOLDED.multiply_folded(*operands, tile=tile, split=shared)
        assert_equal_but_for_one_rounding(got[: len(owners)], want)
        assert not got[len(owners) :].any()


def folded_call(q: Tensor, row_scale: Tensor, device: str) -> tuple[KernelCall, Tensor]:
    """The launch of one product of two rows with one expert's weight, and what it fills."""
    split = (q.shape[1] - 32, 0, 32)
    weight = FoldedWeight(*(part.to(device) for part in folded_experts(1, 20, split, "e2m3", bias=True)))  # type: ignore[union-attr]
    rows, offs = (torch.tensor(part, dtype=torch.int32, device=device) for part in ([2, 0], [2]))
    out, unused = torch.empty(2, 20, device=device), torch.empty(0, device=device)
    tile = folded_tiles_on(device)[0][0]
    call = grouped_folded_mm_call(
        q, row_scale, rows, offs, weight, out, unused, unused, fp6="e2m3", tile=tile, split=1
    )  # fmt: skip
    return call, out


def test_short_offsets_are_for_activations_of_less_than_2_gib() -> None:
    for rows, short in ((2**31 // 4096 - 1, True), (2**31 // 4096, False)):
        q = torch.empty(rows, 4096, dtype=torch.uint8, device="meta")
        assert folded_call(q, torch.empty(rows, device="meta"), "cpu")[0].constexprs["SHORT_X"] == short


def test_long_offsets_give_the_same(device: str) -> None:
    x = folded_rows(3, (64, 0, 32), "e2m3", device=device)
    call, out = folded_call(x.q, x.row_scale, device)
    call.launch_on(out)
    want = out.clone()
    replace(call, constexprs={**call.constexprs, "SHORT_X": False}).launch_on(out.fill_(torch.nan))
    assert torch.equal(out, want)


def test_without_tokens_there_are_zeros_behind_the_last_expert(device: str) -> None:
    split = (32, 64, 32)
    rows, offs = (torch.zeros(n, dtype=torch.int32, device=device) for n in (3, 2))
    x, w = folded_rows(0, split, "e2m3", device=device), folded_experts(2, 8, split, "e2m3", bias=True)
    weight = FoldedWeight(*(part.to(device) for part in w if part is not None))
    folded = FOLDED.multiply_folded(x.q, x.row_scale, rows, offs, weight, "e2m3", torch.float32)
    packed = PackedWeight(*(part.to(device) for part in packed_experts(2, 8, split, "e2m3")))
    nothing = QuantizedActivation(*(part.to(device) for part in quantized_rows(0, split, "e2m3")))
    mixed = mixed_tiles_on(device)[0].multiply(nothing, rows, offs, packed, None, "e2m3", torch.float32)
    for out in (folded, mixed):
        assert torch.equal(out, torch.zeros(3, 8, device=device))


def test_experts_without_rows_are_not_read(device: str) -> None:
    """Nor are rows of x that nobody wants: not a number in either would show."""
    routing, split = (
        Routing(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0, 2, 2], dtype=torch.int32)),
        (64, 0, 32),
    )
    x, w = folded_rows(3, split, "e2m3", device=device), folded_experts(3, 20, split, "e2m3", bias=True)
    x.row_scale[1], w.row_scale[0], w.row_scale[2] = torch.nan, torch.nan, torch.nan
    weight = FoldedWeight(*(part.to(device) for part in w if part is not None))
    rows, offs = (part.to(device) for part in routing)
    tile, shared = folded_tiles_on(device)[0]
    got = FOLDED.multiply_folded(x.q, x.row_scale, rows, offs, weight, "e2m3", torch.float32, tile=tile, split=shared)
    assert bool(got.isfinite().all())
    x.row_scale[2] = torch.nan
    got = FOLDED.multiply_folded(x.q, x.row_scale, rows, offs, weight, "e2m3", torch.float32, tile=tile, split=shared)
    assert torch.equal(got.isnan().all(1).cpu(), torch.tensor([False, True]))


@pytest.mark.parametrize("width", [32, 2048, 2080])
def test_rows_are_gathered_as_experts_take_them_and_scales_of_others_are_zeros(device: str, width: int) -> None:
    """What rows behind the last read is not looked at: it need not be there."""
    q, scale = torch.randint(0, 256, (TOKENS, width), dtype=torch.uint8, device=device), torch.randn(TOKENS)
    rows = torch.tensor([3, 8, 0, 0, 1 << 30], dtype=torch.int32, device=device)
    offs = torch.tensor([1, 1, 4], dtype=torch.int32, device=device)
    out = torch.full((5, width), 0xA5, dtype=torch.uint8, device=device)
    out_scale = torch.full((5,), torch.nan, device=device)
    gather_call(q, scale.to(device), rows, offs, out, out_scale).launch_on(out)
    of = rows[:4].long().cpu()
    assert torch.equal(out[:4].cpu(), q.cpu()[of])
    assert torch.equal(out_scale.cpu(), torch.cat((scale[of], torch.zeros(1))))
    assert bool((out[4] == 0xA5).all())


def test_the_sum_is_rounded_once(device: str) -> None:
    """The interpreter's own cast to bfloat16 truncates."""
    routing, split = routing_of([3, 5], 1), (96, 64, 32)
    x, w = folded_rows(TOKENS, split, "e2m3", device=device), folded_experts(2, 20, split, "e2m3", bias=True)
    weight = FoldedWeight(*(part.to(device) for part in w if part is not None))
    rows, offs = (part.to(device) for part in routing)
    for tile, shared in folded_tiles_on(device)[:2]:
        wide, narrow = (
            FOLDED.multiply_folded(x.q, x.row_scale, rows, offs, weight, "e2m3", dtype, tile=tile, split=shared)
            for dtype in (torch.float32, torch.float16)
        )
        assert torch.equal(narrow, wide.half())


@pytest.mark.gpu
def test_one_graph_takes_other_rows_of_other_experts() -> None:
    """Nothing in it waits for the host, or is of the routing that it was captured with; shared tiles too."""
    split = (1024, 256, 64)
    x, w = folded_rows(TOKENS, split, "e2m3", device="cuda"), folded_experts(6, 200, split, "e2m3", bias=True)
    weight = FoldedWeight(*(part.cuda() for part in w if part is not None))
    q = quantized_rows(TOKENS, split, "e2m3")
    packed = packed_experts(6, 200, split, "e2m3")
    x4 = QuantizedActivation(*(part.cuda() for part in q))
    w4 = PackedWeight(*(part.cuda() for part in packed))
    kernels = mixed_tiles_on("cuda")[0]
    routings = [routing_of(counts, 12 - sum(counts)) for counts in ([0, 12, 0, 0, 0, 0], [1, 2, 3, 0, 0, 5], [0] * 6)]
    rows, offs = (part.cuda() for part in routings[0])

    def run() -> tuple[Tensor, Tensor]:
        folded = FOLDED.multiply_folded(x.q, x.row_scale, rows, offs, weight, "e2m3", torch.float32)
        return folded, kernels.multiply(x4, rows, offs, w4, None, "e2m3", torch.float32)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = run()
    for routing in routings:
        rows.copy_(routing.rows)
        offs.copy_(routing.offs)
        graph.replay()
        torch.cuda.synchronize()
        for out, want in zip(outs, run(), strict=True):
            assert torch.equal(out, want)
        assert bool(outs[0][: int(routing.offs[-1])].any(1).all())
        assert not outs[0][int(routing.offs[-1]) :].any()


@pytest.mark.gpu
def test_compiled_graphs_call_the_operations_of_the_device(fresh_compiler: None) -> None:
    """In CUDA graphs, with any number of rows."""
    split = (1024, 256, 64)
    w, packed = folded_experts(6, 200, split, "e2m3", bias=True), packed_experts(6, 200, split, "e2m3")
    folded_parts = [part.cuda() for part in w if part is not None]
    parts = [part.cuda() for part in packed]

    def run(x: list[Tensor], q: list[Tensor], rows: Tensor, offs: Tensor) -> tuple[Tensor, Tensor]:
        folded = ops.grouped_folded_mm(*q, rows, offs, *folded_parts, "e2m3", torch.bfloat16)
        return folded + 1, ops.grouped_mx_mm(*x, rows, offs, *parts, None, "e2m3", torch.bfloat16) + 1

    compiled = torch.compile(run, mode="reduce-overhead")
    with torch.no_grad():
        for counts in ([0, 12, 0, 0, 0, 0], [1, 2, 3, 0, 0, 5], [40, 1, 1, 1, 1, 1]):
            routing = [part.cuda() for part in routing_of(counts, 1)]
            folded = folded_rows(TOKENS, split, "e2m3", device="cuda")
            x, q = [part.cuda() for part in quantized_rows(TOKENS, split, "e2m3")], [folded.q, folded.row_scale]
            for got, want in zip(compiled(x, q, *routing), run(x, q, *routing), strict=True):
                assert torch.equal(got, want)

"""Which products the persistent kernel takes, with which tile, and that its programs share all tiles out."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from micromix_compile.numerics.folding import LOCKS, factor_shape
from micromix_compile.numerics.layout import packed_shapes
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, PROCESSORS
from micromix_compile.targets.gluon_tiles import GluonTiles, Plan, Product, TimedTile, gluon_sm_90, steps_of
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.templates.gluon import shares

if TYPE_CHECKING:
    from collections.abc import Sequence

Split = tuple[int, int, int]

TILES = gluon_sm_90(PROCESSORS)
SPLIT = (3072, 832, 192)
LONG_SPLIT = (10752, 2880, 704)
BF16 = torch.bfloat16


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weights_of(columns: Sequence[int], split: Split = SPLIT, bias: torch.dtype | None = None) -> list[FoldedWeight]:
    """Shapes of a group."""
    return [
        FoldedWeight(
            *(meta(*shape) for shape in (*packed_shapes(n, split)[:3], factor_shape(n, split))),
            meta(n, dtype=torch.float32),
            None if bias is None else meta(n, dtype=bias),
        )
        for n in columns
    ]


# ---- what it takes


@pytest.mark.parametrize(
    ("rows", "columns", "split", "bias", "out_dtype", "reason"),
    [
        (63, [28672], SPLIT, None, BF16, "other kernels are faster for 63 rows of 28672 columns"),
        (64, [4096], SPLIT, None, BF16, "other kernels are faster for 64 rows of 4096 columns"),
        (1025, [4096], SPLIT, None, BF16, "other kernels are faster for 1025 rows"),
        (128, [4096], (3072, 800, 224), None, BF16, "25 blocks of MXFP6 are an odd number of 8"),
        (128, [4096, 1028], SPLIT, None, BF16, r"a multiple of 8, .* got \(4096, 1028\)"),
        (128, [4096], SPLIT, None, torch.float32, "must be bfloat16, got torch.float32"),
        (128, [4096], SPLIT, torch.float32, BF16, "must be bfloat16"),
        (128, [4096, 0], SPLIT, None, BF16, "nothing to multiply"),
        (128, [4096], (0, 0, 0), None, BF16, "nothing to multiply"),
    ],
)
def test_what_is_refused_is_refused_with_a_reason(
    rows: int, columns: list[int], split: Split, bias: torch.dtype | None, out_dtype: torch.dtype, reason: str
) -> None:
    weights = weights_of(columns, split, bias)
    assert re.search(reason, TILES.refusal(Product.of(rows, weights, out_dtype)) or "")
    assert TILES.plan_for(rows, weights, out_dtype) is None


@pytest.mark.parametrize("rows", [65, 128, 129, 512, 1024])
@pytest.mark.parametrize("split", [SPLIT, (32, 0, 0), (0, 64, 0), (0, 0, 32), (96, 64, 32)])
def test_all_other_products_are_taken(rows: int, split: Split) -> None:
    for columns in ([8], [4096], [4096, 1024, 1024], [152_064]):
        for bias in (None, BF16):
            assert TILES.refusal(Product.of(rows, weights_of(columns, split, bias), BF16)) is None
            assert TILES.plan_for(rows, weights_of(columns, split, bias), BF16) is not None


def test_no_rows_are_nobody_s() -> None:
    assert TILES.plan_for(0, weights_of([4096]), BF16) is None


@pytest.mark.parametrize(
    ("rows", "columns", "split", "tile", "programs", "whole"),
    [
        (64, [14336, 14336], SPLIT, (64, 128), 224, 224), (128, [14336, 14336], SPLIT, (128, 64), 264, 448),
        (128, [4096], SPLIT, (128, 64), 128, 0), (128, [4096], LONG_SPLIT, (128, 64), 256, 0),
        (256, [4096], SPLIT, (128, 64), 256, 0), (256, [4096, 1024, 1024], SPLIT, (128, 64), 192, 192),
        (256, [14336, 14336], SPLIT, (256, 128), 132, 224), (256, [4096], LONG_SPLIT, (256, 128), 128, 0),
        (512, [4096], SPLIT, (128, 64), 256, 256), (512, [4096, 1024, 1024], SPLIT, (256, 128), 96, 96),
        (512, [14336, 14336], SPLIT, (256, 128), 132, 264), (512, [4096], LONG_SPLIT, (256, 128), 128, 0),
        (1024, [4096], SPLIT, (256, 128), 128, 128), (1024, [4096, 1024, 1024], SPLIT, (256, 128), 132, 0),
    ],
)  # fmt: skip
def test_the_plan_is_the_one_that_was_measured_to_be_fastest(
    rows: int, columns: list[int], split: Split, tile: tuple[int, int], programs: int, whole: int
) -> None:
    """Of those that the table lists; 28672 x 4096 at 128 rows is within 1 %."""
    plan = TILES.plan_for(rows, weights_of(columns, split), BF16)
    assert plan is not None
    assert ((plan.tile.BLOCK_M, plan.tile.BLOCK_N), plan.programs, plan.whole) == (tile, programs, whole)


def test_the_library_takes_over_where_the_kernel_ends() -> None:
    tiles = FOLDED_SM_90
    with_kernel = replace(tiles, gluon=TILES)
    assert (tiles.all_expand_from, with_kernel.all_expand_from) == (tiles.expand_from, 1025)
    fits, odd = weights_of([64]), weights_of([64], (3072, 800, 224))
    for rows, of_all, of_odd in ((256, False, False), (257, False, True), (1024, False, True), (1025, True, True)):
        assert with_kernel.uses_library(rows, fits, BF16) == of_all
        assert with_kernel.uses_library(rows, odd, BF16) == of_odd


def test_what_is_expanded_already_is_the_librarys_from_its_first_row_on() -> None:
    tiles = replace(FOLDED_SM_90, gluon=TILES)
    for rows, of_expanded in ((256, False), (257, True), (1024, True), (1025, True)):
        assert tiles.uses_library(rows, weights_of([64]), BF16, is_expanded=True) == of_expanded
        assert not tiles.uses_library(rows, weights_of([8]), BF16, is_expanded=True)


# ---- how tiles are shared: the kernel's own functions, in Python


class Program:
    """What `shares` asks Gluon for, of one program."""

    def __init__(self, number: int, programs: int) -> None:
        self._gl = SimpleNamespace(
            program_id=lambda _: number,
            num_programs=lambda _: programs,
            cdiv=lambda a, b: -(-a // b),
            where=lambda condition, a, b: a if condition else b,
            minimum=min,
            maximum=max,
        )

    def __getattr__(self, name: str) -> Any:
        function = getattr(shares, name).fn

        def call(*args: Any) -> Any:
            function.__globals__["gl"], before = self._gl, function.__globals__["gl"]
            try:
                return function(*args)
            finally:
                function.__globals__["gl"] = before

        return call


def pieces(plan: Plan, tiles: int, slots: tuple[int, int, int], number: int) -> list[tuple[int, int, int]]:
    """(tile, first step, last step) of all pieces of a program, in order."""
    program, steps = Program(number, plan.programs), 2 * slots[0] + slots[1] + slots[2]
    share = program.share_of(tiles, plan.whole, steps)
    return [program.piece_of(share, i, plan.whole, steps) for i in range(program.pieces_of(share, steps))]


def check_shares(plan: Plan, tiles: int, slots: tuple[int, int, int]) -> None:
    """All slots of all tiles, once each, and who waits for whom."""
    slots4, slots6, slots8 = slots
    steps = 2 * slots4 + slots6 + slots8
    done: list[tuple[int, int]] = []
    left: dict[int, list[int]] = {}
    wanted: dict[int, list[int]] = {}
    for number in range(plan.programs):
        program = Program(number, plan.programs)
        mine = pieces(plan, tiles, slots, number)
        for place, (tile, first, last) in enumerate(mine):
            assert 0 <= first < last <= steps
            done += [(tile, slot) for slot in range(program.slot_of(first, slots4), program.slot_of(last, slots4))]
            if last < steps:
                shared = next(i for i, one in enumerate(mine) if one[0] >= plan.whole)
                assert place == shared, "it leaves its sum before it waits for others'"
                left.setdefault(tile, []).append(number)
            elif first > 0:
                wanted[tile] = [*range(program.first_program_of(tile, tiles, plan.whole, steps), number)]
    assert len(done) == len(set(done)) == tiles * sum(slots)
    assert left == {tile: programs for tile, programs in wanted.items() if programs}


@given(
    st.integers(1, 600), st.tuples(st.integers(0, 40), st.integers(0, 9), st.integers(0, 9)).filter(any),
    st.sampled_from(TILES.table), st.sampled_from([PROCESSORS, 114, 7]),
)  # fmt: skip
@example(92, (12, 7, 2), TILES.table[2], PROCESSORS)
@example(1, (0, 0, 1), TILES.table[0], PROCESSORS)
def test_programs_compute_all_slots_once_and_wait_only_for_lower_numbers(
    tiles: int, slots: tuple[int, int, int], timed: TimedTile, processors: int
) -> None:
    for _, plan in timed.options(tiles, 2 * slots[0] + slots[1] + slots[2], processors):
        assert 1 <= plan.programs <= processors * timed.tile.PER_SM
        check_shares(plan, tiles, slots)


def test_locks_suffice_on_every_gpu_of_the_kind() -> None:
    for timed in TILES.table:
        assert 144 * timed.tile.PER_SM * timed.tile.consumers <= LOCKS  # GH200 has the most processors


@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([1, 8]))
def test_each_tile_has_one_place(row_tiles: int, column_tiles: int, group_m: int) -> None:
    program = Program(0, 1)
    places = {program.place_of(tile, row_tiles, column_tiles, group_m) for tile in range(row_tiles * column_tiles)}
    assert places == {(row, column) for row in range(row_tiles) for column in range(column_tiles)}


@given(st.integers(0, 30), st.integers(0, 30))
def test_slots_begin_where_their_steps_do(slots4: int, others: int) -> None:
    program = Program(0, 1)
    for slot in range(slots4 + others + 1):
        assert program.slot_of(program.step_of(slot, slots4), slots4) == slot


def test_steps_are_whole_slots() -> None:
    assert [steps_of(split) for split in (SPLIT, (32, 0, 0), (0, 160, 0), (288, 64, 32))] == [33, 2, 2, 6]


def test_tables_of_others_take_other_rows() -> None:
    few = GluonTiles(table=TILES.table[:1], processors=PROCESSORS)
    assert few.most_rows == 64
    assert few.tiles == (TILES.table[0].tile,)
    assert few.plan_for(65, weights_of([28672]), BF16) is None

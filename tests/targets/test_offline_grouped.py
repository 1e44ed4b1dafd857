"""Products of experts compiled for GPUs that aren't here: which matrix instructions, how many, registers, what room."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import test_offline_compile as mixed
from support.covering import cover, params, runs_deep
from test_offline_compile import SPILL_LIMIT, compile_once, expected_step

from micromix_compile.numerics.formats import FP6_FORMATS
from micromix_compile.targets import offline, ptx
from micromix_compile.targets.folded_tiles import MAX_LONG_SPLIT, FoldedTile
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90
from micromix_compile.targets.offline import NotSupported
from micromix_compile.targets.tiles import MIXED_TILES

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.targets.offline import Kernel
    from micromix_compile.targets.ptx import Compiled

HOPPER = 90


@dataclass(frozen=True)
class Folded:
    """A tile of folded products, a program's or shared."""

    tile: FoldedTile
    fp6: str
    bias: bool
    split_k: int
    experts: int

    def __str__(self) -> str:
        """A test's name."""
        tile = f"{self.tile.BLOCK_M}x{self.tile.BLOCK_N}x{self.tile.BLOCK_K}{'-sums' * self.tile.SUM_STEPS}"
        return f"{tile}-{self.fp6}{'-bias' * self.bias}-split{self.split_k}-{self.experts}"

    @property
    def kernel(self) -> Kernel:
        return offline.grouped_folded_mm(
            HOPPER, self.tile, fp6=self.fp6, bias=self.bias, split_k=self.split_k, experts=self.experts
        )


def kernel_of_experts(case: mixed.Case) -> Kernel:
    """The case's product with many weights in place of one."""
    return offline.grouped_mx_mm(
        case.capability, case.tile, MIXED_TILES[case.family], w_fp4=case.w_fp4, fp6=case.fp6, bias=case.bias,
        activations=case.activations,
    )  # fmt: skip


KINDS = [(tile, 1) for _, tile in GROUPED_SM_90.whole]
KINDS += [(tile, split) for _, tile in GROUPED_SM_90.shared for split in (2, MAX_LONG_SPLIT)]
FOLDED = [
    Folded(tile, fp6, bias, split, experts)
    for tile, split in KINDS
    for fp6, bias, experts in ((FP6_FORMATS[0], True, 128), (FP6_FORMATS[1], False, 8), (FP6_FORMATS[0], False, 128))
]
MIXED = [
    case for case in mixed.TABLE if not case.swizzled and case.tile in mixed.defaults(MIXED_TILES[case.family])
]  # fmt: skip
QUICK_FOLDED = cover(FOLDED, lambda case: ((case.tile, case.split_k), (case.fp6, case.bias, case.experts)))
QUICK_MIXED = cover(
    MIXED,
    lambda case: (
        *((case.capability,), (case.family, case.tile.SWAP), (case.family, case.w_fp4)),
        *((case.family, case.activations), (case.fp6,)),
    ),
)
Case = Folded | mixed.Case


@pytest.fixture(scope="module")
def compiled(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Mapping[Case, Compiled | NotSupported]:
    """Everything this file looks at."""
    folded, blocked = (FOLDED, MIXED) if runs_deep(request) else (QUICK_FOLDED, QUICK_MIXED)
    kernels: dict[Case, Kernel] = {case: case.kernel for case in folded}
    kernels |= {case: kernel_of_experts(case) for case in blocked}
    return compile_once(kernels, tmp_path_factory, "offline_grouped")


@pytest.fixture
def result(compiled: Mapping[Case, Compiled | NotSupported], case: Case) -> Compiled:
    found = compiled[case]
    if isinstance(found, NotSupported):
        pytest.skip(found.reason)
    return found


@pytest.mark.parametrize("case", params(FOLDED, QUICK_FOLDED), ids=str)
def test_each_step_of_a_folded_product_issues_fp8_instructions_and_no_others(case: Folded, result: Compiled) -> None:
    """One loop a segment, as in the product of one weight."""
    tile = case.tile
    count = (tile.BLOCK_N // 64) * -(-tile.BLOCK_M // 256) * (tile.BLOCK_K // 32) * 4 // tile.num_warps
    assert count > 0
    assert result.mma_blocks == (("wgmma e4m3", count),) * 3
    assert result.mma_ended == (True,) * 3


@pytest.mark.parametrize("case", params(FOLDED, QUICK_FOLDED), ids=str)
def test_folded_products_read_nothing_ahead_of_the_wait_and_leave_room_for_others(
    case: Folded, result: Compiled
) -> None:
    """Three programs of a tile of up to 64 rows fit a processor, two of a larger one, for they wait in turns."""
    programs = 3 if case.tile.BLOCK_M <= 64 else 2
    assert result.before_wait == ()
    assert result.registers * 32 * case.tile.num_warps * programs <= 65536
    assert result.shared_bytes * programs <= 233_472


@pytest.mark.parametrize("case", params(MIXED, QUICK_MIXED), ids=str)
def test_each_step_issues_the_matrix_instructions_that_the_tile_needs(case: mixed.Case, result: Compiled) -> None:
    """Those of the product of one weight: block-scaled where the family says so, and then nothing else."""
    expected = expected_step(case)
    assert result.emulated == (MIXED_TILES[case.family].mode != "scaled")
    assert result.mma.keys() == expected.keys()
    for kind, (count, segments) in expected.items():
        assert count > 0
        steps = [found for name, found in result.mma_blocks if name == kind]
        assert set(steps) == {count}
        assert segments <= len(steps) <= 2 * segments


@pytest.mark.parametrize("case", params([*FOLDED, *MIXED], [*QUICK_FOLDED, *QUICK_MIXED]), ids=str)
def test_products_fit_and_neither_spill_nor_trap_nor_flush_subnormals(case: Case, result: Compiled) -> None:
    capability, family = (HOPPER, "sm_90") if isinstance(case, Folded) else (case.capability, case.family)
    assert result.target == offline.target_name(capability)
    assert result.spilled_bytes <= SPILL_LIMIT
    assert 0 < result.shared_bytes <= MIXED_TILES[family].shared_memory
    assert result.tensor_columns <= ptx.TENSOR_MEMORY_COLUMNS
    assert (result.tensor_columns > 0) == (family == "sm_100")
    assert not result.trap
    assert not result.flushing

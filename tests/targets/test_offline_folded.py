"""The folded kernels compiled for sm_90, which isn't here: FP8 matrix instructions, their number, registers, room."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from support.covering import cover, params, runs_deep
from support.digests import assert_recorded
from test_offline_compile import MANY, ROUNDINGS, SPILL_LIMIT, compile_once

from micromix_compile.numerics import folding
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.numerics.layout import packed_shapes
from micromix_compile.targets import folded_tiles, offline
from micromix_compile.targets.described import FOLDED_KIND
from micromix_compile.targets.expansion import ExpandedWeights, expand_call
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTile
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.targets.hopper import reorder_fold_call
from micromix_compile.targets.kernels import FoldedWeight, Residual
from micromix_compile.targets.offline import Kernel, kernel_of
from micromix_compile.targets.ptx import Compiled

CAPABILITY = 90
SMALL_TILE_REGISTERS = 65536 // 3 // 128 // 8 * 8  # three programs of four warps, which `parts_for` counts on
FOUR_PROGRAMS_REGISTERS = 65536 // 4 // 128  # on an H100 a product of 16 rows was 12 % slower with three


@dataclass(frozen=True)
class Case:
    """A tile of the product: some weights, with biases or not, tiles whole or shared. split: channels per format."""

    tile: FoldedTile
    fp6: str
    groups: int
    bias: bool
    split_k: int
    columns: int = 4096
    split: tuple[int, int, int] = (3072, 832, 192)

    def __str__(self) -> str:
        """A test's name, such as `16x64x256-sums-e2m3-1-split6-4096-192`."""
        tile = f"{self.tile.BLOCK_M}x{self.tile.BLOCK_N}x{self.tile.BLOCK_K}{'-sums' * self.tile.SUM_STEPS}"
        return (
            f"{tile}-{self.fp6}-{self.groups}{'-bias' * self.bias}-split{self.split_k}-{self.columns}-{self.split[2]}"
        )

    @property
    def most_registers(self) -> int:
        """Of a thread. One weight with a sum a step takes up to 144."""
        if self.tile in [tile for _, tile in FOLDED_SM_90.wide]:
            return 255
        is_shared = self.split_k > 1 and (self.groups > 1 or not self.tile.SUM_STEPS)
        return FOUR_PROGRAMS_REGISTERS if self.tile.BLOCK_M == 16 and is_shared else SMALL_TILE_REGISTERS

    @property
    def kernel(self) -> Kernel:
        return offline.folded_mm(
            CAPABILITY, self.tile, fp6=self.fp6, groups=self.groups, bias=self.bias, split_k=self.split_k,
            columns=self.columns, split=self.split,
        )  # fmt: skip


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def split_of(channels: int) -> tuple[int, int, int]:
    k6, k8 = channels // 5 // BLOCK_SIZE * BLOCK_SIZE, channels // 20 // BLOCK_SIZE * BLOCK_SIZE
    return channels - k6 - k8, k6, k8


def reorder_fold(
    producer: str, channels: int, *, rows: int, scale_rounding: str = "fit", w_fp4: bool = False,
    products: tuple[list[int], ...] = (), activations: str = "same", rotates: bool = False,
) -> Kernel:  # fmt: skip
    """The launch that `hopper` would make for rows of bfloat16. rotates: the blocks whose weights are MXFP4."""
    x = meta(rows, channels, dtype=torch.bfloat16)
    width = folding.fold_width(split_of(channels), w_fp4=w_fp4)
    out = FoldedActivation(meta(rows, width), meta(rows, dtype=torch.float32), meta(folding.LOCKS, dtype=torch.int32))
    residual = Residual(x, x) if producer == "residual" else None
    producer = "rms_norm" if residual else producer
    other = {"none": None, "rms_norm": x[0], "silu_mul": x}[producer]
    call = reorder_fold_call(
        producer, x, other, 1e-5, meta(channels, dtype=torch.int16), split_of(channels), out, fp6="e2m3",
        scale_rounding=scale_rounding, w_fp4=w_fp4, residual=residual, products=products,
        activations=activations, rotated=split_of(channels)[0] if rotates else 0, tiles=FOLDED_SM_90,
    )  # fmt: skip
    return kernel_of(call, CAPABILITY)


def expand_weights(fp6: str, group: int) -> Kernel:
    split = split_of(4096)
    parts = (*packed_shapes(64, split)[:3], folding.factor_shape(64, split))
    bias = meta(64, dtype=torch.bfloat16) if group > 1 else None
    weight = FoldedWeight(*(meta(*shape) for shape in parts), meta(64, dtype=torch.float32), bias)
    out = ExpandedWeights.empty([weight] * group, meta(0))
    return kernel_of(expand_call([weight] * group, out, fp6=fp6), CAPABILITY)


TILES = FOLDED_SM_90.tiles
KINDS = ((1, False, 1), (1, False, folded_tiles.MAX_LONG_SPLIT), (MAX_GROUP, True, folded_tiles.MAX_SPLIT))
PRODUCTS = [Case(tile, fp6, *kind) for tile, fp6, kind in product(TILES, FP6_FORMATS, KINDS)]
PRODUCTS += [Case(TILES[0], fp6, 2, bias, 2) for fp6, bias in product(FP6_FORMATS, (False, True))]  # gate and up
EARLY = [Case(FOLDED_SM_90.shared[-1][1], "e2m3", *kind) for kind in ((1, False, 4), (1, True, 4), (3, False, 4))]
PRODUCTS += [Case(tile, "e2m3", *kind, split=(0, 0, 4096)) for tile, kind in product(TILES[1:], KINDS[1:])]
PRODUCTS += [*EARLY, *(Case(TILES[0], "e2m3", *KINDS[0], columns) for columns in (1, 999))]
FOLDS = {
    f"{producer}-{channels}-{rows}-{rounding}{'-w_fp4' * w_fp4}": reorder_fold(
        producer, channels, rows=rows, scale_rounding=rounding, w_fp4=w_fp4
    )
    for producer, channels, w_fp4 in (
        *(("none", 4096, False), ("none", 4096, True), ("rms_norm", 4096, False), ("rms_norm", 8192, False)),
        *(("residual", channels, False) for channels in (4096, 8192, 28672)),
        *((producer, channels, False) for producer in ("none", "rms_norm", "silu_mul") for channels in (14336, 28672)),
    )
    for rows, rounding in ROUNDINGS
}
for name in ("none", "rms_norm", "residual"):
    FOLDS[f"{name}-4096-1-start"] = reorder_fold(
        name, 4096, rows=1, scale_rounding="fit", w_fp4=False, products=([4096],)
    )
OTHER_FOLDS = {
    f"{producer}-{channels}-{rows}-{activations}{'-rotated' * rotates}": reorder_fold(
        producer, channels, rows=rows, activations=activations, rotates=rotates
    )
    for producer, channels, rows in product(
        ("none", "rms_norm", "residual", "silu_mul"), (4096, 14336, 28672), (16, MANY)
    )
    for activations, rotates in product(("same", "fp8", "mxfp6"), (False, True))
    if (activations, rotates) != ("same", False)
}
ALL_FOLDS = FOLDS | OTHER_FOLDS
BY_BLOCKS = [name for name, kernel in OTHER_FOLDS.items() if kernel.constexprs["BY_BLOCKS"] and "fp8" in name]
EXPANSIONS = {f"{fp6}-{group}": expand_weights(fp6, group) for fp6 in FP6_FORMATS for group in (1, MAX_GROUP)}


def properties(case: Case) -> tuple[object, ...]:
    """What a case of every run's must show: of a tile whole and shared, of weights each number, bias and FP6 format."""
    is_shared = case.split_k > 1
    weights = (case.groups, case.bias, is_shared), (case.fp6, is_shared), (case.groups, case.split)
    return (case.tile, is_shared), *weights, ("columns", case.columns)


def fold_properties(name: str) -> tuple[object, ...]:
    """The same of a quantizer: of a producer each width and number of rows."""
    producer, channels, rows, rounding, *weights = name.split("-")
    return (producer, channels, *weights), (producer, rows, rounding), (channels, rows)


QUICK = [case for case in PRODUCTS if case in cover(PRODUCTS, properties) + EARLY]


def other_properties(name: str) -> tuple[object, ...]:
    """The same where activations have a format of their own, or are rotated."""
    producer, channels, rows, *kind = name.split("-")
    return (tuple(kind), producer), (tuple(kind), channels), (tuple(kind), rows)


QUICK_FOLDS = cover(list(FOLDS), fold_properties)
QUICK_OTHERS = cover(list(OTHER_FOLDS), other_properties)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[Case | str, Compiled]:
    """Everything this file looks at."""
    products, folds = (PRODUCTS, list(ALL_FOLDS)) if runs_deep(request) else (QUICK, QUICK_FOLDS + QUICK_OTHERS)
    kernels: dict[Case | str, Kernel] = {case: case.kernel for case in products}
    kernels |= {name: ALL_FOLDS[name] for name in folds} | EXPANSIONS
    found = compile_once(kernels, tmp_path_factory, "offline_folded")
    return {name: result for name, result in found.items() if isinstance(result, Compiled)}


@pytest.mark.parametrize("case", params(PRODUCTS, QUICK), ids=str)
def test_each_step_of_a_product_issues_fp8_instructions_and_no_others(
    compiled: dict[Case | str, Compiled], case: Case
) -> None:
    """One loop a segment. Four warps share an instruction of 64 rows on the left, at most 256 on the right, 32 deep."""
    tile, result = case.tile, compiled[case]
    count = (tile.BLOCK_N // 64) * -(-tile.BLOCK_M // 256) * (tile.BLOCK_K // 32) * 4 // tile.num_warps
    assert count > 0
    assert result.mma_blocks == ((FOLDED_KIND, count),) * 3


@pytest.mark.parametrize("case", params(PRODUCTS, QUICK), ids=str)
def test_products_fit_into_registers_and_shared_memory(compiled: dict[Case | str, Compiled], case: Case) -> None:
    result = compiled[case]
    assert result.spilled_bytes <= SPILL_LIMIT
    assert 0 < result.registers <= case.most_registers
    assert 0 < result.shared_bytes <= FOLDED_SM_90.shared_memory
    assert result.tensor_columns == 0
    assert result.target == "sm_90a"
    assert not result.serialized
    assert result.mma_ended == (True,) * 3
    assert not result.trap
    assert not result.flushing


@pytest.mark.parametrize("case", EARLY, ids=str)
def test_no_more_than_three_programs_of_64_rows_fit_a_processor(
    compiled: dict[Case | str, Compiled], case: Case
) -> None:
    """For `release_for` lets them start while the quantizer has some of the processors, in so many parts."""
    assert compiled[case].registers > FOUR_PROGRAMS_REGISTERS


@pytest.mark.parametrize("name", params([*ALL_FOLDS, *EXPANSIONS], [*QUICK_FOLDS, *QUICK_OTHERS, *EXPANSIONS]))
def test_folding_kernels_neither_spill_nor_trap_nor_flush_subnormals(
    compiled: dict[Case | str, Compiled], name: str
) -> None:
    """Only the norm's reciprocal square root may flush: its argument is at least eps."""
    result = compiled[name]
    assert result.spilled_bytes <= SPILL_LIMIT
    assert result.shared_bytes <= FOLDED_SM_90.shared_memory
    assert not result.trap
    assert not result.half_defined
    assert not result.mma_blocks
    assert set(result.flushing) <= ({"rsqrt.approx.ftz.f32"} if name.startswith(("rms_norm", "residual")) else set())


@pytest.mark.parametrize(
    "case", params([*PRODUCTS, *ALL_FOLDS, *EXPANSIONS], [*QUICK, *QUICK_FOLDS, *QUICK_OTHERS, *EXPANSIONS]), ids=str
)
def test_nothing_is_read_or_written_before_the_wait_for_the_kernels_before(
    compiled: dict[Case | str, Compiled], case: Case | str
) -> None:
    assert compiled[case].before_wait == ()


@pytest.mark.parametrize(
    "case", params([*PRODUCTS, *ALL_FOLDS, *EXPANSIONS], [*QUICK, *QUICK_FOLDS, *QUICK_OTHERS, *EXPANSIONS]), ids=str
)
def test_the_ptx_is_what_is_recorded(
    compiled: dict[Case | str, Compiled], case: Case | str, request: pytest.FixtureRequest
) -> None:
    assert_recorded("ptx", str(case), compiled[case].ptx_digest, may_lack=runs_deep(request))


@pytest.mark.parametrize("name", params(BY_BLOCKS, [name for name in BY_BLOCKS if name in QUICK_OTHERS]))
def test_threads_that_have_whole_blocks_exchange_nothing_but_what_the_gather_and_the_row_need(
    compiled: dict[Case | str, Compiled], name: str
) -> None:
    """Shared memory is that of the gather: one row of bfloat16, as a power of two."""
    kernel = ALL_FOLDS[name]
    assert compiled[name].shared_bytes == 2 * kernel.constexprs["BLOCK_C"]  # type: ignore[operator]
    assert compiled[name].registers <= 65536 // (32 * kernel.num_warps)


def test_many_rows_of_every_producer_go_by_blocks() -> None:
    assert {name.split("-")[0] for name in BY_BLOCKS} == {"none", "rms_norm", "residual", "silu_mul"}
    assert {name.split("-")[2] for name in BY_BLOCKS} == {str(MANY)}


def test_quantizers_of_every_release_are_compiled() -> None:
    assert {FOLDS[name].constexprs["RELEASE"] for name in QUICK_FOLDS} == {"start", "stores", "end"}

"""The folded kernels compiled for sm_90, which isn't here: FP8 matrix instructions, their number, registers, room."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

import pytest
import torch
from test_offline_compile import SPILL_LIMIT, kernel_of

from micromix_compile import folding, gpu, gpu_folded
from micromix_compile.folding import FoldedActivation
from micromix_compile.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.gpu_folded import FoldedWeight
from micromix_compile.lowering import offline
from micromix_compile.lowering.offline import Compiled, Kernel
from micromix_compile.templates.tiles import FAMILIES, FOLDED_TILES, WIDE_FOLDED_TILES, FoldedTile

CAPABILITY = 90
MANY = gpu.FEW_ROWS + 1


@dataclass(frozen=True)
class Case:
    """A tile of the product. Two variants, so that a group, a bias and shared tiles occur or not."""

    tile: FoldedTile
    fp6: str
    groups: int
    columns: int = 4096

    def __str__(self) -> str:
        """A test's name, such as `16x64x256-e2m3-1`."""
        tile = self.tile
        return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}-{self.fp6}-{self.groups}-{self.columns}"

    @property
    def kernel(self) -> Kernel:
        more = self.groups > 1
        return offline.folded_mm(
            CAPABILITY,
            self.tile,
            fp6=self.fp6,
            groups=self.groups,
            bias=more,
            split_k=4 if more else 1,
            columns=self.columns,
        )


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def split_of(channels: int) -> tuple[int, int, int]:
    k6, k8 = channels // 5 // BLOCK_SIZE * BLOCK_SIZE, channels // 20 // BLOCK_SIZE * BLOCK_SIZE
    return channels - k6 - k8, k6, k8


def reorder_fold(producer: str, channels: int, *, rows: int = 16, w_fp4: bool = False) -> Kernel:
    """The launch that `gpu_folded` would make for rows of bfloat16."""
    x = meta(rows, channels, dtype=torch.bfloat16)
    width = folding.fold_width(split_of(channels), w_fp4=w_fp4)
    out = FoldedActivation(meta(rows, width), meta(rows, dtype=torch.float32), meta(folding.LOCKS, dtype=torch.int32))
    other = {"none": None, "rms_norm": x[0], "silu_mul": x}[producer]
    call = gpu_folded.reorder_fold_call(
        producer, x, other, 1e-5, meta(channels, dtype=torch.int32), split_of(channels), out, fp6="e2m3",
        scale_rounding="rceil", w_fp4=w_fp4,
    )  # fmt: skip
    return kernel_of(call, CAPABILITY)


def expand_weight(fp6: str) -> Kernel:
    k4, k6, k8 = split_of(4096)
    parts = (64, k4 // 2), (3, 64, k6 // 4), (64, k8), folding.factor_shape(64, (k4, k6, k8))
    weight = FoldedWeight(*(meta(*shape) for shape in parts), meta(64, dtype=torch.float32))
    out = meta(64, folding.fold_width((k4, k6, k8), w_fp4=False))
    return kernel_of(gpu_folded.expand_call(weight, out, fp6=fp6), CAPABILITY)


TILES = tuple(tile for _, tile in (*FOLDED_TILES, *WIDE_FOLDED_TILES))
PRODUCTS = [Case(*parts) for parts in product(TILES, FP6_FORMATS, (1, gpu_folded.MAX_GROUP))]
PRODUCTS += [Case(TILES[0], "e2m3", 1, columns) for columns in (1, 999)]
OTHERS = {
    "reorder_fold-none-4096": reorder_fold("none", 4096),
    "reorder_fold-none-4096-w_fp4": reorder_fold("none", 4096, w_fp4=True),
    "reorder_fold-rms_norm-4096": reorder_fold("rms_norm", 4096),
    "reorder_fold-silu_mul-14336": reorder_fold("silu_mul", 14336),
    "reorder_fold-none-28672": reorder_fold("none", 28672),
    "reorder_fold-rms_norm-4096-many": reorder_fold("rms_norm", 4096, rows=MANY),
    "reorder_fold-silu_mul-14336-many": reorder_fold("silu_mul", 14336, rows=MANY),
    "reorder_fold-none-28672-many": reorder_fold("none", 28672, rows=MANY),
    "reorder_fold-silu_mul-28672-many": reorder_fold("silu_mul", 28672, rows=MANY),
    **{f"expand_weight-{fp6}": expand_weight(fp6) for fp6 in FP6_FORMATS},
}


@pytest.fixture(scope="module")
def compiled() -> dict[Case | str, Compiled]:
    """Everything this file looks at, compiled once."""
    kernels: dict[Case | str, Kernel] = {case: case.kernel for case in PRODUCTS} | OTHERS
    results = dict(zip(kernels, offline.compile_all(list(kernels.values())), strict=True))
    return {name: result for name, result in results.items() if isinstance(result, Compiled)}


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_each_step_of_a_product_issues_fp8_instructions_and_no_others(
    compiled: dict[Case | str, Compiled], case: Case
) -> None:
    """One loop a segment. Four warps share an instruction of 64 rows on the left, at most 256 on the right, 32 deep."""
    tile, result = case.tile, compiled[case]
    count = (tile.BLOCK_N // 64) * -(-tile.BLOCK_M // 256) * (tile.BLOCK_K // 32) * 4 // tile.num_warps
    assert count > 0
    assert result.mma_blocks == (("wgmma e4m3", count),) * 3


@pytest.mark.parametrize("case", PRODUCTS, ids=str)
def test_products_fit_into_registers_and_shared_memory(compiled: dict[Case | str, Compiled], case: Case) -> None:
    result = compiled[case]
    assert result.spilled_bytes <= SPILL_LIMIT
    assert 0 < result.registers <= 255
    assert 0 < result.shared_bytes <= FAMILIES["sm_90"].shared_memory
    assert result.tensor_columns == 0
    assert result.target == "sm_90a"
    assert not result.serialized
    assert not result.trap
    assert not result.flushing


@pytest.mark.parametrize("name", OTHERS)
def test_folding_kernels_neither_spill_nor_trap_nor_flush_subnormals(
    compiled: dict[Case | str, Compiled], name: str
) -> None:
    """Only the norm's reciprocal square root may flush: its argument is at least eps."""
    result = compiled[name]
    assert result.spilled_bytes <= SPILL_LIMIT
    assert result.shared_bytes <= FAMILIES["sm_90"].shared_memory
    assert not result.trap
    assert not result.mma_blocks
    assert set(result.flushing) <= ({"rsqrt.approx.ftz.f32"} if "rms_norm" in name else set())

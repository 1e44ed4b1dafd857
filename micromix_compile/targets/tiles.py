"""Tiles of the mixed matmul, per GPU family and number of rows; the first of each list is the default.

With Inductor's max_autotune every tile of a list is a choice; otherwise the first is taken, so that a cold compile
builds one kernel a shape of output.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Tile:
    """One program's share: (BLOCK_M, BLOCK_N) of the output in steps of BLOCK_K.

    SWAP: the weights are the left operand, for few rows. GROUP_M: rows of tiles that run together, for L2.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SWAP: bool = False
    GROUP_M: int = 8


@dataclass(frozen=True, slots=True)
class Family:
    """GPUs that run the same kernels.

    mma: for people. mode: `MODE` of templates/mixed_mx_mm.py. widen_fp4: MXFP4 weights meet MXFP8 activations as
    MXFP8, because the compiler has no block-scaled MMA of two element families. shared_memory: bytes a program may use.
    tiles: (largest M, tiles), ascending; the last holds for every M. folds: bfloat16 models run `folded_mm_kernel`
    on FP8 MMA instead, unless exactness is asked for.
    """

    mma: str
    mode: str
    widen_fp4: bool
    shared_memory: int
    tiles: tuple[tuple[int, tuple[Tile, ...]], ...]
    folds: bool = False

    def constants(
        self, tile: Tile, *, fp6: str, w_fp4: bool, has_bias: bool, x_swizzled: bool = False, w_swizzled: bool = False
    ) -> dict[str, bool | int | str]:
        """What `mixed_mx_mm_kernel` is compiled with for one of the tiles."""
        return {
            "FP6": fp6,
            "W_FP4": w_fp4,
            "HAS_BIAS": has_bias,
            "MODE": self.mode,
            "SWAP": tile.SWAP,
            "WIDEN_FP4": self.widen_fp4,
            "X_SWIZZLED": x_swizzled,
            "W_SWIZZLED": w_swizzled,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "GROUP_M": tile.GROUP_M,
        }

    def tiles_for(self, rows: int) -> tuple[Tile, ...]:
        """The tiles for M = rows, the default first."""
        return next((tiles for most, tiles in self.tiles if rows <= most), self.tiles[-1][1])


_ANY: Final = 1 << 62

FEW_ROWS: Final = 4
"""Up to which folding quantizers ask for the order of the channels ahead of their input, and let their product start
before they end: for more, that takes longer than it helps, see `gpu_folded.release_for`."""


@dataclass(frozen=True, slots=True)
class FoldedTile:
    """One program's share of `folded_mm_kernel`: (BLOCK_M, BLOCK_N) of the output in steps of BLOCK_K.

    SUM_STEPS: each step has a sum of its own, for the matrix instructions add with about 14 bits. Without, they add
    over all of K, as the library's do with fast accumulation, which leaves registers for more programs or larger tiles.
    SEGMENT_START: what the first step of MXFP6, and of MXFP8, counts for where programs share a tile, beside its bytes;
    a step of MXFP4 counts for 2.
    """

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    num_warps: int
    num_stages: int
    SUM_STEPS: bool = True
    SEGMENT_START: int = 0

    @property
    def releases(self) -> bool:
        """`RELEASES` of the kernel: whether the next one may start before this has added up and stored its sums.

        On an H100 at M = 16, us of quantizer and product with and without: N x K of 4096 x 4096 10.2 and 10.6, of 6144
        x 4096 12.3 and 12.6, of 4096 x 14336 23.1 and 22.6; but at M = 64 16.1 and 15.8 of the second, 31.2 and 29.6 of
        the last.
        """
        return self.BLOCK_M == 16

    def stages8(self, split: tuple[int, int, int], weights: int) -> int:
        """`STAGES8` of the kernel for weights of (k4, k6, k8): two where MXFP8 is a small part and registers suffice.

        On an H100, us of quantizer and product in 2 and 3 stages, a 75/20/5 split, M = 1 and 16: N x K of 4096 x 4096
        9.0 and 9.4, 10.3 and 10.4; of 6144 x 4096 10.6 and 11.1, 11.8 and 11.9; of 4096 x 14336 20.3 and 21.3, 22.1 and
        22.4; at M = 64 14.7 and 15.0 for 6144 x 4096, 42.1 and 42.5 for 28672 x 4096. With 15 % MXFP8 two are better in
        9 of 12 cases, with 20 % in 5, with nothing else 11.4 and 10.6 at 4096 x 4096 and M = 1. With sums a step two
        take 130 registers instead of 127, so that three programs fit a processor instead of four: 39.6 and 35.4 at M =
        16, 28672 x 4096. At M = 64 and one weight without a bias they take 128 instead of 130, so that four fit, of
        which those that start early crowd: with a bias 4096 x 4096, held to 128, took 16.2, with three programs 12.7.
        """
        is_small = 6 * split[2] <= sum(split)
        return 2 if is_small and not self.SUM_STEPS and (self.BLOCK_M == 16 or weights > 1) else self.num_stages

    @property
    def copied_factors(self) -> int:
        """`COPIED` of the kernel: factors of a row and step, or twice that where each thread would have 2 bytes."""
        factors = self.BLOCK_K // 32
        return factors if factors * self.BLOCK_N >= 4 * 32 * self.num_warps else 2 * factors


# Swept on an H200, CUDA-graph replay over rotating weights, a 75/20/5 split, N x K of 28672 x 4096, all tiles whole,
# operands in an earlier order. At M = 16, 33.1 us; with steps of 128 channels 35.9, with four stages, of which three
# programs fit a processor, 41.5. At M = 32, 38.5; with steps of 256 channels 46.2. At M = 64, 53.0; with 128 columns
# and 8 warps 55.1, with a sum for each step, of 256 channels in two stages, 64.0. In today's order, on an H100: 35.0,
# 38.7 and 43.9, and the other sizes slower; since then 34.1 at M = 16 and 41.6 at M = 64.
FOLDED_TILES: Final = (
    (16, FoldedTile(16, 64, 256, 4, 3)),
    (32, FoldedTile(32, 64, 128, 4, 3)),
    (_ANY, FoldedTile(64, 64, 128, 4, 3, SUM_STEPS=False)),
)
"""Per largest number of rows."""

# On an H100, us with a sum for each step and without, quantizing included, at M = 1 and 16: N x K of 4096 x 4096 11.4
# and 9.8, 11.5 and 10.6; 6144 x 4096 13.1 and 12.5, 13.1 and 12.6; 4096 x 14336 23.4 and 22.3, 24.1 and 22.6. For 28672
# x 4096, not shared, 34.9 and 34.7, 35.7 and 35.4: precision costs next to nothing there.
#
# Later, with SEGMENT_START 0, 1 and 3, at M = 1 and 16: 4096 x 4096 9.1, 9.1 and 9.2, 10.1, 10.2 and 10.2; 6144 x 4096
# 11.1, 10.6 and 10.9, 12.3, 11.8 and 11.8; 4096 x 14336 20.9, 20.3 and 21.0, 22.4, 22.2 and 22.3. At M = 64 0 is best,
# and for 28672 x 4096, where it moves a part's end by a step: 34.0 and 34.3, 34.8 and 35.1.
SHARED_FOLDED_TILES: Final = tuple(
    (most, replace(tile, SUM_STEPS=False, SEGMENT_START=int(most == 16))) for most, tile in FOLDED_TILES
)
"""Per largest number of rows, where programs share all tiles: each adds a part of the channels only."""

# On an H100, the same split, us of an earlier product: N x K of 28672 x 4096 at M = 128 72, with 128 columns and 8
# warps 74; at M = 256 98 and 99. Fewer tiles want to be smaller: 4096 x 14336 at M = 128, in four parts, 45, with 64
# rows 39.
WIDE_FOLDED_TILES: Final = (
    (128, FoldedTile(128, 64, 128, 4, 3, SUM_STEPS=False)),
    (_ANY, FoldedTile(256, 64, 128, 4, 3, SUM_STEPS=False)),
)
"""Per largest number of rows, for more than 64 and many columns. A weight is unpacked once for each row of tiles."""

FAMILIES: Final[Mapping[str, Family]] = {
    # tcgen05: at least 128 rows on the left, 4 or 8 warps; anything else falls silently back to bfloat16.
    "sm_100": Family(
        mma="block-scaled MMA",
        mode="scaled",
        widen_fp4=False,
        shared_memory=232_448,
        tiles=(
            (16, (Tile(16, 128, 128, 4, 3, SWAP=True), Tile(16, 128, 256, 4, 3, SWAP=True))),
            (32, (Tile(32, 128, 128, 4, 4, SWAP=True), Tile(32, 128, 256, 4, 3, SWAP=True))),
            (64, (Tile(64, 128, 128, 4, 4, SWAP=True), Tile(64, 128, 256, 4, 3, SWAP=True))),
            (_ANY, (Tile(128, 128, 128, 4, 3), Tile(128, 256, 128, 8, 3))),
        ),
    ),
    # mma.sync with block scales: both operands of one element family, 4 warps spill at 128 by 128.
    "sm_120": Family(
        mma="block-scaled MMA",
        mode="scaled",
        widen_fp4=True,
        shared_memory=101_376,
        tiles=(
            (16, (Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3))),
            (64, (Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 8, 2))),
            (_ANY, (Tile(128, 128, 128, 8, 2), Tile(128, 64, 128, 8, 2))),
        ),
    ),
    # Defaults from a sweep on an H200 (an earlier decode): N x K of 28672 x 4096 and 4096 x 4096, M from 1 to 2048, a
    # 75/20/5 split.
    "sm_90": Family(
        mma="FP8 MMA of folded operands for bfloat16 models, bfloat16 MMA of exactly dequantized ones for others",
        mode="bf16",
        widen_fp4=False,
        shared_memory=232_448,
        tiles=(
            (16, (Tile(16, 64, 64, 4, 4, SWAP=True), Tile(16, 64, 128, 4, 3, SWAP=True))),
            (32, (Tile(32, 64, 128, 4, 3, SWAP=True), Tile(32, 128, 64, 8, 3, SWAP=True))),
            (64, (Tile(64, 128, 64, 8, 3, SWAP=True), Tile(64, 64, 128, 4, 3, SWAP=True))),
            (512, (Tile(128, 128, 64, 8, 3), Tile(256, 128, 64, 8, 3))),
            (_ANY, (Tile(256, 128, 64, 8, 3), Tile(128, 128, 64, 8, 3))),
        ),
        folds=True,
    ),
    # bfloat16 MMA of any GPU that has one.
    "bf16": Family(
        mma="bfloat16 MMA of exactly dequantized operands",
        mode="bf16",
        widen_fp4=False,
        shared_memory=65_536,
        tiles=((16, (Tile(16, 64, 64, 4, 2),)), (_ANY, (Tile(64, 64, 64, 4, 2),))),
    ),
}


def family_of(capability: tuple[int, int] | None) -> str | None:
    """The family of an NVIDIA compute capability, "bf16" for None (another vendor's); None where none serves."""
    if capability is None:
        return "bf16"
    if capability < (8, 0):
        return None
    # Triton 3.6 emulates tl.dot_scaled on 12.1, for it takes block-scaled MMA for 12.0's alone.
    if capability == (12, 1):
        return "bf16"
    return {9: "sm_90", 10: "sm_100", 12: "sm_120"}.get(capability[0], "bf16")

"""Tiles of the mixed matmul, per kind of GPU and number of rows; the first of each list is the default.

With Inductor's max_autotune every tile of a list is a choice; otherwise the first is taken, so that a cold compile
builds one kernel a shape of output.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

from micromix_compile.numerics.layout import activations_are_wide, weights_are_fp4

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.numerics.layout import Split


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


@dataclass(frozen=True, kw_only=True, slots=True)
class MixedTiles:
    """How GPUs of one kind run the mixed matmul.

    name: of the kind. mma: for people. kinds: its matrix instructions as `ptx.mma_kind` names them, where both operands
    are MXFP4, and elsewhere. mode: `MODE` of templates/triton/mixed_mx_mm.py. widen_fp4: MXFP4 weights meet
    MXFP8 activations as MXFP8, because the compiler has no block-scaled MMA of two element families. shared_memory:
    bytes a program may use. tiles: (largest M, tiles), ascending; the last holds for every M.
    """

    name: str
    mma: str
    kinds: tuple[str, str]
    mode: str
    widen_fp4: bool
    shared_memory: int
    tiles: tuple[tuple[int, tuple[Tile, ...]], ...]

    def constants(
        self, tile: Tile, *, fp6: str, split: Split, w_split: Split, has_bias: bool, x_swizzled: bool = False,
        w_swizzled: bool = False,
    ) -> dict[str, bool | int | str]:  # fmt: skip
        """What `mixed_mx_mm_kernel` is compiled with for one of the tiles. Raises ValueError as `weights_are_fp4` does.

        split, w_split: of activations and of weights, of which only the kind is of interest.
        """
        return {
            "FP6": fp6,
            "W_FP4": weights_are_fp4(split, w_split),
            "X_WIDE": activations_are_wide(split, w_split),
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

# tcgen05: at least 128 rows on the left, 4 or 8 warps; anything else falls silently back to bfloat16.
SM_100: Final = MixedTiles(
    name="sm_100",
    mma="block-scaled MMA",
    kinds=("tcgen05.mma mxf4", "tcgen05.mma mxf8f6f4"),
    mode="scaled",
    widen_fp4=False,
    shared_memory=232_448,
    tiles=(
        (16, (Tile(16, 128, 128, 4, 3, SWAP=True), Tile(16, 128, 256, 4, 3, SWAP=True))),
        (32, (Tile(32, 128, 128, 4, 4, SWAP=True), Tile(32, 128, 256, 4, 3, SWAP=True))),
        (64, (Tile(64, 128, 128, 4, 4, SWAP=True), Tile(64, 128, 256, 4, 3, SWAP=True))),
        (_ANY, (Tile(128, 128, 128, 4, 3), Tile(128, 256, 128, 8, 3))),
    ),
)

# mma.sync with block scales: both operands of one element family, 4 warps spill at 128 by 128.
SM_120: Final = MixedTiles(
    name="sm_120",
    mma="block-scaled MMA",
    kinds=("mma.sync mxf4nvf4", "mma.sync mxf8f6f4"),
    mode="scaled",
    widen_fp4=True,
    shared_memory=101_376,
    tiles=(
        (16, (Tile(16, 64, 128, 4, 3), Tile(16, 128, 128, 4, 3))),
        (64, (Tile(64, 64, 128, 4, 3), Tile(64, 128, 128, 8, 2))),
        (_ANY, (Tile(128, 128, 128, 8, 2), Tile(128, 64, 128, 8, 2))),
    ),
)

# Defaults from a sweep on an H200 (an earlier decode): N x K of 28672 x 4096 and 4096 x 4096, M from 1 to 2048, a
# 75/20/5 split.
SM_90: Final = MixedTiles(
    name="sm_90",
    mma="bfloat16 MMA of exactly dequantized operands",
    kinds=("wgmma bf16", "wgmma bf16"),
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
)

# bfloat16 MMA of any GPU that has one.
BF16: Final = MixedTiles(
    name="bf16",
    mma="bfloat16 MMA of exactly dequantized operands",
    kinds=("mma.sync bf16", "mma.sync bf16"),
    mode="bf16",
    widen_fp4=False,
    shared_memory=65_536,
    tiles=((16, (Tile(16, 64, 64, 4, 2),)), (_ANY, (Tile(64, 64, 64, 4, 2),))),
)

MIXED_TILES: Final[Mapping[str, MixedTiles]] = MappingProxyType(
    {tiles.name: tiles for tiles in (SM_100, SM_120, SM_90, BF16)}
)
"""By the name of the kind of GPU."""

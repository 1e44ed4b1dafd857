"""Launches of the products of experts and of their sum, and who has them in Triton. Nothing waits for the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.numerics.grouped import check_grouped_folded_mm, check_grouped_mx_mm, check_weighted_sum
from micromix_compile.numerics.layout import (
    PackedWeight,
    block_counts,
    product_split,
    split_of_activation,
    split_of_weight,
)
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets import gluon_grouped
from micromix_compile.targets.grouped_tiles import most_row_tiles, rows_to_hold
from micromix_compile.targets.kernels import PLAIN_GROUPED, FoldedWeight
from micromix_compile.targets.launch import KernelCall, odd_blocks, unit_column_stride

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from micromix_compile.targets.folded_tiles import FoldedTile
    from micromix_compile.targets.gluon_tiles import GluonTile
    from micromix_compile.targets.grouped_tiles import GroupedTiles
    from micromix_compile.targets.tiles import MixedTiles, Tile


SUM_COLUMNS: Final = 1024
"""Of a program of the sum, at most: 16 bytes of each row a thread."""


@dataclass(frozen=True, slots=True)
class TritonGrouped:
    """The operations of `ops.grouped` in Triton. tiles: of products with block scales. folded: of folded ones, or None.

    Where it is None, nothing folds, and plain PyTorch does what folded products there are.
    """

    tiles: MixedTiles
    folded: GroupedTiles | None = None

    def multiply(
        self, x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, fp6: str,
        out_dtype: torch.dtype, *, tile: Tile | None = None,
    ) -> Tensor:  # fmt: skip
        """See `GroupedKernels`, in one launch. tile: one of the tiles, by default the first for the rows of an expert.

        Values of rows and offs are not checked: rows outside x are undefined, and so is what offs that descend give.
        """
        check_grouped_mx_mm(x, rows, offs, w, bias, fp6)
        experts, columns = w.w4.shape[:2]
        out = x.scale.new_empty((rows.shape[0], columns), dtype=out_dtype)
        call = grouped_mx_mm_call(
            QuantizedActivation(*(part.contiguous() for part in x)), rows.contiguous(), offs.contiguous(),
            PackedWeight(*(part.contiguous() for part in w)), None if bias is None else bias.contiguous(), out,
            fp6=fp6, tiles=self.tiles, tile=tile or self.tiles.tiles_for(rows_to_hold(rows.shape[0], experts))[0],
        )  # fmt: skip
        if out.numel():
            call.launch_on(out)
        return out

    def multiply_folded(
        self, q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w: FoldedWeight, fp6: str,
        out_dtype: torch.dtype, *, tile: FoldedTile | None = None, split: int = 1,
    ) -> Tensor:  # fmt: skip
        """See `GroupedKernels`. tile: with `split`, how many programs share one; else as is best.

        One launch; where experts have many rows two, of which the second is the persistent kernel's, on a GPU. Values
        of rows and offs are not checked: rows outside q are undefined, and so is what offs that descend give.
        """
        if self.folded is None:
            return PLAIN_GROUPED.multiply_folded(q, row_scale, rows, offs, w, fp6, out_dtype)
        check_grouped_folded_mm(q, row_scale, rows, offs, *w)
        q, row_scale, rows, offs = (part.contiguous() for part in (q, row_scale, rows, offs))
        many = self.folded.gluon_tile_for(rows.shape[0], w, out_dtype) if tile is None and q.is_cuda else None
        if many is not None:
            product = self.multiply_many(q, row_scale, rows, offs, w, fp6, many)
            if product is not None:
                return product
        experts, columns = w.row_scale.shape
        out = q.new_empty((rows.shape[0], columns), dtype=out_dtype)
        if tile is None:
            tile, split = self.folded.tile_for(rows.shape[0], experts, columns, q.shape[1])
        tiles = most_row_tiles(rows.shape[0], experts, tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
        shared = tiles if split > 1 else 0
        partial = row_scale.new_empty(shared * split * tile.BLOCK_M * tile.BLOCK_N)
        call = grouped_folded_mm_call(
            q, row_scale, rows, offs, w.contiguous(), out, partial, offs.new_zeros(shared),
            fp6=fp6, tile=tile, split=split,
        )  # fmt: skip
        if out.numel():
            call.launch_on(out)
        return out

    def multiply_many(
        self, q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w: FoldedWeight, fp6: str, tile: GluonTile
    ) -> Tensor | None:
        """The bfloat16 product by the persistent kernel with a tile; None where it does not take the weights' memory.

        All but the weights is contiguous. Which products it can take at all says `GroupedTiles.gluon_tile_for`.
        """
        assert self.folded is not None, "there are folded products"
        programs = self.folded.programs_of(tile, rows.shape[0], *w.row_scale.shape)
        return gluon_grouped.multiply(q, row_scale, rows, offs, w.contiguous(), fp6, tile, programs)

    def weighted_sum(self, rows: Tensor, weights: Tensor, place: Tensor, out_dtype: torch.dtype) -> Tensor:
        """See `GroupedKernels`, in one launch. Values of place are not checked: what is outside rows is undefined."""
        check_weighted_sum(rows, weights, place, out_dtype)
        out = rows.new_empty((place.shape[0], rows.shape[1]), dtype=out_dtype)
        if out.numel():
            weighted_sum_call(unit_column_stride(rows), weights.contiguous(), place.contiguous(), out).launch_on(out)
        return out


def weighted_sum_call(rows: Tensor, weights: Tensor, place: Tensor, out: Tensor) -> KernelCall:
    """The launch that fills out: (T, N). All is contiguous; rows may have a distance from one to the next."""
    from micromix_compile.templates.triton.weighted_sum import weighted_sum_kernel

    columns = rows.shape[1]
    block = min(max(1 << (columns - 1).bit_length(), 128), SUM_COLUMNS)
    return KernelCall(
        kernel=weighted_sum_kernel,
        grid=(place.shape[0], -(-columns // block)),
        args={
            "rows": rows, "weights": weights, "place": place, "out": out, "R": rows.shape[0], "N": columns,
            "row_stride": rows.stride(0),
        },
        constexprs={"TOP_K": place.shape[1], "BLOCK": block},
        num_warps=4,
    )  # fmt: skip


def grouped_folded_mm_call(
    q: Tensor, row_scale: Tensor, rows: Tensor, offs: Tensor, w: FoldedWeight, out: Tensor, partial: Tensor,
    locks: Tensor, *, fp6: str, tile: FoldedTile, split: int,
) -> KernelCall:  # fmt: skip
    """The launch that fills out: (R, N). All is contiguous. partial, locks: float32 sums and zeros, if split is not 1.

    split: programs that share a tile.
    """
    from micromix_compile.templates.triton.grouped_folded_mm import grouped_folded_mm_kernel

    extents, tiles = _extents(offs, out, tile.BLOCK_M, tile.BLOCK_N)
    names = ("w4", "w6", "w8", "w_factor", "w_row_scale", "bias")
    return KernelCall(
        kernel=grouped_folded_mm_kernel,
        grid=(tiles * split,),
        args={
            "x": q,
            "x_row_scale": row_scale,
            "rows": rows,
            "offs": offs,
            **dict(zip(names, w, strict=True)),
            "out": out,
            "partial": partial,
            "locks": locks,
            **extents,
            **odd_blocks(w.split),
            "tiles": tiles,
        },
        constexprs={
            "FP6": fp6,
            "HAS_BIAS": w.bias is not None,
            "BLOCK_E": _block_e(offs),
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "SPLIT_K": split,
            "COPIED": tile.copied_factors,
            "SUM_STEPS": tile.SUM_STEPS,
            "SEGMENT_START": tile.SEGMENT_START,
            "STAGES8": tile.stages8(w.split, 1),
            "LAUNCH_PDL": True,
            "SHORT_X": q.numel() < 1 << 31,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def grouped_mx_mm_call(
    x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, out: Tensor, *, fp6: str,
    tiles: MixedTiles, tile: Tile,
) -> KernelCall:  # fmt: skip
    """The launch that fills out: (R, N). All is contiguous, scales are plain."""
    from micromix_compile.templates.triton.grouped_mx_mm import grouped_mx_mm_kernel

    split, w_split = split_of_activation(*x[:3]), split_of_weight(*w[:3])
    extents, most = _extents(offs, out, tile.BLOCK_M, tile.BLOCK_N)
    constants = tiles.constants(tile, fp6=fp6, split=split, w_split=w_split, has_bias=bias is not None)
    names = ("x4", "x6", "x8", "x_scale", "w4", "w6", "w8", "w_scale")
    return KernelCall(
        kernel=grouped_mx_mm_kernel,
        grid=(most,),
        args={
            **dict(zip(names, (*x, *w), strict=True)),
            "rows": rows,
            "offs": offs,
            "bias": bias,
            "out": out,
            "T": x.scale.shape[0],
            **extents,
            **dict(zip(("blocks4", "blocks6", "blocks8"), block_counts(product_split(split, w_split)), strict=True)),
        },
        constexprs={
            **{name: value for name, value in constants.items() if name not in _NOT_GROUPED},
            "BLOCK_E": _block_e(offs),
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


_NOT_GROUPED = ("X_SWIZZLED", "W_SWIZZLED", "GROUP_M")
"""Constants of the product of one weight: rows are gathered, so scales are plain, and experts are the groups."""


def _extents(offs: Tensor, out: Tensor, block_m: int, block_n: int) -> tuple[dict[str, Any], int]:
    """Arguments that say how much there is, and how many tiles there can be."""
    (rows, columns), experts = out.shape, offs.shape[0]
    column_tiles = -(-columns // block_n)
    extents = {"R": rows, "N": columns, "E": experts, "column_tiles": column_tiles}
    return extents, most_row_tiles(rows, experts, block_m) * column_tiles


def _block_e(offs: Tensor) -> int:
    """The power of two that holds all experts."""
    return 1 << (offs.shape[0] - 1).bit_length()

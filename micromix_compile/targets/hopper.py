"""Launches of the folded kernels (sm_90): reorder-fold and the product with packed weights; who computes with them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from micromix_compile.numerics import checks, producers
from micromix_compile.numerics.folding import LOCKS, FoldedActivation, fold_width
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.targets import gluon
from micromix_compile.targets.expansion import ExpandedWeights, expand_weights, library_mm
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTiles, partial_size, tiles_of
from micromix_compile.targets.groups import group_args, padded
from micromix_compile.targets.kernels import Residual, columns_of
from micromix_compile.targets.launch import FORMATS_DIGEST, KernelCall, odd, odd_blocks, unit_column_stride
from micromix_compile.targets.quantizers import LONG_ROW, quantizer_tile

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.folded_tiles import FoldedTile, Parts
    from micromix_compile.targets.kernels import FoldedWeight
    from micromix_compile.targets.quantizers import QuantizerTile


@dataclass(frozen=True, slots=True)
class TritonFolded:
    """The folded operations in Triton and by the library's FP8 product. tiles: which of both, and how."""

    tiles: FoldedTiles = FOLDED_SM_90

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, w_fp4: bool, residual: Residual | None = None,
        products: Sequence[Sequence[int]] = (), activations: str = "same", rotated: int = 0,
    ) -> FoldedActivation:  # fmt: skip
        """See `FoldedKernels`, in one launch. products: see `FoldedTiles.release_for`."""
        checks.check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding, activations, rotated)
        producers.check_produce(producer, x, other)
        out = FoldedActivation(
            x.new_empty((x.shape[0], fold_width(split, w_fp4=w_fp4)), dtype=torch.uint8),
            x.new_empty(x.shape[0], dtype=torch.float32),
            x.new_empty(LOCKS, dtype=torch.int32),
        )
        if residual is not None:
            residual = Residual(unit_column_stride(residual.addend), residual.total)
        call = reorder_fold_call(
            producer, unit_column_stride(x), None if other is None else unit_column_stride(other), eps,
            channel_perm.contiguous(), split, out, fp6=fp6, scale_rounding=scale_rounding, w_fp4=w_fp4,
            residual=residual, products=products, activations=activations, rotated=rotated, tiles=self.tiles,
        )  # fmt: skip
        if x.shape[0]:
            call.launch_on(x)
        return out

    def multiply(
        self, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, out_dtype: torch.dtype, *,
        expanded: Sequence[Tensor] = (), tile: FoldedTile | None = None, parts: Parts | None = None,
    ) -> list[Tensor]:  # fmt: skip
        """See `FoldedKernels`, for up to `MAX_GROUP` weights with one activation.

        With many rows by way of `expand_weights` and the library, with fewer in one launch that reads the weights
        packed, of the persistent kernel on a GPU if it takes the product, else of `folded_mm_kernel`. tile, parts: of
        that one's, which then takes any number of rows. Raises ValueError for more shared tiles than locks.
        """
        x = FoldedActivation(x.q.contiguous(), x.row_scale.contiguous(), x.locks)
        weights = [weight.contiguous() for weight in weights]
        if expanded and tile is None and self.tiles.uses_library(x.q.shape[0], weights, out_dtype, is_expanded=True):
            return [
                library_mm(x, ExpandedWeights(w.contiguous(), weight.row_scale, weight.bias), out_dtype)
                for w, weight in zip(expanded, weights, strict=True)
            ]
        if tile is None and self.tiles.gluon is not None and x.q.is_cuda:
            products = gluon.multiply(x, weights, fp6, out_dtype, self.tiles.gluon)
            if products is not None:
                return products
        rows, columns, width = x.q.shape[0], columns_of(weights), x.q.shape[1]
        if tile is None and self.tiles.uses_library(rows, weights, out_dtype):
            return self._expand_and_multiply(x, weights, fp6, out_dtype)
        outs = [x.q.new_empty((rows, n), dtype=out_dtype) for n in columns]
        tile = tile or self.tiles.tile_for(rows, columns, width)
        parts = parts or self.tiles.parts_for(rows, columns, width, tile)
        shared = tiles_of(rows, columns, tile) - parts.whole
        if parts.split > 1 and shared > LOCKS:
            raise ValueError(f"{parts} takes a lock for each shared tile, at most {LOCKS}, got {shared} shared tiles")
        partial = x.row_scale.new_empty(partial_size(rows, columns, tile, parts))
        if rows * sum(columns):
            folded_mm_call(x, weights, outs, partial, fp6=fp6, tile=tile, parts=parts).launch_on(x.q)
        return outs

    def multiply_again(
        self, x: FoldedActivation, parts: Sequence[Tensor], fp6: str, out_dtype: torch.dtype, *, has_expanded: bool
    ) -> list[Tensor] | None:
        """See `FoldedKernels`: of the persistent kernel's products, in some microseconds of the host's time."""
        planner = self.tiles.gluon
        if planner is None or (has_expanded and x.q.shape[0] >= self.tiles.library_from(is_expanded=True)):
            return None
        return gluon.multiply_again(x, parts, fp6, out_dtype, planner)

    def expand(self, weight: FoldedWeight, fp6: str) -> Tensor:
        """See `FoldedKernels`, in one launch."""
        room = ExpandedWeights.empty([weight], weight.w4)
        expand_weights([weight.contiguous()], room, fp6=fp6)
        return room.w

    def _expand_and_multiply(
        self, x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, out_dtype: torch.dtype
    ) -> list[Tensor]:
        columns, results = columns_of(weights), []
        for run in self.tiles.expansion_runs(columns, x.q.shape[1]):
            expanded = ExpandedWeights.empty(weights[run], x.q)
            expand_weights(weights[run], expanded, fp6=fp6)
            results += [library_mm(x, one, out_dtype) for one in expanded.split(columns[run])]
        return results


def reorder_fold_call(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split,
    out: FoldedActivation, *, fp6: str, scale_rounding: str, w_fp4: bool, residual: Residual | None = None,
    products: Sequence[Sequence[int]] = (), activations: str = "same", rotated: int = 0, tiles: FoldedTiles,
) -> KernelCall:  # fmt: skip
    """The launch that fills `out`, and the residual's sum; as `quantizers.reorder_quantize_call`.

    products: the columns of each product that reads it, as far as known.
    """
    from micromix_compile.templates.triton.reorder_fold import reorder_fold_kernel

    channels = channel_perm.shape[0]
    tile = quantizer_tile(producer, x, other, channels, folds=True)
    by_blocks = (activations == "fp8" or rotated > 0) and _folds_by_blocks(x, other, channel_perm, tile)
    halves_warps = by_blocks and activations == "fp8" and rotated > 0 and channels > LONG_ROW
    return KernelCall(
        kernel=reorder_fold_kernel,
        grid=(x.shape[0], max(-(-channels // tile.BLOCK_K), 1)),
        args={
            "x_ptr": x,
            "other_ptr": other,
            "residual_ptr": None if residual is None else residual.addend,
            "total_ptr": None if residual is None else residual.total,
            "channel_perm_ptr": channel_perm,
            "q_ptr": out.q,
            "row_scale_ptr": out.row_scale,
            "locks_ptr": out.locks,
            "C": x.shape[1],
            "stride_x": x.stride(0),
            "stride_other": other.stride(0) if producer == "silu_mul" and other is not None else 0,
            "stride_residual": 0 if residual is None else residual.addend.stride(0),
            **odd_blocks(split),
            "odd_rotated": odd(rotated // BLOCK_SIZE) if rotated else None,
        },
        constexprs={
            "PRODUCER": producer,
            "ADDS": residual is not None,
            "EPS": eps,
            "FP6": fp6,
            "SCALE_ROUNDING": str(scale_rounding),
            "ACTIVATIONS": activations,
            "BY_BLOCKS": by_blocks,
            "PERMUTES": channels == x.shape[1],
            "W_FP4": w_fp4,
            "FORMATS": FORMATS_DIGEST,
            "BLOCK_C": tile.BLOCK_C,
            "ROW_CHUNKS": tile.ROW_CHUNKS,
            "HAS_ROOM": tile.HAS_ROOM,
            "BLOCK_K": tile.BLOCK_K,
            "WHOLE_ROW": channels <= tile.BLOCK_K,
            "LOCKS": LOCKS,
            "LAUNCH_PDL": True,
            "RELEASE": tiles.release_for(x.shape[0], fold_width(split, w_fp4=w_fp4), products),
        },
        num_warps=tile.num_warps // 2 if halves_warps else tile.num_warps,
    )


def _folds_by_blocks(x: Tensor, other: Tensor | None, channel_perm: Tensor, tile: QuantizerTile) -> bool:
    """Whether rows with one scale take the way of `templates.triton.fold_blocks`: a thread has whole blocks.

    Rotation takes registers for a whole block, but long rows need few threads then: us of 8192 rows of 14336 channels
    of prototypes on an H200 with 128 and 64 channels a thread 132 and 144, without rotation 147 and 124.
    """
    are_pairs = all(part.dtype == torch.bfloat16 for part in (x, other) if part is not None)
    are_whole = BLOCK_SIZE * 32 * tile.num_warps <= tile.BLOCK_K
    return are_pairs and are_whole and channel_perm.dtype == torch.int16


def folded_mm_call(
    x: FoldedActivation, weights: Sequence[FoldedWeight], outs: Sequence[Tensor], partial: Tensor, *, fp6: str,
    tile: FoldedTile, parts: Parts,
) -> KernelCall:  # fmt: skip
    """The launch that fills `outs`. partial: float32 of `partial_size`, any if that is 0. Values are not read here."""
    from micromix_compile.templates.triton.folded_mm import folded_mm_kernel

    tiles = tiles_of(x.q.shape[0], columns_of(weights), tile)
    column_tiles = tiles_of(1, columns_of(weights), tile)
    return KernelCall(
        kernel=folded_mm_kernel,
        grid=(parts.whole + (tiles - parts.whole) * parts.split,),
        args={
            "x": x.q,
            "x_row_scale": x.row_scale,
            **group_args(weights, tile.BLOCK_N),
            **{f"out_{i}": out for i, out in enumerate(padded(outs))},
            "partial": partial,
            "locks": x.locks,
            "M": x.q.shape[0],
            "column_tiles": column_tiles,
            "whole": parts.whole,
            "shared": max(tiles - parts.whole, 1),
        },
        constexprs={
            "FP6": fp6,
            "GROUPS": len(weights),
            "HAS_BIAS": weights[0].bias is not None,
            "BLOCK_M": tile.BLOCK_M,
            "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K,
            "SPLIT_K": parts.split,
            "COPIED": tile.copied_factors,
            "SUM_STEPS": tile.SUM_STEPS,
            "SEGMENT_START": tile.SEGMENT_START,
            "STAGES8": tile.stages8(weights[0].split, len(weights)),
            "LAUNCH_PDL": True,
            "RELEASES": tile.releases,
        },
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )

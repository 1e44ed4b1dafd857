"""Launches of the mixed matmul, and who computes the exact operations with Triton."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from micromix_compile.numerics import checks
from micromix_compile.numerics.layout import (
    PackedWeight,
    activations_are_wide,
    block_counts,
    product_split,
    split_of_activation,
    split_of_weight,
)
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.launch import KernelCall
from micromix_compile.targets.quantizers import reorder_quantize

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.tiles import MixedTiles, Tile


@dataclass(frozen=True, slots=True)
class TritonExact:
    """The exact operations in Triton. tiles: of the mixed matmul."""

    tiles: MixedTiles

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, activations: str = "same", rotated: int = 0,
    ) -> QuantizedActivation:  # fmt: skip
        """See `ExactKernels`."""
        return reorder_quantize(
            producer, x, other, eps, channel_perm, split, fp6, scale_rounding, activations=activations, rotated=rotated
        )

    def multiply(
        self, x: QuantizedActivation, w: PackedWeight, bias: Tensor | None, fp6: str, out_dtype: torch.dtype, *,
        tile: Tile | None = None,
    ) -> Tensor:  # fmt: skip
        """See `ExactKernels`, in one launch. Scales are plain, or as `packing.swizzle_scale` returns them.

        tile: one of the tiles, by default the first for M. Raises ValueError as `mixed_mx_mm_call` does.
        """
        rows, columns = x.q4.shape[0], w.w4.shape[0]
        blocks = sum(block_counts(split_of_activation(*x[:3])))
        scales = _plain(x.scale, rows, blocks), _plain(w.w_scale, columns, blocks)
        checks.check_mixed_mx_mm(*x[:3], scales[0], *w[:3], scales[1], bias, fp6)
        out = x.q4.new_empty((rows, columns), dtype=out_dtype)
        call = mixed_mx_mm_call(
            QuantizedActivation(*(part.contiguous() for part in x)),
            PackedWeight(*(part.contiguous() for part in w)),
            None if bias is None else bias.contiguous(),
            out,
            fp6=fp6,
            tiles=self.tiles,
            tile=tile or self.tiles.tiles_for(rows)[0],
        )
        if out.numel():
            call.launch_on(out)
        return out


def mixed_mx_mm_call(
    x: QuantizedActivation,
    w: PackedWeight,
    bias: Tensor | None,
    out: Tensor,
    *,
    fp6: str,
    tiles: MixedTiles,
    tile: Tile,
) -> KernelCall:
    """The launch that fills out: (M, N). All is contiguous.

    Raises ValueError as `weights_are_fp4` does, and for swizzled scales of activations that have no segments.
    """
    from micromix_compile.templates.triton.mixed_mx_mm import mixed_mx_mm_kernel

    (rows, columns), split, w_split = out.shape, split_of_activation(*x[:3]), split_of_weight(*w[:3])
    if _is_swizzled(x.scale) and activations_are_wide(split, w_split):
        raise ValueError(f"x_scale must not be swizzled where x is all E4M3 and weights are split {w_split}")
    names = ("x4", "x6", "x8", "x_scale", "w4", "w6", "w8", "w_scale")
    return KernelCall(
        kernel=mixed_mx_mm_kernel,
        grid=(-(-rows // tile.BLOCK_M) * -(-columns // tile.BLOCK_N),),
        args={
            **dict(zip(names, (*x, *w), strict=True)),
            "bias": bias,
            "out": out,
            "M": rows,
            "N": columns,
            **dict(zip(("blocks4", "blocks6", "blocks8"), block_counts(product_split(split, w_split)), strict=True)),
        },
        constexprs=tiles.constants(
            tile,
            fp6=fp6,
            split=split,
            w_split=w_split,
            has_bias=bias is not None,
            x_swizzled=_is_swizzled(x.scale),
            w_swizzled=_is_swizzled(w.w_scale),
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def _is_swizzled(scale: Tensor) -> bool:
    return scale.dim() == 3


def _plain(scale: Tensor, rows: int, blocks: int) -> Tensor:
    """Scales for a check that reads shapes; of swizzled ones a stand-in without memory."""
    return scale.new_empty(rows, blocks, device="meta") if _is_swizzled(scale) else scale

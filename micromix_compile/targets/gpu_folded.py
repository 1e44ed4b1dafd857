"""Launches of the folded kernels (sm_90): reorder-fold, the product with packed weights, and weights expanded once.

Like `gpu`: a launch is a `gpu.KernelCall`, which needs only shapes; functions named as ops allocate and launch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.operators import scaled_mm
from micromix_compile.numerics import reference
from micromix_compile.numerics.folding import LOCKS, FoldedActivation, fold_width
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.targets import gpu
from micromix_compile.targets.tiles import (
    FEW_ROWS,
    FOLDED_TILES,
    SHARED_FOLDED_TILES,
    WIDE_FOLDED_TILES,
    FoldedTile,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.layout import Split

_T = TypeVar("_T")

MAX_GROUP: Final = 3
"""Weights that one product takes."""

EXPAND_FROM: Final = 257
"""Rows from which on a weight is expanded in memory for the library's FP8 product. On an H100 at 256 rows, us packed
and expanded (expanding and the library in sum), N x K: 86 and 134 for 28672 x 4096, 55 and 76 for 4096 x 14336. Beyond,
a second row of tiles would unpack all again. Not a bound of the kernel, which takes any M."""

MAX_EXPANDED: Final = 64 * 2**20
"""Bytes up to which weights that read one activation are expanded together, for one product of all. A wider group takes
more memory than all else in a layer, and gains little: 28672 x 4096 as one and as two, us at M = 1024, 2048 and 8192 on
an H100: 247 and 248, 417 and 424, 1407 and 1432."""

PROCESSORS: Final = 132
"""Of the GPUs that the figures here come from."""

PROGRAMS: Final = 3
"""Of the small tiles, that are counted on to run on a processor at a time."""

WIDE_PROGRAMS: Final = 2
"""The same of the wide tiles."""

LONG: Final = 8192
"""Bytes of a folded row from which on there may be `MAX_LONG_SPLIT` parts, and few of the widest tiles pay, in parts,
which take as long to add up for any number of them. At 256 rows, an earlier product, us with that tile and without: 57
and 76 for 4096 x 14336, but 28 and 23 for 4096 x 4096."""

# Of an earlier product. At M = 16, us with all tiles in 2, 4, 6 and 8 parts: 10.3, 9.0, 9.8 and 14.0 for N x K of 4096
# x 4096, 12.8, 11.5, 14.7 and 15.6 for 6144 x 4096, 23.1, 18.3, 17.1 and 21.5 for 4096 x 14336, on an H200. On an H100
# at M = 64 in 2, 3 and 4: 13.4, 12.4 and 11.6, then 16.1, 16.2 and 14.5, then 37.9, 31.6 and 28.5; in 6 12.1, 18.5 and
# 26.2.
MAX_SPLIT: Final = 4
"""Parts of a shared tile."""

MAX_LONG_SPLIT: Final = 6
"""The same of `LONG` channels and more."""


class Parts(NamedTuple):
    """How tiles are shared out: `whole` of them to a program each, each of the others to `split` programs."""

    whole: int
    split: int


class FoldedWeight(NamedTuple):
    """A packed weight with its factors and row scales (see `folding`), and the bias or None."""

    w4: Tensor
    w6: Tensor
    w8: Tensor
    factor: Tensor
    row_scale: Tensor
    bias: Tensor | None = None

    @property
    def split(self) -> Split:
        """(k4, k6, k8) of the weight."""
        return 2 * self.w4.shape[1], 4 * self.w6.shape[2], self.w8.shape[1]


class ExpandedWeights(NamedTuple):
    """Weights below each other. w: (N, `folding.fold_width`) uint8. row_scale: (N,) float32. bias: (N,) or None."""

    w: Tensor
    row_scale: Tensor
    bias: Tensor | None

    @classmethod
    def empty(cls, weights: Sequence[FoldedWeight], like: Tensor) -> ExpandedWeights:
        """Room for `weights`. like: a tensor of the device."""
        n, bias = sum(columns_of(weights)), weights[0].bias
        return cls(
            like.new_empty((n, fold_width(weights[0].split, w_fp4=False)), dtype=torch.uint8),
            like.new_empty(n, dtype=torch.float32),
            None if bias is None else like.new_empty(n, dtype=bias.dtype),
        )

    def split(self, columns: Sequence[int]) -> list[ExpandedWeights]:
        """Each for itself, in the same memory."""
        biases = [None] * len(columns) if self.bias is None else self.bias.split(list(columns))
        parts = zip(self.w.split(list(columns)), self.row_scale.split(list(columns)), biases, strict=True)
        return [ExpandedWeights(*part) for part in parts]


class Residual(NamedTuple):
    """What is added to x in front of an RMSNorm, and where the sum goes: both (M, C) of x's dtype.

    addend: columns side by side. total: contiguous.
    """

    addend: Tensor
    total: Tensor


def reorder_fold(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
    scale_rounding: str, *, w_fp4: bool, residual: Residual | None = None, products: Sequence[Sequence[int]] = (),
) -> FoldedActivation:  # fmt: skip
    """`folding.fold_activation` of what `gpu` quantizes with the same producer, in one launch. x: (M, C).

    products: see `release_for`.
    """
    reference.check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding)
    out = FoldedActivation(
        x.new_empty((x.shape[0], fold_width(split, w_fp4=w_fp4)), dtype=torch.uint8),
        x.new_empty(x.shape[0], dtype=torch.float32),
        x.new_empty(LOCKS, dtype=torch.int32),
    )
    call = reorder_fold_call(
        producer, gpu.unit_column_stride(x), None if other is None else gpu.unit_column_stride(other), eps,
        channel_perm.contiguous(), split, out, fp6=fp6, scale_rounding=scale_rounding, w_fp4=w_fp4, residual=residual,
        products=products,
    )  # fmt: skip
    if x.shape[0]:
        with gpu.current_device(x):
            call.launch()
    return out


def reorder_fold_call(
    producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split,
    out: FoldedActivation, *, fp6: str, scale_rounding: str, w_fp4: bool, residual: Residual | None = None,
    products: Sequence[Sequence[int]] = (),
) -> gpu.KernelCall:  # fmt: skip
    """The launch that fills `out`, and the residual's sum; as `gpu.reorder_quantize_call`."""
    from micromix_compile.templates.triton.reorder_fold import reorder_fold_kernel

    channels = channel_perm.shape[0]
    tile = gpu.quantizer_tile(producer, x, other, channels, folds=True)
    return gpu.KernelCall(
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
            **_odd_blocks(split),
        },
        constexprs={
            "PRODUCER": producer,
            "ADDS": residual is not None,
            "EPS": eps,
            "FP6": fp6,
            "SCALE_ROUNDING": str(scale_rounding),
            "W_FP4": w_fp4,
            "FORMATS": gpu.FORMATS_DIGEST,
            "BLOCK_C": tile.BLOCK_C,
            "ROW_CHUNKS": tile.ROW_CHUNKS,
            "HAS_ROOM": tile.HAS_ROOM,
            "BLOCK_K": tile.BLOCK_K,
            "WHOLE_ROW": channels <= tile.BLOCK_K,
            "LOCKS": LOCKS,
            "LAUNCH_PDL": True,
            "RELEASE": release_for(x.shape[0], fold_width(split, w_fp4=w_fp4), products),
        },
        num_warps=tile.num_warps,
    )


def folded_mm(
    x: FoldedActivation, weights: Sequence[FoldedWeight], *, fp6: str, out_dtype: torch.dtype,
    tile: FoldedTile | None = None, parts: Parts | None = None,
) -> list[Tensor]:  # fmt: skip
    """`folding.folded_mm` for up to `MAX_GROUP` weights with one activation: (M, N) of each.

    With many rows by way of `expand_weights` and the library, with few in one launch that reads the weights packed.
    tile, parts: of that launch, which then takes any number of rows. Raises ValueError for more shared tiles than
    locks.
    """
    rows, columns = x.q.shape[0], columns_of(weights)
    if tile is None and uses_library(rows, weights, out_dtype):
        results = []
        for run in expansion_runs(columns, x.q.shape[1]):
            expanded = ExpandedWeights.empty(weights[run], x.q)
            expand_weights(weights[run], expanded, fp6=fp6)
            results += [library_mm(x, one, out_dtype) for one in expanded.split(columns[run])]
        return results
    outs = [x.q.new_empty((rows, n), dtype=out_dtype) for n in columns]
    tile = tile or tile_for(rows, columns, x.q.shape[1])
    parts = parts or parts_for(rows, columns, x.q.shape[1], tile)
    shared = tiles_of(rows, columns, tile) - parts.whole
    if parts.split > 1 and shared > LOCKS:
        raise ValueError(f"{parts} takes a lock for each shared tile, at most {LOCKS}, got {shared} shared tiles")
    partial = x.row_scale.new_empty(partial_size(rows, columns, tile, parts))
    if rows * sum(columns):
        call = folded_mm_call(x, weights, outs, partial, fp6=fp6, tile=tile, parts=parts)
        with gpu.current_device(x.q):
            call.launch()
    return outs


def folded_mm_call(
    x: FoldedActivation, weights: Sequence[FoldedWeight], outs: Sequence[Tensor], partial: Tensor, *, fp6: str,
    tile: FoldedTile, parts: Parts,
) -> gpu.KernelCall:  # fmt: skip
    """The launch that fills `outs`. partial: float32 of `partial_size`, any if that is 0. Values are not read here."""
    from micromix_compile.templates.triton.folded_mm import folded_mm_kernel

    tiles = tiles_of(x.q.shape[0], columns_of(weights), tile)
    column_tiles = tiles_of(1, columns_of(weights), tile)
    return gpu.KernelCall(
        kernel=folded_mm_kernel,
        grid=(parts.whole + (tiles - parts.whole) * parts.split,),
        args={
            "x": x.q,
            "x_row_scale": x.row_scale,
            **_group_args(weights, tile.BLOCK_N),
            **{f"out_{i}": out for i, out in enumerate(_padded(outs))},
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


def tile_for(rows: int, columns: Sequence[int], channels: int) -> FoldedTile:
    """The tile for M = rows and all columns together: a wide one if that still is work for all processors.

    Where all are shared they have another form, see `SHARED_FOLDED_TILES`.
    """
    if rows > FOLDED_TILES[-1][1].BLOCK_M:
        tile = next(tile for most, tile in WIDE_FOLDED_TILES if rows <= most)
        fills = sum(columns) >= tile.BLOCK_N * WIDE_PROGRAMS * PROCESSORS
        if fills or (rows > WIDE_FOLDED_TILES[0][0] and channels >= LONG):
            return tile
    tile = next(tile for most, tile in FOLDED_TILES if rows <= most)
    parts = parts_for(rows, columns, channels, tile)
    if parts.split > 1 and not parts.whole:
        return next(tile for most, tile in SHARED_FOLDED_TILES if rows <= most)
    return tile


# On an H100, a 75/20/5 split, us of quantizer and product, by `RELEASE` "end", "stores", "start"; behind products that
# have `RELEASES`, but for "end" of M = 1 and 4. M = 1: N x K of 4096 x 4096 9.8, 10.0, 9.3, of 6144 x 4096 12.5, 12.0,
# 11.1, of 4096 x 14336 22.3, 21.5, 23.0, of 28672 x 4096 34.7, 34.2 and, an earlier product, 36.5. M = 4, "end" and
# "stores": 10.5, 9.9, then 12.6, 12.1, then 22.3, 21.5, then 35.0, 34.5. M = 16: 10.2, 10.2, then 12.3, 12.2, then
# 23.1, 23.4, then 35.2, 35.2. M = 64, "end" and "start": 13.6, 13.2, then 15.8, 15.0, then 29.6, 30.0, then 42.9, 45.3.
def release_for(rows: Any, channels: int, products: Sequence[Sequence[int]] = ()) -> str:
    """`RELEASE` of a quantizer, see `templates.reorder_fold`, of M = rows, which may be symbolic.

    channels: bytes of a folded row. products: the columns of each product that reads it, as far as known.

    A product that starts at the start finds processors taken by the quantizer, and its programs crowd on the others. So
    it does only where the quantizer takes few, or where no more programs fit a processor than it gets in any case:
    three of 64 rows, by the registers of tiles in `MAX_SPLIT` parts.
    """
    some, most = FOLDED_TILES[-2][0], FOLDED_TILES[-1][1].BLOCK_M
    if not isinstance(rows, int) or not 0 < rows <= most:
        return "end"
    if products and channels < LONG and (rows == 1 or rows > some):
        parts = [parts_for(rows, n, channels, tile_for(rows, n, channels)) for n in products]
        if all(whole == 0 and (rows == 1 or split >= MAX_SPLIT) for whole, split in parts):
            return "start"
    return "stores" if rows <= FEW_ROWS else "end"


def tiles_of(rows: int, columns: Sequence[int], tile: FoldedTile) -> int:
    """Tiles of all outputs."""
    return sum(-(-n // tile.BLOCK_N) for n in columns) * -(-rows // tile.BLOCK_M)


def parts_for(rows: int, columns: Sequence[int], channels: int, tile: FoldedTile) -> Parts:
    """Few tiles are all shared, for as many programs as run at a time; of many, those that fill no round of processors.

    Three programs of the small tiles run on a processor at a time, or more, two of the wide, which many tiles leave
    whole: at M = 256 and N x K of 28672 x 4096 that took 98 us, with 52 of 448 in two parts 105. At M = 16 and N x K of
    28672 x 4096, 448 tiles, all whole took 37.3 us, 396 whole and the others in two parts 34.9 (an earlier product, an
    H100).
    """
    tiles = tiles_of(rows, columns, tile)
    is_wide = any(tile == wide for _, wide in WIDE_FOLDED_TILES)
    programs = (WIDE_PROGRAMS if is_wide else PROGRAMS) * PROCESSORS
    whole, split = tiles // PROCESSORS * PROCESSORS, 2
    if tiles <= programs:
        most = MAX_LONG_SPLIT if channels >= LONG else MAX_SPLIT
        whole, split = 0, min(programs // max(tiles, 1), channels // (2 * tile.BLOCK_K), most)
    elif is_wide:
        whole = tiles
    return Parts(whole, split) if whole < tiles and 1 < split <= channels // tile.BLOCK_K else Parts(tiles, 1)


def partial_size(rows: int, columns: Sequence[int], tile: FoldedTile, parts: Parts) -> int:
    """Sums that the programs of shared tiles leave for each other."""
    if parts.split == 1:
        return 0
    return (tiles_of(rows, columns, tile) - parts.whole) * parts.split * tile.BLOCK_M * tile.BLOCK_N


def uses_library(rows: int, weights: Sequence[FoldedWeight], out_dtype: torch.dtype) -> bool:
    """Whether a product goes through expanded weights; the library wants bfloat16 and whole groups of 16 columns."""
    is_narrow = all(weight.bias is None or weight.bias.dtype == torch.bfloat16 for weight in weights)
    fits = all(n % 16 == 0 for n in columns_of(weights))
    return rows >= EXPAND_FROM and out_dtype == torch.bfloat16 and is_narrow and fits


def expansion_runs(columns: Sequence[int], width: int) -> list[slice]:
    """Which weights are expanded together, from left to right. width: bytes of an expanded row."""
    runs: list[slice] = []
    for i, n in enumerate(columns):
        start = runs[-1].start if runs else i
        if runs and (sum(columns[start:i]) + n) * width <= MAX_EXPANDED:
            runs[-1] = slice(start, i + 1)
        else:
            runs.append(slice(i, i + 1))
    return runs


def expand_weights(weights: Sequence[FoldedWeight], out: ExpandedWeights, *, fp6: str) -> None:
    """Fill `out` with `folding.fold_weight` of each weight, with its scales and biases, in one launch."""
    if len(out.w):
        with gpu.current_device(out.w):
            expand_call(weights, out, fp6=fp6).launch()


def expand_call(
    weights: Sequence[FoldedWeight], out: ExpandedWeights, *, fp6: str, block_n: int = 4, step: int = 32,
    num_warps: int = 2,
) -> gpu.KernelCall:  # fmt: skip
    """The launch of `expand_weights`: `step` blocks of `block_n` rows a program."""
    from micromix_compile.templates.triton.expand_weights import expand_weights_kernel

    tiles = sum(-(-n // block_n) for n in columns_of(weights))
    steps = sum(-(-k // (BLOCK_SIZE * step)) for k in weights[0].split)
    return gpu.KernelCall(
        kernel=expand_weights_kernel,
        grid=(tiles, max(steps, 1)),
        args={**_group_args(weights, block_n), "out": out.w, "row_scale": out.row_scale, "bias": out.bias},
        constexprs={
            "FP6": fp6,
            "GROUPS": len(weights),
            "HAS_BIAS": weights[0].bias is not None,
            "BLOCK_N": block_n,
            "STEP": step,
            "LAUNCH_PDL": True,
        },
        num_warps=num_warps,
    )


def library_mm(x: FoldedActivation, w: ExpandedWeights, out_dtype: torch.dtype) -> Tensor:
    """The library's FP8 product with expanded weights: (M, N)."""
    e4m3 = torch.float8_e4m3fn
    out = scaled_mm(
        x.q.view(e4m3), w.w.view(e4m3).T, scale_a=x.row_scale[:, None], scale_b=w.row_scale[None], bias=w.bias,
        out_dtype=out_dtype, use_fast_accum=True,
    )  # fmt: skip
    assert isinstance(out, Tensor), "one product has one result"
    return out


def columns_of(weights: Sequence[FoldedWeight]) -> list[int]:
    """N of each."""
    return [weight.row_scale.shape[0] for weight in weights]


def _group_args(weights: Sequence[FoldedWeight], block_n: int) -> dict[str, Any]:
    """A kernel's arguments that say which weights there are, in tiles of block_n rows."""
    fields = ("w4", "w6", "w8", "w_factor", "w_row_scale", "bias")
    args: dict[str, Any] = {
        f"{name}_{i}": tensor
        for i, weight in enumerate(_padded(weights))
        for name, tensor in zip(fields, weight, strict=True)
    }
    columns = columns_of(weights)
    args |= {f"N{i}": columns[i] if i < len(columns) else 0 for i in range(MAX_GROUP)}
    tiles = [-(-n // block_n) for n in columns]
    return args | {**_odd_blocks(weights[0].split), "tiles0": tiles[0], "tiles1": sum(tiles[:2])}


def _padded(group: Sequence[_T]) -> list[_T]:
    """As many as kernels take; what is beyond the group is never touched."""
    return [*group, *[group[0]] * (MAX_GROUP - len(group))]


def _odd_blocks(split: Split) -> dict[str, int]:
    """Blocks of each segment as numbers that no compiler specializes a kernel on."""
    return {name: 2 * (k // BLOCK_SIZE) + 3 for name, k in zip(("odd4", "odd6", "odd8"), split, strict=True)}

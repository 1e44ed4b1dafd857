"""Launches of the Triton kernels: from shapes and dtypes to grid, arguments and tile sizes.

`KernelCall` is a launch as data; what builds one needs only shapes, of which M may be symbolic. The functions named
as ops allocate, launch on the current stream of x's device, and return. Triton is imported at the first call.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from micromix_compile.numerics import reference
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS
from micromix_compile.numerics.reference import QuantizedActivation

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.tiles import Family, Tile

FORMATS_DIGEST = hashlib.sha256(repr(ELEM_FORMATS).encode()).hexdigest()

# On an H100, us of rows of 28672 as wholes, in parts of 16384, and of 8192, earlier kernels: `reorder_fold` 505, 780
# and 870 for 8192 of them (1137 where shared memory takes half a row only), 74, 107 and 115 for 1024;
# `reorder_quantize` 596, 887 and 885 (1169), 85, 119 and 117, but its wholes spill registers, so it takes parts. 32
# channels a thread beat 16 by a tenth at 8192 x 4096 and 4096 x 14336, on an H200. Beyond `LONG_ROW` channels a thread
# of `reorder_fold` has twice as many: of 8192 rows of 14336 on an H100, us so and with 32, 162 and 175, behind SiLU
# times up 235 and 274.
#
# Few rows are shared out among more processors, and a thread of up to 16 warps has half the channels, for then latency
# counts; parts of fewer than `LEAST_PART` channels were slower for 16 and 64 rows of 4096. `reorder_fold` of an earlier
# version on an H100 of 1, 16 and 64 rows, us so and as wholes of 32 channels a thread: 4096 channels 2.2, 2.4, 2.8 and
# 2.7, 3.0, 3.1, behind RMSNorm 2.8, 3.2, 3.3 and 4.0, 4.1, 4.3; 14336 channels 2.9, 3.4, 4.5 and 5.0, 5.2, 5.3, behind
# SiLU times up 5.2, 5.4, 6.3 and 6.3, 6.4, 6.5. Of 256 rows parts are slower.
MAX_ROW_BYTES = 65536
MAX_BLOCK_K = 16384
MAX_FOLDED_BLOCK_K = 32768
PART_BLOCK_K = 8192
LEAST_PART = 1024
FEW_ROWS = 128
CHANNELS_PER_THREAD = 32
LONG_ROW = 8192


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCall:
    """One launch of a Triton kernel.

    kernel: the `triton.jit` function. grid: one to three extents; the quantizers' first is M, which may be symbolic.
    args: run-time arguments by name, tensors and integers. constexprs: compile-time arguments by name. num_stages: 0
    for the compiler's choice.
    """

    kernel: Any
    grid: tuple[Any, ...]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 0

    @property
    def launch_pdl(self) -> bool:
        """Whether the kernel may start while the one before it runs, see `templates.ahead`."""
        return bool(self.constexprs.get("LAUNCH_PDL", False))

    def launch(self) -> None:
        """Run on the current stream of the current device."""
        import triton

        options = {"num_warps": self.num_warps} | ({"num_stages": self.num_stages} if self.num_stages else {})
        if self.launch_pdl and not triton.knobs.runtime.interpret:  # the interpreter has no such option
            options["launch_pdl"] = True
        self.kernel[self.grid](**self.args, **self.constexprs, **options)


def reorder_quantize(
    x: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str
) -> QuantizedActivation:
    """`reference.reorder_quantize` in one launch: the same bytes. x: (M, C).

    The same errors, too, but for an entry of channel_perm outside [-1, C), which reads as zero here.
    """
    return _quantize("none", x, None, 0.0, channel_perm, (k4, k6, k8), fp6, scale_rounding)


def rms_norm_reorder_quantize(
    x: Tensor,
    weight: Tensor,
    eps: float,
    channel_perm: Tensor,
    k4: int,
    k6: int,
    k8: int,
    fp6: str,
    scale_rounding: str,
) -> QuantizedActivation:
    """`reorder_quantize` of `ops.rms_norm(x, weight, eps)` in one launch, but for the last bits of the row's mean.

    x: (M, C). weight: (C,) float32, bfloat16 or float16. Raises TypeError or ValueError for another weight.
    """
    reference.check_norm_weight(x, weight)
    return _quantize("rms_norm", x, weight, eps, channel_perm, (k4, k6, k8), fp6, scale_rounding)


def silu_mul_reorder_quantize(
    gate: Tensor, up: Tensor, channel_perm: Tensor, k4: int, k6: int, k8: int, fp6: str, scale_rounding: str
) -> QuantizedActivation:
    """`reorder_quantize` of `silu(gate) * up` in one launch, rounded to the dtype after each of the two steps.

    gate, up: (M, C) of one dtype. Raises TypeError or ValueError otherwise. The exponential is the device's own, good
    to a few units in the last place of float32.
    """
    reference.check_gate_and_up(gate, up)
    return _quantize("silu_mul", gate, up, 0.0, channel_perm, (k4, k6, k8), fp6, scale_rounding)


def reorder_quantize_call(
    producer: str,
    x: Tensor,
    other: Tensor | None,
    eps: float,
    channel_perm: Tensor,
    outputs: QuantizedActivation,
    *,
    fp6: str,
    scale_rounding: str,
) -> KernelCall:
    """The launch that fills `outputs` from x: (M, C), with unit column stride, as `other`.

    producer: "none" (other unused), "rms_norm" (other is the weight) or "silu_mul" (x is the gate, other is up).
    Only shapes, strides and dtypes are read here; M may be symbolic.
    """
    from micromix_compile.templates.triton.reorder_quantize import reorder_quantize_kernel

    q4, q6, q8, scale = outputs
    tile = quantizer_tile(producer, x, other, channel_perm.shape[0])
    return KernelCall(
        kernel=reorder_quantize_kernel,
        grid=(x.shape[0], -(-channel_perm.shape[0] // tile.BLOCK_K)),
        args={
            "x_ptr": x,
            "other_ptr": other,
            "channel_perm_ptr": channel_perm,
            "q4_ptr": q4,
            "q6_ptr": q6,
            "q8_ptr": q8,
            "scale_ptr": scale,
            "C": x.shape[1],
            "stride_x": x.stride(0),
            "stride_other": other.stride(0) if producer == "silu_mul" and other is not None else 0,
            "odd4": 2 * (q4.shape[1] * 2 // BLOCK_SIZE) + 3,
            "odd6": 2 * (q6.shape[1] // BLOCK_SIZE) + 3,
            "odd8": 2 * (q8.shape[1] // BLOCK_SIZE) + 3,
        },
        constexprs={
            "PRODUCER": producer,
            "EPS": eps,
            "FP6": fp6,
            "SCALE_ROUNDING": str(scale_rounding),
            "FORMATS": FORMATS_DIGEST,
            "BLOCK_C": tile.BLOCK_C,
            "ROW_CHUNKS": tile.ROW_CHUNKS,
            "HAS_ROOM": tile.HAS_ROOM,
            "BLOCK_K": tile.BLOCK_K,
        },
        num_warps=tile.num_warps,
    )


class QuantizerTile(NamedTuple):
    """Channels that a quantizer's program reads at a time, how many such chunks make a row, channels that it writes.

    HAS_ROOM: a row is one chunk that ends with a zero, which indices outside can point to. Not behind an RMSNorm, which
    makes NaN of zeros where a row has one.
    """

    BLOCK_C: int
    ROW_CHUNKS: int
    HAS_ROOM: bool
    BLOCK_K: int
    num_warps: int


def quantizer_tile(
    producer: str, x: Tensor, other: Tensor | None, out_channels: int, *, folds: bool = False
) -> QuantizerTile:
    """The tile for rows of x: (M, C) and K output channels; folds: of `reorder_fold`. A symbolic M counts as many."""
    rows, channels = x.shape
    itemsize = max(tensor.element_size() for tensor in (x, other) if tensor is not None)
    fits = channels * itemsize <= MAX_ROW_BYTES
    block_c = _power_of_two(channels, MAX_ROW_BYTES // itemsize // (1 if fits else 2))
    largest = MAX_FOLDED_BLOCK_K if folds else MAX_BLOCK_K
    # Chunks need registers for what was gathered from earlier ones.
    block_k = _power_of_two(out_channels, largest if fits else PART_BLOCK_K)
    is_few = isinstance(rows, int) and 0 < rows <= FEW_ROWS
    if is_few:
        block_k = min(block_k, max(_power_of_two(-(-out_channels // (FEW_ROWS // rows)), largest), LEAST_PART))
    per_thread = CHANNELS_PER_THREAD * (2 if folds and channels > LONG_ROW else 1) // (2 if is_few else 1)
    has_room = channels < block_c and producer != "rms_norm"
    num_warps = min(max(max(block_c, block_k) // (32 * per_thread), 4), 16)
    return QuantizerTile(block_c, -(-channels // block_c), has_room, block_k, num_warps)


def _quantize(
    producer: str,
    x: Tensor,
    other: Tensor | None,
    eps: float,
    channel_perm: Tensor,
    split: Split,
    fp6: str,
    scale_rounding: str,
) -> QuantizedActivation:
    reference.check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding)
    widths = (split[0] // 2, split[1], split[2], sum(split) // BLOCK_SIZE)
    outputs = QuantizedActivation(*(x.new_empty((x.shape[0], width), dtype=torch.uint8) for width in widths))
    if outputs.scale.numel():
        call = reorder_quantize_call(
            producer,
            unit_column_stride(x),
            None if other is None else unit_column_stride(other),
            eps,
            channel_perm.contiguous(),
            outputs,
            fp6=fp6,
            scale_rounding=scale_rounding,
        )
        with current_device(x):
            call.launch()
    return outputs


def mixed_mx_mm(
    x4: Tensor,
    x6: Tensor,
    x8: Tensor,
    x_scale: Tensor,
    w4: Tensor,
    w6: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    fp6: str,
    out_dtype: torch.dtype,
    family: Family,
    tile: Tile | None = None,
) -> Tensor:
    """`reference.mixed_mx_mm` in one launch. Scales are plain, or as `packing.swizzle_scale` returns them.

    family: the kernels of x's device. tile: one of its tiles, by default the first for M. Raises ValueError for weights
    that are neither split as the activations nor all MXFP4.
    """
    from micromix_compile.templates.triton.mixed_mx_mm import mixed_mx_mm_kernel

    x_swizzled, w_swizzled = x_scale.dim() == 3, w_scale.dim() == 3
    rows, columns = x4.shape[0], w4.shape[0]
    blocks = (2 * x4.shape[1] + x6.shape[1] + x8.shape[1]) // BLOCK_SIZE
    reference.check_mixed_mx_mm(
        x4, x6, x8, x_scale.new_empty(rows, blocks) if x_swizzled else x_scale,
        w4, w6, w8, w_scale.new_empty(columns, blocks) if w_swizzled else w_scale, bias, fp6,
    )  # fmt: skip
    split = (2 * x4.shape[1], x6.shape[1], x8.shape[1])
    w_fp4 = weights_are_fp4(split, (2 * w4.shape[1], 4 * w6.shape[2], w8.shape[1]))
    tile = tile or family.tiles_for(rows)[0]
    out = x4.new_empty((rows, columns), dtype=out_dtype)
    tensors = [tensor.contiguous() for tensor in (x4, x6, x8, x_scale, w4, w6, w8, w_scale)]
    call = KernelCall(
        kernel=mixed_mx_mm_kernel,
        grid=(-(-rows // tile.BLOCK_M) * -(-columns // tile.BLOCK_N),),
        args={
            **dict(zip(("x4", "x6", "x8", "x_scale", "w4", "w6", "w8", "w_scale"), tensors, strict=True)),
            "bias": None if bias is None else bias.contiguous(),
            "out": out,
            "M": rows,
            "N": columns,
            **dict(zip(("blocks4", "blocks6", "blocks8"), (k // BLOCK_SIZE for k in split), strict=True)),
        },
        constexprs=family.constants(
            tile, fp6=fp6, w_fp4=w_fp4, has_bias=bias is not None, x_swizzled=x_swizzled, w_swizzled=w_swizzled
        ),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    if out.numel():
        with current_device(out):
            call.launch()
    return out


def weights_are_fp4(split: Split, w_split: Split) -> bool:
    """Whether the weights are all MXFP4, as against split like the activations. Raises ValueError for any other."""
    if w_split == split:
        return False
    if w_split == (sum(split), 0, 0):
        return True
    raise ValueError(f"weights must be split like the activations, {split}, or all MXFP4, got {w_split}")


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current device; nothing for a CPU tensor, which Triton's interpreter takes."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_column_stride(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _power_of_two(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, between one block and `largest`."""
    return min(max(1 << (size - 1).bit_length(), BLOCK_SIZE), largest) if size else BLOCK_SIZE

"""Launches of the exact quantizers, and the tile of every quantizer: which channels a program reads and writes."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from micromix_compile.numerics import checks, producers
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.layout import RowLayout, activation_shapes, activation_split
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.launch import FORMATS_DIGEST, KernelCall, odd, odd_blocks, unit_column_stride

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.numerics.layout import Split

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


def reorder_quantize(
    producer: str,
    x: Tensor,
    other: Tensor | None,
    eps: float,
    channel_perm: Tensor,
    split: Split,
    fp6: str,
    scale_rounding: str,
    *,
    activations: str = "same",
    rotated: int = 0,
) -> QuantizedActivation:
    """`ExactKernels.quantize` in one launch: the same bytes, but for the last bits of an RMSNorm's mean.

    The exponential of SiLU is the device's own, good to a few units in the last place of float32. The same errors, too,
    but for an entry of channel_perm outside [-1, C), which reads as zero here.
    """
    checks.check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding, activations, rotated)
    producers.check_produce(producer, x, other)
    shapes = activation_shapes(x.shape[0], activation_split(split, activations))
    outputs = QuantizedActivation(*(x.new_empty(shape, dtype=torch.uint8) for shape in shapes))
    if outputs.scale.numel():
        reorder_quantize_call(
            producer,
            unit_column_stride(x),
            None if other is None else unit_column_stride(other),
            eps,
            channel_perm.contiguous(),
            outputs,
            RowLayout(*split, fp6, str(scale_rounding), activations, rotated),
        ).launch_on(x)
    return outputs


def reorder_quantize_call(
    producer: str,
    x: Tensor,
    other: Tensor | None,
    eps: float,
    channel_perm: Tensor,
    outputs: QuantizedActivation,
    layout: RowLayout,
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
            **odd_blocks(layout.split),
            "odd_rotated": odd(layout.rotated // BLOCK_SIZE) if layout.rotated else None,
        },
        constexprs={
            "PRODUCER": producer,
            "EPS": eps,
            "FP6": layout.fp6,
            "SCALE_ROUNDING": layout.scale_rounding,
            "ACTIVATIONS": layout.activations,
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


def _power_of_two(size: int, largest: int) -> int:
    """The smallest power of two that holds `size`, between one block and `largest`."""
    return min(max(1 << (size - 1).bit_length(), BLOCK_SIZE), largest) if size else BLOCK_SIZE

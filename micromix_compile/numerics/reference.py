"""MX numerics in plain PyTorch: the truth that every kernel is tested against.

Element codec, block quantization, and the two operations of a mixed linear. Each function is a pure function of its
tensors, runs on any device, and follows OCP MX v1.0 (element encodings: 5.3; dot product: 6.2; quantization: 6.3).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from micromix_compile.numerics import packing, rotation
from micromix_compile.numerics.checks import check_float, check_reorder_quantize
from micromix_compile.numerics.formats import (
    BLOCK_SIZE,
    E8M0_BIAS,
    E8M0_NAN,
    MEMORY_FORMATS,
    ElemFormat,
    ScaleRounding,
    elem_format,
    segment_formats,
)
from micromix_compile.numerics.layout import Split, split_of_activation, split_scale


class QuantizedActivation(NamedTuple):
    """A reordered, quantized (M, K) matrix with K = k4 + k6 + k8; see `packing` for the layouts.

    q4: (M, k4 // 2), q6: (M, k6), q8: (M, k8), scale: (M, K // 32), all uint8.
    """

    q4: Tensor
    q6: Tensor
    q8: Tensor
    scale: Tensor


def encode(x: Tensor, fmt: ElemFormat) -> Tensor:
    """Element codes of `x`, rounded to nearest even; finite overflow saturates to max_value (OCP 5.3).

    x: any shape, float32, finite. Returns uint8 of the same shape, the code in the low `fmt.bits` bits.
    """
    bits = x.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF).view(torch.float32)
    # One code step at exponent e is 2**(e - mantissa_bits). Adding 2**(e - mantissa_bits + 23), whose ulp is that
    # step, lets the fp32 adder round to nearest even; the low mantissa bits of the sum are the count of steps.
    exponent = ((bits & 0x7FFFFFFF) >> 23).clamp(min=E8M0_BIAS + fmt.min_exponent)
    exponent = exponent.clamp(max=E8M0_BIAS + fmt.emax + 1)  # beyond it everything saturates
    magnitude = magnitude.clamp(max=2.0 * fmt.max_value)
    magic = ((exponent + 23 - fmt.mantissa_bits) << 23).view(torch.float32)
    steps = (magnitude + magic).view(torch.int32) & 0x7FFFFF
    code = ((exponent - (E8M0_BIAS + fmt.min_exponent)) << fmt.mantissa_bits) + steps
    sign = (bits >> 31) & 1
    return (code.clamp(max=fmt.max_code) | (sign << (fmt.bits - 1))).to(torch.uint8)


def decode(code: Tensor, fmt: ElemFormat) -> Tensor:
    """Values of element codes. code: any shape, uint8. Returns float32; codes past max_code give inf or NaN."""
    code = code.to(torch.int32)
    sign = (code >> (fmt.bits - 1)) & 1
    magnitude = code & ((1 << (fmt.bits - 1)) - 1)
    exponent = magnitude >> fmt.mantissa_bits
    mantissa = magnitude & ((1 << fmt.mantissa_bits) - 1)
    normal = (exponent > 0).to(torch.int32)
    significand = (mantissa + (normal << fmt.mantissa_bits)).to(torch.float32)
    step = exponent.clamp(min=1) + (E8M0_BIAS - fmt.bias - fmt.mantissa_bits)
    value = significand * (step << 23).view(torch.float32)
    if fmt.max_code < (1 << (fmt.bits - 1)) - 1:
        special = torch.where(
            (magnitude == fmt.max_code + 1) & (mantissa == 0), torch.inf, torch.full_like(value, torch.nan)
        )
        value = torch.where(magnitude > fmt.max_code, special, value)
    return torch.where(sign == 1, -value, value)


def scale_byte(amax: Tensor, fmt: ElemFormat, scale_rounding: ScaleRounding) -> Tensor:
    """E8M0 byte of blocks with largest magnitude `amax` (float32, >= 0). Returns int32 of the same shape.

    The exponent is clamped to -127, so blocks of zeros get byte 0; a NaN or infinite amax gives 255. Raises
    ValueError for a `scale_rounding` that is none.
    """
    rounding = ScaleRounding(scale_rounding)
    bits = amax.view(torch.int32) & 0x7FFFFFFF  # a NaN may carry a sign
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    max_mantissa = int((2 * math.frexp(fmt.max_value)[0] - 1) * 2**23)
    half_step = 1 << (22 - fmt.mantissa_bits)
    if rounding == ScaleRounding.FLOOR:
        carry = torch.zeros_like(exponent)
    elif rounding == ScaleRounding.RCEIL:
        carry = (mantissa > max_mantissa).to(torch.int32)
    elif rounding == ScaleRounding.EVEN:
        carry = (mantissa + half_step) >> 23
    else:
        carry = (mantissa > max_mantissa + half_step).to(torch.int32)
    byte = (exponent + carry - fmt.emax).clamp(min=0)
    return torch.where(exponent == 255, E8M0_NAN, byte)


def scale_value(byte: Tensor) -> Tensor:
    """2**(byte - 127) as float32, NaN for 255 (OCP 5.4.1). byte: any integer dtype. Byte 0 is the subnormal 2**-127."""
    byte = byte.to(torch.int32)
    bits = torch.where(byte == 0, 0x00400000, byte << 23)
    return torch.where(byte == E8M0_NAN, torch.nan, bits.view(torch.float32))


def quantize(
    x: Tensor,
    fmt: str | ElemFormat,
    *,
    scale_rounding: ScaleRounding = ScaleRounding.RCEIL,
    block_size: int = BLOCK_SIZE,
) -> tuple[Tensor, Tensor]:
    """Quantize the last dimension of `x` to MX (OCP 6.3), or as MX in blocks of another size.

    x: (..., K) float32, bfloat16 or float16, K a multiple of block_size.
    Returns codes (..., K) uint8 and scale (..., K // block_size) uint8 (E8M0). A block with a NaN or an infinity gets
    scale 255 and zero codes. Raises TypeError for another dtype, ValueError for another K.
    """
    check_float(x)
    if x.shape[-1] % block_size:
        raise ValueError(f"the last dimension must be a multiple of {block_size}, got {x.shape[-1]}")
    form = elem_format(fmt)
    blocks = x.to(torch.float32).unflatten(-1, (-1, block_size))
    byte = scale_byte(blocks.abs().amax(-1), form, scale_rounding)
    reciprocal = ((254 - byte).clamp(min=1) << 23).view(torch.float32)
    poisoned = (byte == E8M0_NAN).unsqueeze(-1)
    codes = encode(torch.where(poisoned, 0.0, blocks * reciprocal.unsqueeze(-1)), form)
    return codes.flatten(-2), byte.to(torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, fmt: str | ElemFormat, *, block_size: int = BLOCK_SIZE) -> Tensor:
    """The values of MX codes (OCP 6.1), or of such blocks of another size: float32 (..., K).

    codes: (..., K) uint8. scale: (..., K // block_size) uint8.
    """
    values = decode(codes, elem_format(fmt)).unflatten(-1, (-1, block_size))
    scaled: Tensor = values * scale_value(scale).unsqueeze(-1)
    return scaled.flatten(-2)


def reorder(x: Tensor, channel_perm: Tensor) -> Tensor:
    """x[:, channel_perm], where an index of -1 reads as zero (the padding of a K that is not a multiple of 32)."""
    index = channel_perm.to(torch.int64)
    columns = x.index_select(1, index.clamp(min=0))
    return torch.where(index < 0, torch.zeros((), dtype=x.dtype, device=x.device), columns)


def reorder_quantize(
    x: Tensor,
    channel_perm: Tensor,
    split: Split,
    *,
    fp6: str,
    scale_rounding: ScaleRounding = ScaleRounding.RCEIL,
    activations: str = "same",
    rotated: int = 0,
) -> QuantizedActivation:
    """Reorder the channels of `x` and quantize them as [MXFP4 | MXFP6 | MXFP8] (MicroMix, section 4.2).

    x: (M, C) float32, bfloat16 or float16. channel_perm: (K,) int16, int32 or int64, entries in [0, C), or -1 for a
    zero channel.
    split: (k4, k6, k8), multiples of 32 with sum K. fp6: "e2m3" or "e3m2".
    activations: other formats than the split's, see `layout.ACTIVATIONS`; all parts but q8 are empty then. With "fp8" a
    row has one scale, that of its largest value, whether channel_perm holds it or not; if that is a NaN or infinite,
    the whole row is NaN. rotated: how many channels of the order are rotated first (see `rotation`).
    Raises TypeError or ValueError for another dtype, shape, split or name. The entries of channel_perm are not
    checked (that would wait for the device): one past C is `index_select`'s to report.
    """
    check_reorder_quantize(x, channel_perm, split, fp6, scale_rounding, activations, rotated)
    y = reorder(x, channel_perm)
    if rotated:
        y = rotation.rotate_activation(y.to(torch.float32), rotated)
    if activations == "same":
        return _quantize_segments(y, split, fp6, scale_rounding)
    if activations == "fp8":
        return _wide(*_quantize_rows(y, row_scale_byte(x, scale_rounding)))
    k4, k6, k8 = split
    _, narrow, wide, scale = _quantize_segments(y, (0, k4 + k6, k8), fp6, scale_rounding)
    return _wide(torch.cat((narrow, wide), 1), scale)


def row_scale_byte(x: Tensor, scale_rounding: ScaleRounding) -> Tensor:
    """The E8M0 byte of each row as a whole in E4M3: (M,) int32, at least 1, for GPUs may take 2**-127 as a zero."""
    amax = x.to(torch.float32).abs().amax(1) if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.float32)
    return scale_byte(amax, elem_format("e4m3"), scale_rounding).clamp(min=1)


def _quantize_rows(y: Tensor, byte: Tensor) -> tuple[Tensor, Tensor]:
    """E4M3 codes (M, K) with one scale a row, and that once for each block. byte: (M,) int32."""
    reciprocal = ((254 - byte).clamp(min=1) << 23).view(torch.float32)[:, None]
    codes = encode(torch.where((byte == E8M0_NAN)[:, None], 0.0, y.to(torch.float32) * reciprocal), elem_format("e4m3"))
    return codes, byte.to(torch.uint8)[:, None].repeat(1, y.shape[1] // BLOCK_SIZE)


def _wide(codes: Tensor, scale: Tensor) -> QuantizedActivation:
    # Two tensors, not one twice: results of a custom op must not share memory.
    return QuantizedActivation(codes.new_empty((len(codes), 0)), codes.new_empty((len(codes), 0)), codes, scale)


def _quantize_segments(y: Tensor, split: Split, fp6: str, scale_rounding: ScaleRounding) -> QuantizedActivation:
    segments = zip(y.split(split, dim=1), segment_formats(fp6), strict=True)
    (codes4, scale4), (codes6, scale6), (codes8, scale8) = (
        quantize(segment, fmt, scale_rounding=scale_rounding) for segment, fmt in segments
    )
    q6, scale6 = packing.align_fp6(codes6, scale6, fp6)
    return QuantizedActivation(packing.pack_fp4(codes4), q6, codes8, torch.cat((scale4, scale6, scale8), 1))


def dequantize_activation(x4: Tensor, x6: Tensor, x8: Tensor, scale: Tensor) -> Tensor:
    """float32 (M, K) values of a `QuantizedActivation`."""
    scales = split_scale(scale, split_of_activation(x4, x6, x8))
    codes = (packing.unpack_fp4(x4), x6, x8)
    return torch.cat([dequantize(*part) for part in zip(codes, scales, MEMORY_FORMATS, strict=True)], dim=1)


def dequantize_weight(w4: Tensor, w6: Tensor, w8: Tensor, scale: Tensor, fp6: str) -> Tensor:
    """float32 (N, K) values of packed weights: as an activation, with FP6 in three byte planes."""
    return dequantize_activation(w4, packing.unpack_fp6(w6, fp6), w8, scale)


def mixed_mx_mm(
    x: QuantizedActivation,
    w4: Tensor,
    w6: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    *,
    fp6: str,
    out_dtype: torch.dtype,
) -> Tensor:
    """dequant(x) @ dequant(w).T + bias, accumulated in float32 and rounded once (OCP 6.2; MicroMix, section 4.3).

    w4: (N, k4 // 2), w6: (3, N, k6 // 4), w8: (N, k8), w_scale: (N, K // 32), all uint8. The weights' split may
    differ from the activations' (weights="mxfp4": w4 holds all K). bias: (N,) or None. Returns (M, N) out_dtype.
    """
    out = dequantize_activation(*x) @ dequantize_weight(w4, w6, w8, w_scale, fp6).T
    if bias is not None:
        out = out + bias.to(torch.float32)
    return out.to(out_dtype)

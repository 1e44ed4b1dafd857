"""Keys and values of attention as bytes: E4M3 codes with a power-of-two scale for each block of a head's channels.

The arithmetic is `reference`'s, in blocks of a size that `block_of` says: all channels of a head ("fp8"), or 32 of
them, which is MXFP8 (OCP MX v1.0). A cache of L tokens holds codes (B, H, L, D) and scales (B, H, L, D // block_size).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics import reference
from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding

if TYPE_CHECKING:
    from torch import Tensor

CACHE_FORMATS: Final = ("fp8", "mxfp8")
"""fp8: E4M3 with one scale for each head and token. mxfp8: E4M3 with a scale for each 32 channels of a head."""

ELEMENT: Final = "e4m3"
POSITION_DTYPES: Final = (torch.int32, torch.int64)

# A code moved into a float32 has its exponent bias off by 120; a signed byte brings its sign along.
_CODE_BITS: Final = 0x87F00000 - 2**32
_BIAS: Final = 2.0**120


def check_cache_format(name: object) -> None:
    """Raise ValueError unless `name` is one of `CACHE_FORMATS`."""
    if name not in CACHE_FORMATS:
        raise ValueError(f"cache_format must be one of {', '.join(CACHE_FORMATS)}, got {name!r}")


def block_of(cache_format: str, head_dim: int) -> int:
    """Channels of a head that share a scale. Raises ValueError for a head that has no whole blocks, or another name."""
    check_cache_format(cache_format)
    if cache_format == "fp8":
        return head_dim
    if head_dim % BLOCK_SIZE:
        raise ValueError(
            f"cache_format 'mxfp8' takes heads of a multiple of {BLOCK_SIZE} channels, got {head_dim}; 'fp8' takes any"
        )
    return BLOCK_SIZE


def dequantize_kv(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """`reference.dequantize` of a cache, in few operations, which a compiler fuses with what reads the result.

    q: (B, H, L, D) uint8, none of them a NaN. scale: (B, H, L, D // block_size) uint8. Returns (B, H, L, D) of `dtype`.
    """
    bits = (q.view(torch.int8).to(torch.int32) << 20) & _CODE_BITS
    values = (bits.view(torch.float32) * _BIAS).unflatten(-1, (scale.shape[-1], -1))
    scaled: Tensor = values * reference.scale_value(scale).unsqueeze(-1)
    return scaled.flatten(-2).to(dtype)


def read_kv(q: Tensor, scale: Tensor, recent: Tensor, recent_position: Tensor) -> Tensor:
    """A cache dequantized, but for the newest tokens, which are as they came.

    q, scale: as of `dequantize_kv`. recent: (B, H, R, D) float32, bfloat16 or float16, the token of position p in slot
    p % R. recent_position: (R,) int64, the positions of those that are there; -1 is none. R may be 0. Returns
    (B, H, L, D) of recent's dtype.
    """
    values, slots = dequantize_kv(q, scale, recent.dtype), recent.shape[2]
    if not slots:
        return values
    place = torch.arange(q.shape[2], device=q.device)
    slot = place % slots
    is_recent = recent_position.index_select(0, slot) == place
    return torch.where(is_recent[:, None], recent.index_select(2, slot), values)


def put_states(values: Tensor, states: Tensor, position: Tensor) -> Tensor:
    """values (B, H, L, D), a tensor that nothing else reads, with states (B, H, T, D) at position (T,)."""
    if states.shape[2] == 1:  # one kernel with the dequantization, where that is compiled
        own = torch.arange(values.shape[2], device=values.device) == position
        return torch.where(own[:, None], states, values)
    return values.index_copy_(2, position.to(torch.int64), states)


def keep_recent(recent: Tensor, states: Tensor, position: Tensor) -> None:
    """Put the last of the states (B, H, T, D), at consecutive positions (T,), into their slots: see `read_kv`."""
    if slots := recent.shape[2]:
        newest = position[-slots:].to(torch.int64)
        recent.index_copy_(2, newest % slots, states[:, :, -slots:])


def keep_position(recent_position: Tensor, position: Tensor) -> None:
    """The same of their positions."""
    if slots := recent_position.shape[0]:
        newest = position[-slots:].to(torch.int64)
        recent_position.index_copy_(0, newest % slots, newest)


def write_kv(
    key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
    scale_rounding: str,
) -> None:  # fmt: skip
    """Quantize keys and values of T tokens and write them to their positions in the cache.

    key: (B, H, T, Dk), value: (B, H, T, Dv), float32, bfloat16 or float16. position: (T,) int32 or int64, distinct,
    from 0 to L - 1. k_q: (B, H, L, Dk), v_q: (B, H, L, Dv), k_scale, v_scale: (B, H, L, blocks of a head), all uint8
    and contiguous. A block with a NaN or an infinity gets scale 255, so that it reads as NaN.
    Raises TypeError or ValueError for what is otherwise; reads `position`, and so waits for the device.
    """
    check_write_kv(key, value, position, k_q, k_scale, v_q, v_scale, scale_rounding)
    check_positions(position, k_q.shape[2])
    index, rounding = position.to(torch.int64), ScaleRounding(scale_rounding)
    for x, q, scale in ((key, k_q, k_scale), (value, v_q, v_scale)):
        block_size = x.shape[-1] // scale.shape[-1]
        codes, byte = reference.quantize(x, ELEMENT, scale_rounding=rounding, block_size=block_size)
        q.index_copy_(2, index, codes)
        scale.index_copy_(2, index, byte)


def check_positions(position: Tensor, length: int) -> None:
    """Raise ValueError unless each is from 0 to length - 1."""
    wrong = position[(position < 0) | (position >= length)]
    if wrong.numel():
        raise ValueError(
            f"position must be from 0 to {length - 1}, got {int(wrong[0])}: the cache holds {length} tokens"
        )


def check_write_kv(
    key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
    scale_rounding: str,
) -> None:  # fmt: skip
    """Raise TypeError or ValueError for arguments that `write_kv` does not take; values are not read."""
    ScaleRounding(scale_rounding)
    if position.dtype not in POSITION_DTYPES:
        raise TypeError(f"position must be int32 or int64, got {position.dtype}")
    if key.dim() != 4 or position.shape != key.shape[2:3]:
        raise ValueError(
            f"key must be (B, H, T, D) and position (T,), got shapes {tuple(key.shape)} and {tuple(position.shape)}"
        )
    if value.dim() != 4 or value.shape[:3] != key.shape[:3] or value.dtype != key.dtype:
        raise ValueError(
            f"value must be (B, H, T, D) {key.dtype} with {tuple(key.shape[:3])} in front as key has, got "
            f"{tuple(value.shape)} {value.dtype}"
        )
    for letter, x, q, scale in (("k", key, k_q, k_scale), ("v", value, v_q, v_scale)):
        if x.dtype not in FLOAT_DTYPES:
            raise TypeError(f"key and value must be float32, bfloat16 or float16, got {x.dtype}")
        _check_part(letter, x, q, scale, k_q)


def _check_part(letter: str, x: Tensor, q: Tensor, scale: Tensor, k_q: Tensor) -> None:
    for name, part in ((f"{letter}_q", q), (f"{letter}_scale", scale)):
        if part.dtype != torch.uint8:
            raise TypeError(f"{name} must be uint8, got {part.dtype}")
        if part.dim() != 4 or not part.is_contiguous():
            raise ValueError(f"{name} must be 4-dimensional and contiguous, got shape {tuple(part.shape)}")
        if part.shape[:3] != (*x.shape[:2], k_q.shape[2]):
            raise ValueError(
                f"{name} must begin with (B, H, L) = {(*x.shape[:2], k_q.shape[2])}, got shape {tuple(part.shape)}"
            )
    if q.shape[3] != x.shape[3]:
        raise ValueError(f"{letter}_q must have heads of {x.shape[3]} channels, got shape {tuple(q.shape)}")
    if scale.shape[3] < 1 or x.shape[3] < 1 or x.shape[3] % scale.shape[3]:
        raise ValueError(f"{letter}_scale must have whole blocks of {x.shape[3]} channels, got {tuple(scale.shape)}")

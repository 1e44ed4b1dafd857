"""By what a recipe knows a weight again: a sample that survives a change of dtype, checksums that survive no edit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping

SAMPLE_SIZE: Final = 32
"""Weights kept per linear to recognize it by; see `weight_sample`."""

_INTEGERS: Final = {"float32": torch.int32, "bfloat16": torch.int16, "float16": torch.int16}
"""Integers of the sizes of the dtypes of linears, see `checks.FLOAT_DTYPES`."""

_CHUNK: Final = 2**16
"""Elements that are summed at a time on a CPU, for they take eight bytes each; on a GPU 64 times as many."""

_FACTORS: Final = (-7046029254386353131, -4417276706812531889, -4658895280553007687)
"""Odd 64-bit numbers without a pattern, of two's complement."""


def weight_sample(weight: Tensor) -> Tensor:
    """(32,) float32: evenly spaced elements of `weight`, by which a recipe recognizes it in any float dtype."""
    flat = weight.detach().flatten()
    index = torch.linspace(0, flat.numel() - 1, SAMPLE_SIZE, dtype=torch.float64, device="cpu").to(torch.int64)
    return flat[index.to(flat.device)].to(device="cpu", dtype=torch.float32)


def same_sample(a: Tensor, b: Tensor) -> bool:
    """Whether two weight samples can be the same weight, each perhaps rounded to bfloat16 or float16.

    Rounding to bfloat16 moves a value by at most 2**-9 of itself, so two copies differ by at most 2**-8; float16's
    subnormals add 2**-24.
    """
    return bool(torch.allclose(a, b, rtol=2.0**-7, atol=2.0**-24))


@dataclass(frozen=True, slots=True)
class Checksums:
    """Of a weight (N, C) as it is in each float dtype. made_in: the dtype that it had."""

    made_in: str
    values: Mapping[str, int]

    @classmethod
    def of(cls, weight: Tensor) -> Checksums:
        """Those of `weight`."""
        values = {name: _checksum(weight, getattr(torch, name)) for name in _INTEGERS}
        return cls(str(weight.dtype).removeprefix("torch."), values)

    def fit(self, weight: Tensor) -> bool:
        """Whether `weight` is the one they were made of, perhaps in another dtype, or on the way there in a third.

        A NaN may have other bits after a conversion, or on another device, and counts as a change then.
        """
        own = str(weight.dtype).removeprefix("torch.")
        return any(
            self.values[name] == _checksum(weight, getattr(torch, name))
            for name in sorted(_INTEGERS, key=lambda name: name != own)
            if name in (own, self.made_in) or torch.equal(weight, weight.to(getattr(torch, name)).to(weight.dtype))
        )

    def to_json(self) -> dict[str, Any]:
        """Plain values: the fields."""
        return {"made_in": self.made_in, "values": dict(self.values)}


def _checksum(weight: Tensor, dtype: torch.dtype) -> int:
    """The sum of all elements' hashes, modulo 2**64. A hash is one-to-one in the bits of an element at its place."""
    chunk = _CHUNK * (1 if weight.device.type == "cpu" else 64)
    rows = max(chunk // max(weight.shape[1], 1), 1)
    total = torch.zeros((), dtype=torch.int64, device=weight.device)
    integers = _INTEGERS[str(dtype).removeprefix("torch.")]
    for first, part in zip(range(0, len(weight), rows), weight.detach().split(rows), strict=False):
        mixed = part.to(dtype).contiguous().view(integers).flatten().to(torch.int64)
        place = torch.arange(first * weight.shape[1], first * weight.shape[1] + mixed.numel(), device=weight.device)
        mixed.mul_(_FACTORS[0]).add_(place.mul_(_FACTORS[1]))
        mixed.bitwise_xor_((mixed >> 32).bitwise_and_(2**32 - 1)).mul_(_FACTORS[2])
        mixed.bitwise_xor_((mixed >> 29).bitwise_and_(2**35 - 1))
        total += mixed.sum()
    return int(total)

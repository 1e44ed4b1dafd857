"""The MX element formats as one table, and how a block's E8M0 scale is rounded.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3 (element formats) and 6.3 (scales).
Nothing here computes: `reference.py` reads the table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

BLOCK_SIZE: Final = 32
"""Elements along K that share one E8M0 scale (OCP section 5.2)."""

E8M0_BIAS: Final = 127
E8M0_NAN: Final = 255
"""The scale byte of a block that holds a NaN or an infinity: the whole block decodes to NaN."""


class ScaleRounding(enum.StrEnum):
    """How the shared exponent of a block follows from its largest magnitude `amax`.

    FLOOR: floor(log2(amax)) - emax, the rule of OCP section 6.3; amax may saturate.
    RCEIL: ceil(log2(amax / max_value)), the authors' rule; nothing saturates.
    EVEN:  floor(log2(r)) - emax, where r is amax rounded to the element's mantissa width.
    FIT:   the smallest exponent at which amax, rounded to the element's steps, is max_value or less. No element is
           further off than with RCEIL; where the two differ, steps are half as wide and amax rounds to max_value.
    """

    FLOOR = "floor"
    RCEIL = "rceil"
    EVEN = "even"
    FIT = "fit"


@dataclass(frozen=True, kw_only=True, slots=True)
class ElemFormat:
    """One MX element format: sign, `exponent_bits`, `mantissa_bits`.

    bias: exponent bias. emax: exponent of the largest normal number. max_value: largest finite magnitude.
    max_code: the code of max_value; larger magnitude codes, if any, are infinities or NaN.
    e4m3_shift: k such that value = 2**k * E4M3(`code` moved into an E4M3 byte), or None where no such k is used.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    emax: int
    max_value: float
    max_code: int
    e4m3_shift: int | None

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals share it."""
        return 1 - self.bias


def _format(name: str, bias: int, emax: int, max_value: float, max_code: int, shift: int | None) -> ElemFormat:
    return ElemFormat(
        name=name,
        exponent_bits=int(name[1]),
        mantissa_bits=int(name[3]),
        bias=bias,
        emax=emax,
        max_value=max_value,
        max_code=max_code,
        e4m3_shift=shift,
    )


ELEM_FORMATS: Final[Mapping[str, ElemFormat]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            #       name  bias emax max_value max_code e4m3_shift
            _format("e2m1", 1, 2, 6.0, 0x07, 6),
            _format("e2m3", 1, 2, 7.5, 0x1F, 6),
            _format("e3m2", 3, 4, 28.0, 0x1F, 4),
            _format("e4m3", 7, 8, 448.0, 0x7E, 0),
            _format("e5m2", 15, 15, 57344.0, 0x7B, None),
        )
    }
)

FP6_FORMATS: Final = ("e2m3", "e3m2")


def elem_format(name: str) -> ElemFormat:
    """The format called `name`. Raises ValueError for a name that is not in the table."""
    try:
        return ELEM_FORMATS[name]
    except KeyError:
        raise ValueError(f"elem_format must be one of {', '.join(ELEM_FORMATS)}, got {name!r}") from None

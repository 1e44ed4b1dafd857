"""The MX element formats as one table, and how a block's E8M0 scale is rounded.

Source: OCP Microscaling Formats (MX) Specification v1.0, sections 5.3 (element formats) and 6.3 (scales).
Nothing here computes: `reference.py` reads the table.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
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
class PlaneLayout:
    """How four E4M3 bytes of FP6 codes lie in three: the fourth hides in the bits that the codes of the others leave.

    used: the six bits of an E4M3 byte that a code uses. moves: (plane, bits of the fourth byte, left shift that brings
    them to free bits of that plane; negative is a right shift).
    """

    used: int
    moves: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ElemFormat:
    """One MX element format: sign, `exponent_bits`, `mantissa_bits`.

    bias: exponent bias. emax: exponent of the largest normal number. max_value: largest finite magnitude.
    max_code: the code of max_value; larger magnitude codes, if any, are infinities or NaN.
    e4m3_shift: k such that value = 2**k * E4M3(`code` moved into an E4M3 byte), or None where no such k is used.
    in_memory: the format whose codes activations hold in its place, by default its own; if it is another, 2**e4m3_shift
    is in the scale. planes: how weights hold it in planes of bytes, None where they don't.
    The last two are not in the repr, which names compiled kernels: none of them depends on these.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    bias: int
    emax: int
    max_value: float
    max_code: int
    e4m3_shift: int | None
    in_memory: str = field(repr=False)
    planes: PlaneLayout | None = field(default=None, repr=False)

    @property
    def bits(self) -> int:
        """Width of one element in bits."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals share it."""
        return 1 - self.bias


def _format(
    name: str,
    bias: int,
    emax: int,
    max_value: float,
    max_code: int,
    shift: int | None,
    in_memory: str,
    planes: PlaneLayout | None = None,
) -> ElemFormat:
    return ElemFormat(
        name=name,
        exponent_bits=int(name[1]),
        mantissa_bits=int(name[3]),
        bias=bias,
        emax=emax,
        max_value=max_value,
        max_code=max_code,
        e4m3_shift=shift,
        in_memory=in_memory,
        planes=planes,
    )


_E2M3_PLANES = PlaneLayout(used=0x9F, moves=((0, 0x80, -1), (0, 0x10, 1), (1, 0x0C, 3), (2, 0x03, 5)))
_E3M2_PLANES = PlaneLayout(used=0xBE, moves=((0, 0x82, -1), (1, 0x20, 1), (1, 0x04, -2), (2, 0x10, 2), (2, 0x08, -3)))

ELEM_FORMATS: Final[Mapping[str, ElemFormat]] = MappingProxyType(
    {
        fmt.name: fmt
        for fmt in (
            #       name  bias emax max_value max_code e4m3_shift in_memory
            _format("e2m1", 1, 2, 6.0, 0x07, 6, "e2m1"),
            _format("e2m3", 1, 2, 7.5, 0x1F, 6, "e4m3", _E2M3_PLANES),
            _format("e3m2", 3, 4, 28.0, 0x1F, 4, "e4m3", _E3M2_PLANES),
            _format("e4m3", 7, 8, 448.0, 0x7E, 0, "e4m3"),
            _format("e5m2", 15, 15, 57344.0, 0x7B, None, "e5m2"),
        )
    }
)

FP6_FORMATS: Final = ("e2m3", "e3m2")


def segment_formats(fp6: str) -> tuple[str, str, str]:
    """The element formats of a split's segments: [MXFP4 | MXFP6 | MXFP8]."""
    return "e2m1", fp6, "e4m3"


MEMORY_FORMATS: Final = tuple(ELEM_FORMATS[name].in_memory for name in segment_formats(FP6_FORMATS[0]))
"""What memory holds in each segment of an activation, whichever MXFP6 format it is."""


def fp6_format(fp6: str) -> ElemFormat:
    """The MXFP6 element format called `fp6`. Raises ValueError if that is none."""
    if fp6 not in FP6_FORMATS:
        raise ValueError(f"fp6 must be one of {', '.join(FP6_FORMATS)}, got {fp6!r}")
    return ELEM_FORMATS[fp6]


def elem_format(name: str | ElemFormat) -> ElemFormat:
    """The format called `name`, or a format as it is. Raises ValueError for a name that is not in the table."""
    if isinstance(name, ElemFormat):
        return name
    try:
        return ELEM_FORMATS[name]
    except KeyError:
        raise ValueError(f"elem_format must be one of {', '.join(ELEM_FORMATS)}, got {name!r}") from None

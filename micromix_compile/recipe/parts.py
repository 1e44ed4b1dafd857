"""The matrix that a Parameter is, and parts of it that are linears of their own: rows or columns, and their names."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

_PATTERN: Final = re.compile(r"(?P<base>.+)\[(?P<columns>:, )?(?P<start>\d+):(?P<stop>\d+)\]")


def as_matrix(weight: Tensor) -> Tensor:
    """(N, C) of a convolution of kernel size 1, whose weight is (N, C, 1) or (N, C, 1, 1); any other as it is."""
    return weight.flatten(1) if weight.dim() > 2 and weight.shape[2:].numel() == 1 else weight


class Part(NamedTuple):
    """Of a matrix: rows, where `dim` is 0, or columns, where it is 1, from `start` to before `stop`.

    As text it is what Python writes behind the matrix: "[0:64]", "[:, 0:64]".
    """

    dim: int
    start: int
    stop: int

    def __str__(self) -> str:
        return f"[{':, ' * self.dim}{self.start}:{self.stop}]"

    @property
    def size(self) -> int:
        """How many rows or columns."""
        return self.stop - self.start

    def of(self, weight: Tensor) -> Tensor:
        """The part of a matrix, in the matrix's memory."""
        return weight.narrow(self.dim, self.start, self.size)

    def fits(self, weight: Tensor) -> bool:
        """Whether a tensor is a matrix that has such a part."""
        return weight.dim() == 2 and self.start < self.stop <= weight.shape[self.dim]


def split_name(name: str) -> tuple[str, Part | None]:
    """(what the whole is called, the part) of a linear's name; (the name, None) of one that names no part."""
    found = _PATTERN.fullmatch(name)
    if found is None:
        return name, None
    return found["base"], Part(int(found["columns"] is not None), int(found["start"]), int(found["stop"]))


def gaps(parts: list[Part], size: int) -> list[Part]:
    """The parts between `parts`, which are all rows or all columns, of a matrix that has `size` of these."""
    free, at = [], 0
    for part in sorted(parts):
        if part.start > at:
            free.append(Part(part.dim, at, part.start))
        at = max(at, part.stop)
    return free if at == size else [*free, Part(parts[0].dim, at, size)]

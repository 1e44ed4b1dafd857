"""The arguments of kernels that take up to three weights that read one activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeVar

from micromix_compile.targets.kernels import columns_of
from micromix_compile.targets.launch import odd_blocks

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.targets.kernels import FoldedWeight

_T = TypeVar("_T")

MAX_GROUP: Final = 3
"""Weights that one product takes."""


def group_args(weights: Sequence[FoldedWeight], block_n: int) -> dict[str, Any]:
    """A kernel's arguments that say which weights there are, in tiles of block_n rows."""
    fields = ("w4", "w6", "w8", "w_factor", "w_row_scale", "bias")
    args: dict[str, Any] = {
        f"{name}_{i}": tensor
        for i, weight in enumerate(padded(weights))
        for name, tensor in zip(fields, weight, strict=True)
    }
    columns = columns_of(weights)
    args |= {f"N{i}": columns[i] if i < len(columns) else 0 for i in range(MAX_GROUP)}
    tiles = [-(-n // block_n) for n in columns]
    return args | {**odd_blocks(weights[0].split), "tiles0": tiles[0], "tiles1": sum(tiles[:2])}


def padded(group: Sequence[_T]) -> list[_T]:
    """As many as kernels take; what is beyond the group is never touched."""
    return [*group, *[group[0]] * (MAX_GROUP - len(group))]

"""Whether what a file says is an order of channels, and how it is cut into shards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.numerics.shards import Cut, total
from micromix_compile.recipe.schema import FieldError, Rule, named, shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.numerics.layout import Split


def _is_split(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) == 3
        and all(isinstance(k, int) and k >= 0 and k % BLOCK_SIZE == 0 for k in value)
    )


SPLIT: Final = Rule(f"three multiples of {BLOCK_SIZE}", _is_split)
SHARDS: Final = Rule(
    f"a list of two or more splits, each three multiples of {BLOCK_SIZE}",
    lambda value: isinstance(value, list) and len(value) > 1 and all(map(_is_split, value)),
    optional=True,
)
"""Of an order that is cut; files of before lack it."""


def shards_of(fields: Mapping[str, Any], split: Split, place: str) -> tuple[Split, ...]:
    """The splits of the shards that `fields` lists; none if it lists none.

    Raises `FieldError`, which begins with `place`, unless they are of one width and make up `split`.
    """
    shards = tuple((k4, k6, k8) for k4, k6, k8 in fields.get("shards", ()))
    if shards and (len({sum(shard) for shard in shards}) > 1 or total(shards) != split):
        raise FieldError(
            f"{place}.shards must be splits of one width that sum to {list(split)}, got {shown(fields['shards'])}"
        )
    return shards


def check_order(perm: Tensor, channels: int, name: str, shards: tuple[Split, ...] = ()) -> None:
    """Raise `FieldError` unless `perm` (K,) orders `channels`: each once, and -1 for the rest of whole blocks.

    With shards: unless the places of each one hold its own channels.
    """
    expected = torch.arange(-1, channels, dtype=perm.dtype, device=perm.device)
    padding = -channels % BLOCK_SIZE
    ordered = perm.sort().values
    if (
        perm.numel() != channels + padding
        or not torch.equal(ordered[padding:], expected[1:])
        or (ordered[:padding] != -1).any()
    ):
        raise FieldError(
            f"{named(name)} must have each channel from 0 to {channels - 1} once and -1 {padding} times, in any order"
        )
    for rank in range(len(shards)):
        own = Cut(shards, rank, len(shards)).order(perm)
        if not torch.equal(own.sort().values, torch.arange(own.numel(), dtype=own.dtype, device=own.device)):
            raise FieldError(f"{named(name)} must have the channels of shard {rank} of {len(shards)} in its places")

"""Which rows of a linear's input are padding: the attention mask, laid out as that input is.

Most models keep (B, T, C), some work time-first, (T, B, C), and many flatten before they multiply. The sizes of a batch
tell which, unless B equals T; what was told by one batch holds for the linear's next ones. Where it cannot be told, a
row counts only if it is no padding either way, and the log says so.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

logger = logging.getLogger("micromix_compile")


class Tokens(NamedTuple):
    """How to read the rows of an input.

    shape: leading sizes that its rows stand in. keep: what is no padding, bool of that shape, or None if all counts.
    time_first: the samples are the second of two leading dimensions.
    """

    shape: tuple[int, ...]
    keep: Tensor | None = None
    time_first: bool = False


class TokenLayout:
    """What is known of the linears of one model, by name."""

    def __init__(self) -> None:
        self._time_first: dict[str, bool] = {}
        self._said: set[str] = set()

    def read(self, name: str, shape: Sequence[int], token_mask: Tensor | None) -> Tokens:
        """How the rows of the input of linear `name` stand, and which count.

        shape: its leading sizes, before it was flattened if that is known. token_mask: (B, T), 0 for padding.
        """
        sizes = tuple(shape)
        if token_mask is None or token_mask.dim() != 2:
            return Tokens(sizes, time_first=len(sizes) == 2 and self._time_first.get(name, False))
        mask = token_mask.to(torch.bool)
        straight, turned = tuple(mask.shape), tuple(mask.T.shape)
        if sizes not in (straight, turned, (mask.numel(),)):
            self._check_unfit(name, sizes, mask)
            return Tokens(sizes)
        if len(sizes) == 2 and straight != turned:
            self._time_first[name] = sizes == turned
        time_first = self._is_time_first(name)
        if time_first is None and 1 not in straight and not bool(mask.all()):
            self._say(
                "whether the input of %s is (batch, time) or (time, batch) can't be told from its sizes %s and the "
                "attention mask's %s: only tokens that are no padding either way are counted; take batches whose "
                "number of sequences is not their length",
                name,
                sizes,
                straight,
            )
            return Tokens(straight, (mask.flatten() & mask.T.flatten()).view(straight))
        return Tokens(turned, mask.T, time_first=True) if time_first else Tokens(straight, mask)

    def _is_time_first(self, name: str) -> bool | None:
        """What batches told of this linear or, as long as none did, of all others, if these agree."""
        if name in self._time_first:
            return self._time_first[name]
        told = set(self._time_first.values())
        return told.pop() if len(told) == 1 else None

    def _check_unfit(self, name: str, sizes: tuple[int, ...], mask: Tensor) -> None:
        """One row a sequence is no padding; of any other number it can't be told."""
        rows = torch.Size(sizes).numel()
        if rows not in (0, mask.shape[0]) and not bool(mask.all()):
            self._say(
                "the attention mask %s does not fit the input %s of %s: all of it is counted, padding, if it holds "
                "any, included",
                tuple(mask.shape),
                sizes,
                name,
            )

    def _say(self, message: str, *args: object) -> None:
        """Once a kind and model: a model has hundreds of linears."""
        if message not in self._said:
            self._said.add(message)
            logger.warning(message, *args)


def token_mask_of(positional: Sequence[Any], named: Mapping[str, Any]) -> Tensor | None:
    """(B, T): the attention mask among a model's arguments, or ones where tokens or their embeddings have none.

    None if there is neither. A mask of other dimensions is said in the log, and does not count.
    """
    mask = named.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return mask
    if mask is not None:
        kind = f"{mask.dim()} dimensions" if isinstance(mask, Tensor) else f"the type {type(mask).__name__}"
        logger.warning("attention_mask has %s, so all tokens are counted: a (batch, time) tensor tells padding", kind)
    inputs = (named.get("input_ids"), named.get("inputs_embeds"), *positional)
    for value in inputs:
        if isinstance(value, Tensor) and value.dim() == (3 if value.is_floating_point() else 2):
            return torch.ones(value.shape[:2], dtype=torch.bool, device=value.device)
    return None

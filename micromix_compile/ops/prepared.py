"""The cache of what weights become on a device: kept as long as they live and do not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from micromix_compile.changes.adapters import watch_merges
from micromix_compile.changes.versions import Snapshot
from micromix_compile.numerics import folding
from micromix_compile.numerics.layout import order_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_Value = TypeVar("_Value")


class Kept(Generic[_Value]):
    """What `make` made last, as long as the tensors that it depends on are the same and have not changed.

    guarded: the strides of those are guarded elsewhere, as those of a graph's inputs are. There are hundreds of weights
    in a model, and a decoding step waits until all of them have been looked at.
    """

    def __init__(self, make: Callable[..., _Value], *, guarded: bool = False) -> None:
        self._make = make
        self._holds = Snapshot.holds_in_graph if guarded else Snapshot.holds
        self._last: tuple[list[Snapshot], _Value] | None = None

    def of(self, keys: Sequence[Tensor], *args: Any) -> _Value:
        """make(*args), which depends on `keys`, of which there are as many at each call."""
        watch_merges()
        last, holds = self._last, self._holds
        if last is None or not all(holds(one, key) for one, key in zip(last[0], keys, strict=True)):
            self._last = last = None  # what was made before is let go before another is made
            last = ([Snapshot(key) for key in keys], self._make(*args))
            self._last = last  # one assignment: another thread may run the same graph with another layer's weights
        return last[1]


_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By scales or orders: what was made from them, which all graphs share."""


def folded_factors(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, *, fp6: str) -> tuple[Tensor, Tensor]:
    """(w_factor, w_row_scale) of a packed weight, kept as long as its scales live and do not change.

    Those of a layer's experts have one more dimension in front, as their weights have.
    """
    made: tuple[Tensor, Tensor] = _kept_for(w_scale, _make_factors).of([w_scale], w4, w6, w8, w_scale, fp6)
    return made


def short_order(channel_perm: Tensor) -> tuple[Tensor]:
    """(channel_perm as `order_dtype`,), kept as the factors are. Packed modules hold and save int32."""
    made: tuple[Tensor] = _kept_for(channel_perm, _shorten).of([channel_perm], channel_perm)
    return made


def _kept_for(key: Tensor, make: Callable[..., Any]) -> Kept[Any]:
    kept: Kept[Any] = _kept.setdefault(key, Kept(make))
    return kept


def _make_factors(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, fp6: str) -> tuple[Tensor, Tensor]:
    if w_scale.dim() == 3:
        each = [_make_factors(*one, fp6) for one in zip(w4, w6, w8, w_scale, strict=True)]
        return torch.stack([factor for factor, _ in each]), torch.stack([row for _, row in each])
    row_scale = folding.weight_row_scale(w4, w6, w8, w_scale, fp6)
    return folding.weight_factor(w4, w6, w8, w_scale, row_scale), row_scale


def _shorten(channel_perm: Tensor) -> tuple[Tensor]:
    return (channel_perm.to(order_dtype(channel_perm.shape[0]), copy=True),)

"""What packed weights become on a device, kept as long as they live and do not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch.utils.weak import WeakTensorKeyDictionary

from micromix_compile.changes.adapters import watch_merges
from micromix_compile.changes.versions import Snapshot
from micromix_compile.numerics import folding
from micromix_compile.numerics.layout import order_dtype

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

_Made = TypeVar("_Made", bound="tuple[Tensor, ...]")
_Value = TypeVar("_Value")

_kept: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By scales or orders: a snapshot of them, and what was made from them, which all graphs share."""


def folded_factors(w4: Tensor, w6: Tensor, w8: Tensor, w_scale: Tensor, *, fp6: str) -> tuple[Tensor, Tensor]:
    """(w_factor, w_row_scale) of a packed weight, kept as long as its scales live and do not change."""

    def make() -> tuple[Tensor, Tensor]:
        row_scale = folding.weight_row_scale(w4, w6, w8, w_scale, fp6)
        return folding.weight_factor(w4, w6, w8, w_scale, row_scale), row_scale

    return _keep(w_scale, make)


def short_order(channel_perm: Tensor) -> tuple[Tensor]:
    """(channel_perm as `order_dtype`,), kept as the factors are. Packed modules hold and save int32."""
    return _keep(channel_perm, lambda: (channel_perm.to(order_dtype(channel_perm.shape[0]), copy=True),))


def _keep(key: Tensor, make: Callable[[], _Made]) -> _Made:
    kept = _kept.get(key)
    if kept is None or not kept[0].holds(key):
        kept = (Snapshot(key), make())
        _kept[key] = kept
    made: _Made = kept[1]
    return made


class Kept(Generic[_Value]):
    """What `make` made last, as long as the tensors that it depends on are the same and have not changed.

    There are hundreds of weights in a model, and a decoding step waits until all of them have been looked at.
    """

    def __init__(self, make: Callable[..., _Value]) -> None:
        self._make = make
        self._last: tuple[list[Snapshot], _Value] | None = None

    def of(self, keys: Sequence[Tensor], *args: Any) -> _Value:
        """make(*args), which depends on `keys`, of which there are as many at each call."""
        watch_merges()
        last = self._last
        if last is None or not all(one.holds_in_graph(key) for one, key in zip(last[0], keys, strict=True)):
            self._last = last = None  # weights of before are let go before others are made
            last = ([Snapshot(key) for key in keys], self._make(*args))
            self._last = last  # one assignment: another thread may run the same graph with another layer's weights
        return last[1]

"""Merges of PEFT's adapters: they add to a weight through `.data`, which leaves no trace on it."""

from __future__ import annotations

import functools
import sys
from typing import TYPE_CHECKING, Any, Final

import torch

from micromix_compile.changes import versions

if TYPE_CHECKING:
    from collections.abc import Callable

_HOME: Final = "peft.tuners.tuners_utils"
_METHODS: Final = ("merge", "unmerge")
_watched: set[type] = set()


def watch_merges() -> None:
    """From the first call on after PEFT was imported, merging and unmerging count as writes to the merged weights.

    Asked before packed weights are used again; what was merged before is not known, so everything counts as written.
    """
    layers = sys.modules.get(_HOME)
    if layers is None or _watched:
        return
    base = getattr(layers, "BaseTunerLayer", None)
    if base is not None:
        _watch_class(base)
        base.__init_subclass__ = classmethod(lambda cls, **_: _watch_class(cls))
        versions.touch_all()


def _watch_class(cls: type[Any]) -> None:
    _watched.add(cls)
    for name in _METHODS:
        if name in vars(cls):
            setattr(cls, name, _then_touched(vars(cls)[name]))
    for subclass in cls.__subclasses__():
        _watch_class(subclass)


def _then_touched(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def run(layer: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return method(layer, *args, **kwargs)
        finally:
            if not torch.compiler.is_compiling():  # what a graph writes is seen in the graph
                versions.touch(layer.get_base_layer().parameters())

    return run

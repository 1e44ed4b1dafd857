"""Targets of a test's own, in the place of a device's."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

from micromix_compile.targets.target import FOLDED, Device, Row, Target, register_target

if TYPE_CHECKING:
    from collections.abc import Iterator

FOLDING: Final = Target(name="folding", passes=FOLDED)
"""Products fold, and plain PyTorch computes them."""


@contextlib.contextmanager
def served_by(target: Target, device: str = "cpu") -> Iterator[None]:
    """All devices of a type are served by `target`, but not what must be exact by one that folds."""

    def serves(asked: Device) -> bool:
        return asked.type == device and not (asked.exact and target.takes == "folded")

    remove = register_target(Row(serves=serves, target=lambda _: target))
    try:
        yield
    finally:
        remove()

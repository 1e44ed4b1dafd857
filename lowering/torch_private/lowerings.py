"""Inductor's IR and lowerings, and sizes that it compiles for."""

from __future__ import annotations

import sys
from typing import Any

from torch._inductor import config, ir
from torch._inductor.lowering import fallback_handler, lowerings, register_lowering
from torch._inductor.virtualized import V

from micromix_compile.lowering.torch_private.tracing import free_unbacked_symbols

__all__ = [
    "UNKNOWN_ROWS",
    "V",
    "config",
    "fallback_handler",
    "ir",
    "is_at_least",
    "lowerings",
    "register_lowering",
    "size_hint",
]

UNKNOWN_ROWS = 4096
"""Taken for a dimension that depends on data: a large tile is right for any size, a small one slow for many."""


def size_hint(sizevars: Any, size: Any) -> int:
    """A likely value of a dimension that Inductor compiles for, symbolic or not."""
    return int(sizevars.optimization_hint(size, fallback=UNKNOWN_ROWS))


def is_at_least(sizevars: Any, size: Any, least: int) -> bool | None:
    """Whether a symbolic dimension is at least `least`; a guard then has other code compiled where it is otherwise.

    None, and no guard, if it depends on data or has an upper bound: whoever declared one does not want it narrowed.
    """
    if free_unbacked_symbols(size) or sizevars.shape_env.bound_sympy(size).upper < sys.maxsize - 1:
        return None
    return bool(sizevars.evaluate_expr(size >= least))

"""What to say where torch is not as this package knows it."""

from __future__ import annotations

import torch


def changed(expected: str) -> RuntimeError:
    """The error for a torch in which `expected`, a part of it, is not there or not so."""
    return RuntimeError(f"torch {torch.__version__} is not one that micromix-compile knows: expected {expected}")

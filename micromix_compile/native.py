"""The compiled CPU kernels: built once per machine, kept in the user's cache, loaded on first use."""

from __future__ import annotations

from torch import Tensor


def takes_over(x: Tensor) -> bool:
    """Whether compiled kernels now serve tensors such as `x`; builds and loads them the first time it is asked."""
    return False

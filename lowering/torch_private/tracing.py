"""Tracing functions to graphs, and what is known of symbolic sizes."""

from __future__ import annotations

from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, statically_known_true

__all__ = ["free_unbacked_symbols", "make_fx", "statically_known_true"]

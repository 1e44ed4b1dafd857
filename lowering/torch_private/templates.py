"""Inductor's Triton templates, and choosing between kernels."""

from __future__ import annotations

from typing import Any

from torch._inductor.select_algorithm import (
    SymbolicGridFn,
    TritonTemplate,
    TritonTemplateKernel,
    autotune_select_algorithm,
)

__all__ = ["SymbolicGridFn", "TritonTemplate", "TritonTemplateKernel", "select_algorithm"]


def select_algorithm(name: str, choices: list[Any], inputs: list[Any], layout: Any) -> Any:
    """The fastest of Inductor's choices for an operation, or the only one without a measurement."""
    selected = autotune_select_algorithm(name, choices, inputs, layout)
    return selected[0] if isinstance(selected, tuple) else selected  # (node, choice) from 2.12 on

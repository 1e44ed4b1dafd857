"""What AOTInductor's packages can't hold."""

from __future__ import annotations

import sys

import torch
from torch.torch_version import TorchVersion

FIRST = "2.12"
"""The torch whose packages hand an operation the dtype that it was given, float32 as float32 (pytorch#173562)."""


def check_package() -> None:
    """Call it from the fake implementation of an operation that takes a dtype.

    Raises RuntimeError while an older torch makes a package: it would say float64 for float32, and float32 for float16.
    """
    virtualized = sys.modules.get("torch._inductor.virtualized")
    is_package = virtualized is not None and getattr(virtualized.V.graph, "aot_mode", False)
    if is_package and TorchVersion(torch.__version__) < FIRST:
        raise RuntimeError(
            f"packages of AOTInductor need torch {FIRST} or newer, this is {torch.__version__}: older ones hand "
            f"operations other dtypes than they were given"
        )

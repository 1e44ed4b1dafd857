"""micromix doctor, and micromix --version."""

from __future__ import annotations

import platform

import torch
from support.command_line import run_well

import micromix_compile as micromix


def test_doctor_names_what_matters() -> None:
    """Versions, the backend, the kernels, the caches."""
    out = run_well("doctor")
    for word in (
        "torch",
        "transformers",
        "vector_isa",
        "backend",
        "registered",
        "runs on cpu",
        "native",
        "model cache",
    ):
        assert word in out
    assert not [line for line in out.splitlines() if len(line.split("  ", 1)) < 2], "every row has a value"


def test_version_says_what_matters_in_a_line() -> None:
    """Of the package, of torch and of Python."""
    out = run_well("--version")
    assert out == f"micromix {micromix.__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"

"""Versions and hardware."""

from __future__ import annotations

import torch

from micromix_compile.evaluation.machine import hardware, versions


def test_versions_and_hardware_name_what_produced_a_number() -> None:
    """Without these a perplexity can't be reproduced."""
    assert versions()["torch"] == torch.__version__
    assert {"cpu", "threads", "vector_isa"} <= set(hardware())
    assert hardware()["cpu"]

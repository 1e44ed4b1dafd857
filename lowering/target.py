"""What a device will run: one answer for backend, report and doctor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from micromix_compile import native

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """name: for people. emulated: why the work runs as plain PyTorch tensor operations, or None if it doesn't."""

    name: str
    emulated: str | None


def target_of(device: torch.device) -> Target:
    """What runs on `device`. On a CPU this builds and loads the compiled kernels if they aren't yet."""
    if device.type != "cpu":
        return Target(name=device.type, emulated="this version has compiled kernels for CPUs only")
    if native.load():
        return Target(name=f"cpu ({native.status().isa})", emulated=None)
    return Target(name="cpu (plain PyTorch)", emulated=native.status().reason)

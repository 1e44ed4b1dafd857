"""What a device will run: the one answer for ops, lowerings, backend, report and doctor."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

import torch

from micromix_compile.targets import native
from micromix_compile.targets.tiles import FAMILIES, Family, family_of

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What serves the ops on one device.

    name: for people. emulated: why the work runs as plain PyTorch tensor operations, or None if it doesn't.
    family: which Triton kernels run, None where none do.
    """

    name: str
    emulated: str | None
    family: Family | None = None


def target_of(device: torch.device) -> Target:
    """What runs on `device`. On a CPU this builds and loads the compiled kernels if they aren't yet."""
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        return _gpu_target(index)
    if device.type != "cpu":
        return Target(name=device.type, emulated="there are kernels for CPUs and for CUDA devices")
    if native.load():
        return Target(name=f"cpu ({native.status().isa})", emulated=None)
    return Target(name="cpu (plain PyTorch)", emulated=native.status().reason)


def triton_family(x: Tensor) -> Family | None:
    """The family whose Triton kernels serve tensors like `x`, None where plain PyTorch or a CPU kernel does."""
    return target_of(x.device).family if x.is_cuda else None


@cache
def _gpu_target(index: int) -> Target:
    model = torch.cuda.get_device_name(index)
    if importlib.util.find_spec("triton") is None:
        return Target(name=model, emulated="Triton is not installed")
    # On another vendor's GPU the same numbers mean other things.
    capability = torch.cuda.get_device_capability(index) if torch.version.hip is None else None
    name = family_of(capability)
    if name is None:
        assert capability is not None, "a GPU of another vendor runs the bfloat16 kernels"
        compute = ".".join(map(str, capability))
        return Target(name=model, emulated=f"compute capability {compute} has no bfloat16 MMA, 8.0 is the least")
    family = FAMILIES[name]
    return Target(name=f"{model} ({name}: {family.mma})", emulated=None, family=family)

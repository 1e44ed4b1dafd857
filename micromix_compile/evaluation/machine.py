"""What produced a number: versions and hardware, without which it can't be reproduced."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Final

import torch

_VERSIONED: Final = ("micromix-compile", "transformers", "triton", "numpy")


def versions() -> dict[str, str]:
    """Python's and the packages' versions, torch's with its build; packages that aren't installed are left out."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """What this machine computes on: processor, threads, vector instructions, GPU."""
    found = {
        "cpu": _cpu_name(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

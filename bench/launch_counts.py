"""Which kernels a call launches on the GPU, and how long each kind of them takes."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Callable


def launches(run: Callable[[], object]) -> tuple[Counter[str], dict[str, float]]:
    """Kernels that `run` launches, and the milliseconds that the GPU is at them, by kind.

    A profiler may leave launches slower than they were: what is timed by the clock comes first.
    """
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    counts: Counter[str] = Counter()
    busy: dict[str, float] = {}
    for event in profile.events():
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset")):
            what = kind(event.name)
            counts[what] += 1
            busy[what] = busy.get(what, 0.0) + event.time_range.elapsed_us() / 1e3
    return counts, busy


def kind(name: str) -> str:
    """What a kernel is, from its name; Inductor names its pointwise kernels and reductions for our ops, too."""
    for part, meaning in (
        ("triton_poi_", "other Triton"),
        ("triton_red_", "other Triton"),
        ("triton_per_", "other Triton"),
        ("triton_for_", "other Triton"),
        ("reorder_quantize", "quantize"),
        ("reorder_fold", "quantize"),
        ("mixed_mx_mm", "mixed matmul"),
        ("folded_mm", "mixed matmul"),
        ("expand_weight", "expand"),
        ("triton_", "other Triton"),
    ):
        if part in name:
            return meaning
    return "attention" if any(word in name.lower() for word in ("flash", "fmha", "attention")) else "library"

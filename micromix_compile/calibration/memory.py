"""Running out of memory, said with the step that did and what would take less."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Final

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


OBSERVING: Final = (
    "calibrating, which runs batches forward and keeps K * K numbers a group of linears",
    "take shorter batches or fewer sequences in each, or weight_rounding='nearest' with scale_search=False, which "
    "keeps no such numbers",
)
SENSITIVITY: Final = (
    "measuring sensitivity, which runs batches forward and backward",
    "take shorter batches or fewer sequences in each, or weight_rounding='gptq' with a policy other than 'budget', "
    "which need no gradient",
)
ROUNDING: Final = (
    "rounding weights",
    "take weight_rounding='nearest' with scale_search=False, which rounds no weight while calibrating",
)
"""Steps, each with what would take less memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that a device, or the host, has no memory left."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)  # torch's, on a CPU


@contextlib.contextmanager
def naming_out_of_memory(step: str, remedy: str) -> Iterator[None]:
    """Let other errors pass. Raises torch.OutOfMemoryError that names `step` and `remedy`, on a CPU as well."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise torch.OutOfMemoryError(f"out of memory while {step}: {remedy} ({error})") from error

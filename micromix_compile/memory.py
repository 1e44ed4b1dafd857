"""Running out of memory, said with the step that did and what would take less."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


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

"""Whether a tensor is still what it was when something was made from it.

    snapshot = Snapshot(weight)
    ...
    if not snapshot.holds(weight):      # another tensor, or written to since
        ...

Seen are torch's own in-place operations, another storage or layout given through `.data`, every step of a
`torch.optim.Optimizer` (fused kernels do not move a tensor's version), and merges of PEFT's adapters (see `adapters`).
A write through `.data`, a NumPy view or DLPack, to an inference tensor, or in a CUDA graph that is replayed, leaves no
trace: `refresh` makes up for that.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch.optim import Optimizer


class _Edits:
    """How often a tensor was said to be written to; all snapshots of it look at one of these."""

    __slots__ = ("__weakref__", "count")

    def __init__(self) -> None:
        self.count = 0


_edits: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""By tensors of which there is a snapshot."""


class Snapshot:
    """What `tensor` was when this was made. It keeps neither the tensor nor its memory alive."""

    __slots__ = ("_count", "_data_ptr", "_edits", "_is_inference", "_storage", "_stride", "_tensor", "_version")

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = ref(tensor)
        self._edits: _Edits = _edits.setdefault(tensor, _Edits())
        self._count = self._edits.count
        self._is_inference = tensor.is_inference()
        self._version = 0 if self._is_inference else tensor._version
        # Memory that was freed may be given out again at the same address.
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._data_ptr = tensor.data_ptr()
        self._stride = tensor.stride()

    def holds(self, tensor: Tensor) -> bool:
        """Whether `tensor` is the same one and was not written to, as far as that can be seen."""
        return self.holds_in_graph(tensor) and tensor.stride() == self._stride

    def holds_in_graph(self, tensor: Tensor) -> bool:
        """`holds` of a compiled graph's input, whose strides are guarded. Hundreds are asked at each decoding step."""
        return (
            self._tensor() is tensor
            and self._edits.count == self._count
            and tensor.data_ptr() == self._data_ptr
            and not self._storage.expired()
            and (self._is_inference or tensor._version == self._version)
        )


def touch(tensors: Iterable[Tensor]) -> None:
    """Let no snapshot of `tensors` hold any longer."""
    for tensor in tensors:
        edits = _edits.get(tensor)
        if edits is not None:
            edits.count += 1


def touch_all() -> None:
    """Let no snapshot of any tensor hold any longer."""
    touch(list(_edits.keys()))


def refresh(model: nn.Module) -> None:
    """Have everything that was made from the model's weights made anew at its next call.

    Only needed after writes that leave no trace: through `weight.data`, a NumPy view or DLPack of a weight, to weights
    that are inference tensors, or by replaying a CUDA graph that holds an optimizer's step. Costs nothing where the
    weights turn out to be the ones that were calibrated. Raises TypeError if `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(model).__name__}")
    touch(model.parameters())
    touch(model.buffers())


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _after_step(optimizer: Optimizer, *_: Any) -> None:
    for group in optimizer.param_groups:
        touch(group["params"])


register_optimizer_step_post_hook(_after_step)

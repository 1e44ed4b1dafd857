"""Tensors that are fake or wrap others, the identity of memory, a GPU's current stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.conv import _ConvNd
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "DisableTorchFunctionSubclass", "current_device", "is_convolution", "is_fake", "make_wrapper", "memory_id",
    "raw_stream", "tree_map_only",
]  # fmt: skip

_Wrapper = TypeVar("_Wrapper", bound=Tensor)


def is_fake(value: object) -> bool:
    """Whether it is a tensor without memory, as compilers trace with."""
    return isinstance(value, FakeTensor)


def make_wrapper(cls: type[_Wrapper], shape: Sequence[int], dtype: torch.dtype, device: torch.device) -> _Wrapper:
    """An instance of a subclass that has no memory of its own."""
    wrapper: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
    assert isinstance(wrapper, cls), "that is what it makes"
    return wrapper


def memory_id(tensor: Tensor) -> int:
    """A number that tensors share whose elements lie in one piece of memory."""
    return int(tensor.untyped_storage()._cdata)


def current_device() -> int:
    """The number of the current GPU; torch.cuda, which looks first whether it is initialized, takes longer to say."""
    return int(torch._C._cuda_getDevice())


def raw_stream(device: int) -> int:
    """The driver's handle of a GPU's current stream, without the object around it that torch.cuda makes."""
    return int(torch._C._cuda_getCurrentRawStream(device))


def is_convolution(module: nn.Module | None) -> bool:
    """Of any number of dimensions, transposed ones included."""
    return isinstance(module, _ConvNd)

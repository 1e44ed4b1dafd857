"""The weight of a packed linear, for code that reads `module.weight`: dequantized where its values are read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.tensors import DisableTorchFunctionSubclass, make_wrapper, tree_map_only

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

_READ_ONLY: Final = (
    "the weight of a packed linear can't be written to: it is dequantized for each reader, so a write (merging an "
    "adapter, say) would be lost. Change the model that it was packed from, or keep the adapter beside it"
)
_OF_MEMORY: Final = (
    "__array__", "__deepcopy__", "__dlpack__", "__reduce_ex__", "__repr__", "data_ptr", "item", "numpy", "storage",
    "tolist", "untyped_storage",
)  # fmt: skip
"""Methods of Tensor that read memory without an operation."""


class DequantizedWeight(Tensor):
    """(N, C), read-only. Knows its shape, dtype and device; every operation on it gets what `make` returns.

    Being a subclass with a `__torch_function__`, it also keeps modules of torch from handing it to fused kernels that
    would take a packed linear for a plain one. Raises RuntimeError where it is written to.
    """

    _make: Callable[[], Tensor]

    def __new__(
        cls, make: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> Self:
        """make: returns the tensor of this shape and dtype on this device."""
        weight = make_wrapper(cls, shape, dtype, device)
        weight._make = make
        return weight

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What is not an operation: `.data`, and methods that read memory."""
        if func == Tensor.data.__set__:  # type: ignore[attr-defined]
            raise RuntimeError(_READ_ONLY)
        if func == Tensor.data.__get__:  # type: ignore[attr-defined]
            return args[0]
        if func.__name__ in _OF_MEMORY:
            args = _made(args)
        with DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Every operation, on plain tensors."""
        if func is torch.ops.aten.detach.default:
            return cls(args[0]._make, args[0].shape, args[0].dtype, args[0].device)
        named = dict(kwargs or {})
        parameters = func._schema.arguments
        given = {**dict(zip((parameter.name for parameter in parameters), args, strict=False)), **named}
        for parameter in parameters:
            is_written = parameter.alias_info is not None and parameter.alias_info.is_write
            if is_written and isinstance(given.get(parameter.name), cls):
                raise RuntimeError(_READ_ONLY)
        return func(*_made(args), **_made(named))


def _made(tree: Any) -> Any:
    return tree_map_only(DequantizedWeight, lambda weight: weight._make(), tree)

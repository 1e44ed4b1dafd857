"""Convolutions of kernel size 1: each place is multiplied by one matrix (N, C), as a linear multiplies each token."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch import Tensor, nn

from micromix_compile.linear.packed import MicroMixLinear

if TYPE_CHECKING:
    from collections.abc import Callable

POINTWISE: Final = (nn.Conv1d, nn.Conv2d)
"""The classes that are taken; a user's subclass may do anything."""


def why_not_pointwise(module: nn.Module | None) -> str | None:
    """Why a convolution is no linear at each place, or None if it is one."""
    if type(module) not in POINTWISE:
        return f"it is a {type(module).__module__}.{type(module).__qualname__}, not an nn.Conv1d or nn.Conv2d"
    assert isinstance(module, POINTWISE), "that is its type"
    for name, value, wanted in (
        ("kernel_size", module.kernel_size, 1), ("stride", module.stride, 1), ("padding", module.padding, 0),
        ("groups", (module.groups,), 1),
    ):  # fmt: skip
        if not isinstance(value, str) and any(one != wanted for one in value):  # of one place "same" pads nothing
            return f"it is a convolution with {name} {value if name != 'groups' else module.groups}, not {wanted}"
    return None


class MicroMixConvolution(MicroMixLinear):
    """A convolution of kernel size 1 that holds packed weights only, as a `MicroMixLinear` does.

    dims: how many dimensions of places there are, 1 or 2. weight: (N, C, 1) or (N, C, 1, 1).

    forward: (B, C, *places) or (C, *places) float -> the same with N for C, contiguous where an nn.Conv1d's or
    nn.Conv2d's result is: of one dimension of places always, of two where the input is. Raises ValueError for another
    rank or C.
    """

    def __init__(self, *, dims: int, **fields: Any) -> None:
        """fields: those of `MicroMixLinear`."""
        super().__init__(**fields)
        self.dims = dims
        self.in_channels, self.out_channels = self.in_features, self.out_features

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """As a convolution has it."""
        return (*super().weight_shape, *(1 for _ in range(self.dims)))

    def _dequantize(self) -> Tensor:
        return super()._dequantize().reshape(self.weight_shape)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if x.dim() not in (self.dims + 1, self.dims + 2):
            raise ValueError(f"x must have {self.dims + 1} or {self.dims + 2} dimensions, got shape {tuple(x.shape)}")
        out = super().forward(x.movedim(-1 - self.dims, -1)).movedim(-1, -1 - self.dims)
        return out.contiguous() if self.dims == 1 or x.is_contiguous() else out


def packed_class(module: nn.Module) -> Callable[..., MicroMixLinear]:
    """What makes the packed linear that may stand in for a linear module, or for a convolution."""
    if isinstance(module, POINTWISE):
        return partial(MicroMixConvolution, dims=len(module.kernel_size))
    return MicroMixLinear

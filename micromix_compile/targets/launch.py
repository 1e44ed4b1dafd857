"""A launch of a Triton kernel as data, and the means to run one.

What builds a `KernelCall` needs only shapes, dtypes and strides, of which the number of rows may be symbolic: the same
calls run on a GPU or in Triton's interpreter, become part of Inductor's graphs, and are compiled for GPUs that aren't
here. Triton is imported at the first launch.
"""

from __future__ import annotations

import contextlib
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile.numerics.formats import ELEM_FORMATS
from micromix_compile.numerics.layout import block_counts

if TYPE_CHECKING:
    from collections.abc import Mapping
    from contextlib import AbstractContextManager

    from torch import Tensor

    from micromix_compile.numerics.layout import Split

FORMATS_DIGEST = hashlib.sha256(repr(ELEM_FORMATS).encode()).hexdigest()
"""`FORMATS` of kernels that read the table, which Triton's cache would not see otherwise."""


@dataclass(frozen=True, kw_only=True, slots=True)
class KernelCall:
    """One launch of a Triton kernel.

    kernel: the `triton.jit` function. grid: one to three extents; the quantizers' first is M, which may be symbolic.
    args: run-time arguments by name, tensors and integers. constexprs: compile-time arguments by name. num_stages: 0
    for the compiler's choice. fuses: whether the compiler may make one rounding of a product and a sum. asserts:
    whether the kernel's assertions are compiled; a failing one ends the process's use of the GPU.
    """

    kernel: Any
    grid: tuple[Any, ...]
    args: Mapping[str, Any]
    constexprs: Mapping[str, Any]
    num_warps: int
    num_stages: int = 0
    fuses: bool = True
    asserts: bool = False

    @property
    def launch_pdl(self) -> bool:
        """Whether the kernel may start while the one before it runs, see `templates.triton.ahead`."""
        return bool(self.constexprs.get("LAUNCH_PDL", False))

    def launch(self) -> None:
        """Run on the current stream of the current device."""
        import triton

        options: dict[str, Any] = {"num_warps": self.num_warps}
        if self.num_stages:
            options["num_stages"] = self.num_stages
        if not self.fuses:
            options["enable_fp_fusion"] = False
        if self.asserts:  # without those of Triton's own on each sum of integers
            options |= {"debug": True, "sanitize_overflow": False}
        if self.launch_pdl and not triton.knobs.runtime.interpret:  # the interpreter has no such option
            options["launch_pdl"] = True
        self.kernel[self.grid](**self.args, **self.constexprs, **options)

    def launch_on(self, x: Tensor) -> None:
        """Run on the current stream of x's device."""
        with current_device(x):
            self.launch()


def current_device(x: Tensor) -> AbstractContextManager[object]:
    """Makes x's GPU the current device; nothing for a CPU tensor, which Triton's interpreter takes."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def unit_column_stride(x: Tensor) -> Tensor:
    """x, or a copy if its rows are not contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def odd(blocks: int) -> int:
    """A number of blocks as one that no compiler specializes a kernel on."""
    return 2 * blocks + 3


def odd_blocks(split: Split) -> dict[str, int]:
    """The blocks of each segment as such numbers."""
    return {name: odd(blocks) for name, blocks in zip(("odd4", "odd6", "odd8"), block_counts(split), strict=True)}

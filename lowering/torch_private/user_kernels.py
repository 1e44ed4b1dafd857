"""Launches of Triton kernels in a graph that Inductor lowers, as if a model had written them."""

from __future__ import annotations

import contextlib
import copy
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from torch._higher_order_ops import triton_kernel_wrap
from torch._inductor.ir import UserDefinedTritonKernel
from torch._inductor.lowering import lowerings
from torch._inductor.virtualized import V

from micromix_compile.lowering.torch_private.changed import changed

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

KERNEL_OPTIONS: Final = "triton_meta={"
"""How the options of Inductor's decorator begin in the text of a generated kernel."""

ANALYSES: Final = ("identify_accessed_tensors", "identify_mutated_tensors")
"""What finds out which arguments a kernel writes: the former from 2.13 on, whose result speaks of names only."""


def lower_kernel_launch(
    kernel: Any, grid: Sequence[Any], args: Mapping[str, Any], constexprs: Mapping[str, Any]
) -> None:
    """Add one launch of a user-defined Triton kernel to the graph that Inductor is lowering.

    args: nodes of its IR and integers by name, those that the kernel writes included. grid: up to three extents.
    With a constant LAUNCH_PDL it is launched with that option of Triton's, which Inductor's C++ wrapper lacks.
    """
    side_table = triton_kernel_wrap.kernel_side_table
    with _analysed_once(kernel, args, constexprs):
        lowerings[triton_kernel_wrap.triton_kernel_wrapper_mutation](
            kernel_idx=side_table.add_kernel(kernel),
            constant_args_idx=side_table.add_constant_args(dict(constexprs)),
            grid=[(*grid, 1, 1)[:3]],
            tma_descriptor_metadata={},
            kwargs=dict(args),
        )
    if constexprs.get("LAUNCH_PDL"):
        last = V.graph.operations[-1]
        assert isinstance(last, UserDefinedTritonKernel), "the launch is the last operation of the graph"
        node: Any = last
        node.codegen = partial(_generate_with_pdl, node.codegen)


def _generate_with_pdl(generate: Callable[[Any], None], wrapper: Any) -> None:
    """Generate a launch and, the first time, its kernel with the option that Inductor gives only kernels of its own."""
    define = wrapper.define_kernel

    def define_with_pdl(name: str, body: str, *rest: Any, **options: Any) -> None:
        if KERNEL_OPTIONS not in body:
            raise changed(f"{KERNEL_OPTIONS!r} in the code that Inductor generates for a kernel, here of {name}")
        define(name, body.replace(KERNEL_OPTIONS, KERNEL_OPTIONS + "'launch_pdl': True, ", 1), *rest, **options)

    wrapper.define_kernel = define_with_pdl
    try:
        generate(wrapper)
    finally:
        wrapper.define_kernel = define


_analyses: dict[Hashable, Any] = {}


@contextlib.contextmanager
def _analysed_once(kernel: Any, args: Mapping[str, Any], constexprs: Mapping[str, Any]) -> Iterator[None]:
    """Within it Inductor finds out what a kernel writes once for all launches that compile to the same code.

    It compiles the kernel to Triton's IR for that, at every launch: half of the time that a model of many layers takes.
    """
    name = next((name for name in ANALYSES if hasattr(triton_kernel_wrap, name)), None)
    if name is None:
        raise changed(f"{' or '.join(ANALYSES)} in {triton_kernel_wrap.__name__}")
    key = (kernel, *sorted(constexprs.items()), *((arg, _kind(value)) for arg, value in args.items()))
    analyse = getattr(triton_kernel_wrap, name)

    def remembered(kernel: Any, kwargs: Mapping[str, Any], *rest: Any) -> Any:
        if key not in _analyses:
            # What it does not know it takes for writing to every argument.
            unknown = {"LAUNCH_PDL": False} if "LAUNCH_PDL" in kwargs else {}
            _analyses[key] = analyse(kernel, {**kwargs, **unknown}, *rest)
        return copy.copy(_analyses[key])

    setattr(triton_kernel_wrap, name, remembered)
    try:
        yield
    finally:
        setattr(triton_kernel_wrap, name, analyse)


def _kind(value: Any) -> Hashable:
    """What Triton's code for a run-time argument depends on."""
    if isinstance(value, int):
        return ("int", value == 1, -(2**31) <= value < 2**31)
    return value if value is None else (type(value), value.get_dtype() if hasattr(value, "get_dtype") else None)

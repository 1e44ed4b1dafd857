"""The persistent Gluon kernels as something to compile, for a GPU that is here or not: types, constants, options."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from micromix_compile.targets.gluon_tiles import GluonKernel

CONSUMER_WARPS: Final = 4
CAPABILITY: Final = 90
FIRST_TRITON: Final = (3, 6)
LAST_TRITON: Final = (3, 8)
"""Versions of Triton whose Gluon compiles the kernel; run was 3.6.0."""

NUMBERS: Final = (
    "M", "N0", "N1", "N2", "tiles0", "tiles1", "column_tiles", "whole", "blocks4", "blocks6", "blocks8",
)  # fmt: skip
"""The kernel's integers. It is not specialized on any."""

EXPERT_NUMBERS: Final = ("R", "N", "E", "column_tiles", "words", "blocks4", "blocks6", "blocks8")
"""Those of the kernel of experts."""


class Box(NamedTuple):
    """What TMA copies at a time: an element type, (rows, columns), bytes of the swizzle in shared memory."""

    dtype: str
    rows: int
    columns: int
    swizzle: int

    @property
    def bits(self) -> int:
        """Of an element."""
        return {"fp8e4nv": 8, "i32": 32}[self.dtype]

    @property
    def signature(self) -> str:
        """As Triton names a descriptor's type."""
        layout = f"NVMMASharedLayout(swizzle_byte_width={self.swizzle}, element_bitwidth={self.bits}, rank=2, "
        layout += "transposed=False, fp4_padded=False, cga_layout=[])"
        return f"tensordesc<{self.dtype}[{self.rows}, {self.columns}],{layout}>"


def boxes_of(kernel: GluonKernel) -> dict[str, Box]:
    """Of each descriptor, those of a weight named once."""
    tile = kernel.tile
    return {
        "x": Box("fp8e4nv", tile.BLOCK_M, 128, 128),
        "w4": Box("i32", tile.BLOCK_N, 32, 128),
        "w6": Box("i32", tile.BLOCK_N, 8, 32),
        "w8": Box("i32", tile.BLOCK_N, 32, 128),
        "w_factor": Box("i32", 2, tile.BLOCK_N, 0),
    }


def parameters_of(kernel: GluonKernel) -> dict[str, str]:
    """Type of each of the kernel's run-time arguments, in its order. Of weights beyond the group there are none."""
    if kernel.EXPERTS:
        return _parameters_of_experts(kernel)
    boxes = boxes_of(kernel)
    types = {"x": boxes["x"].signature}

    def of_each(name: str, kind: str) -> None:
        types.update({f"{name}_{i}": kind for i in range(kernel.GROUPS)})

    for name in ("w4", "w6", "w8", "w_factor"):
        of_each(name, boxes[name].signature)
    of_each("out", "*bf16")
    types["x_row_scale"] = "*fp32"
    of_each("w_row_scale", "*fp32")
    if kernel.HAS_BIAS:
        of_each("bias", "*bf16")
    return types | {"partial": "*fp32", "locks": "*i32"} | dict.fromkeys(NUMBERS, "i32")


def _parameters_of_experts(kernel: GluonKernel) -> dict[str, str]:
    types = {name: box.signature for name, box in boxes_of(kernel).items()}
    types |= {"out": "*bf16", "x_row_scale": "*fp32", "offs": "*i32", "w_row_scale": "*fp32"}
    if kernel.HAS_BIAS:
        types["bias"] = "*bf16"
    return types | dict.fromkeys(EXPERT_NUMBERS, "i32")


@cache
def refusal() -> str | None:
    """Why the kernel can't be compiled with the Triton that is installed, or None if it can."""
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton's interpreter, which is on, has no Gluon"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not FIRST_TRITON <= version <= LAST_TRITON:
        first, last = (".".join(map(str, one)) for one in (FIRST_TRITON, LAST_TRITON))
        return f"the Gluon kernel is known to compile with Triton {first} to {last}, this is {triton.__version__}"
    return None


def compile_kernel(kernel: GluonKernel) -> Any:
    """Triton's compiled kernel, from its cache if it is there."""
    import triton
    from triton.backends.compiler import GPUTarget

    options = {"num_warps": CONSUMER_WARPS, "maxnreg": kernel.tile.max_registers}
    return triton.compile(_source(kernel), target=GPUTarget("cuda", CAPABILITY, 32), options=options)


def _source(kernel: GluonKernel) -> Any:
    """Triton's description of what to compile: pointers are aligned, and no integer is known."""
    from triton.experimental.gluon._runtime import GluonASTSource

    from micromix_compile.templates.gluon.folded_mm import folded_mm_rows_kernel
    from micromix_compile.templates.gluon.grouped_mm import grouped_mm_rows_kernel
    from micromix_compile.templates.gluon.language import Constants

    function = grouped_mm_rows_kernel if kernel.EXPERTS else folded_mm_rows_kernel
    names, types = list(function.arg_names), parameters_of(kernel)
    absent: dict[str, Any] = {name: None for name in names if name not in types}
    constants = absent | {"C": Constants(kernel)}  # type: ignore[no-untyped-call]
    pointers = [name for name, kind in types.items() if kind.startswith("*")]
    return GluonASTSource(
        function,
        {name: types.get(name, "constexpr") for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in pointers},
    )

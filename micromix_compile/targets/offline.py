"""Compile the Triton kernels for GPUs that aren't here; `ptx` reads in the results what they would run.

Triton compiles for any GPU it knows without having one, but not in a process that runs its interpreter, and it keeps
state: `compile_all` therefore works in processes of its own.

    python -m micromix_compile.targets.offline    reads a JSON list of kernels, writes a JSON list of results
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from micromix_compile.numerics.folding import LOCKS, FoldedActivation, factor_shape, fold_width
from micromix_compile.numerics.layout import (
    PackedWeight,
    activation_shapes,
    activation_split,
    packed_shapes,
    weight_split,
)
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.exact import mixed_mx_mm_call
from micromix_compile.targets.folded_tiles import Parts, tiles_of
from micromix_compile.targets.grouped import grouped_folded_mm_call, grouped_mx_mm_call
from micromix_compile.targets.hopper import folded_mm_call
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.ptx import Compiled, inspect_binary

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.folded_tiles import FoldedTile
    from micromix_compile.targets.launch import KernelCall
    from micromix_compile.targets.tiles import MixedTiles, Tile

DEFAULT_STAGES: Final = 3
"""Triton's own, where a launch leaves them to it."""

MANY_ROWS: Final = 256
SPLIT: Final = (3072, 832, 192)
"""Channels per format where nothing else is asked for. No kernel is specialized on them."""

_POINTERS: Final = {
    torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.float16: "*fp16", torch.uint8: "*u8", torch.int16: "*i16",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel to compile, as plain data.

    function: "module:name" of a `triton.jit` function. capability: ten times the major plus the minor number of the
    GPU's compute capability. tensors: type of each pointer ("*u8"). integers: value of each other run-time argument, on
    which Triton may specialize the kernel. constexprs: value of each compile-time argument.
    """

    function: str
    capability: int
    tensors: Mapping[str, str]
    integers: Mapping[str, int]
    constexprs: Mapping[str, bool | int | float | str | None]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class NotSupported:
    """The installed Triton or its ptxas cannot compile for the target. reason: a sentence that names the version."""

    target: str
    reason: str


def target_name(capability: int) -> str:
    """The target that Triton compiles for: with architecture-specific instructions from sm_90 on."""
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


def kernel_of(call: KernelCall, capability: int) -> Kernel:
    """A launch as what Triton would compile for it. Its tensors may be on any device, "meta" too."""
    assert call.fuses, "what is compiled here may fuse"
    function = call.kernel.fn  # the kernel itself may be interpreted
    return Kernel(
        function=f"{function.__module__}:{function.__name__}",
        capability=capability,
        tensors={name: _POINTERS[value.dtype] for name, value in call.args.items() if isinstance(value, Tensor)},
        integers={name: value for name, value in call.args.items() if isinstance(value, int)},
        constexprs={**call.constexprs, **{name: None for name, value in call.args.items() if value is None}},
        num_warps=call.num_warps,
        num_stages=call.num_stages or DEFAULT_STAGES,
    )


def mixed_mx_mm(
    capability: int, tile: Tile, tiles: MixedTiles, *, w_fp4: bool = False, fp6: str = "e2m3", x_swizzled: bool = False,
    w_swizzled: bool = False, bias: bool = True, out_dtype: torch.dtype = torch.bfloat16, columns: int = 4096,
    split: Split = SPLIT, activations: str = "same",
) -> Kernel:  # fmt: skip
    """The mixed matmul with one tile. out_dtype: of bias and output. The number of rows makes no difference."""
    x_shapes = activation_shapes(MANY_ROWS, activation_split(split, activations))
    x = QuantizedActivation(*(_meta(*shape) for shape in x_shapes))
    w_split = weight_split(split, "mxfp4" if w_fp4 else "same")
    w = PackedWeight(*(_meta(*shape) for shape in packed_shapes(columns, w_split)))
    tile_of_scales = _meta(1, 1, 512)  # of `packing.swizzle_scale`
    call = mixed_mx_mm_call(
        x._replace(scale=tile_of_scales) if x_swizzled else x,
        w._replace(w_scale=tile_of_scales) if w_swizzled else w,
        _meta(columns, dtype=out_dtype) if bias else None,
        _meta(MANY_ROWS, columns, dtype=out_dtype),
        fp6=fp6,
        tiles=tiles,
        tile=tile,
    )
    return kernel_of(call, capability)


def folded_mm(
    capability: int, tile: FoldedTile, *, fp6: str = "e2m3", groups: int = 1, bias: bool = True, split_k: int = 1,
    out_dtype: torch.dtype = torch.bfloat16, columns: int = 4096, split: Split = SPLIT,
) -> Kernel:  # fmt: skip
    """The folded product of `groups` weights with one tile, shared by `split_k` programs. columns: of each weight."""
    rows = tile.BLOCK_M
    w4, w6, w8 = (_meta(*shape) for shape in packed_shapes(columns, split)[:3])
    factor, row_scale = _meta(*factor_shape(columns, split)), _meta(columns, dtype=torch.float32)
    weight = FoldedWeight(w4, w6, w8, factor, row_scale, _meta(columns, dtype=out_dtype) if bias else None)
    q = _meta(rows, fold_width(split, w_fp4=False))
    x = FoldedActivation(q, _meta(rows, dtype=torch.float32), _meta(LOCKS, dtype=torch.int32))
    outs = [_meta(rows, columns, dtype=out_dtype)] * groups
    partial = _meta(1, dtype=torch.float32)
    whole = tiles_of(rows, [columns] * groups, tile) if split_k == 1 else 0
    call = folded_mm_call(x, [weight] * groups, outs, partial, fp6=fp6, tile=tile, parts=Parts(whole, split_k))
    return kernel_of(call, capability)


def grouped_mx_mm(
    capability: int, tile: Tile, tiles: MixedTiles, *, w_fp4: bool = False, fp6: str = "e2m3", bias: bool = True,
    experts: int = 128, columns: int = 4096, split: Split = SPLIT, activations: str = "same",
) -> Kernel:  # fmt: skip
    """The product with many experts' weights, with one tile; bias and output are bfloat16."""
    x_shapes = activation_shapes(MANY_ROWS, activation_split(split, activations))
    w_split = weight_split(split, "mxfp4" if w_fp4 else "same")
    call = grouped_mx_mm_call(
        QuantizedActivation(*(_meta(*shape) for shape in x_shapes)),
        _meta(MANY_ROWS, dtype=torch.int32),
        _meta(experts, dtype=torch.int32),
        PackedWeight(*(_meta(experts, *shape) for shape in packed_shapes(columns, w_split))),
        _meta(experts, columns, dtype=torch.bfloat16) if bias else None,
        _meta(MANY_ROWS, columns, dtype=torch.bfloat16),
        fp6=fp6,
        tiles=tiles,
        tile=tile,
    )
    return kernel_of(call, capability)


def grouped_folded_mm(
    capability: int, tile: FoldedTile, *, fp6: str = "e2m3", bias: bool = True, split_k: int = 1, experts: int = 128,
    columns: int = 4096, split: Split = SPLIT,
) -> Kernel:  # fmt: skip
    """The folded product with many experts' weights, with one tile, shared by `split_k` programs."""
    w4, w6, w8 = (_meta(experts, *shape) for shape in packed_shapes(columns, split)[:3])
    factor = _meta(experts, *factor_shape(columns, split))
    row_scale, offset = _meta(experts, columns, dtype=torch.float32), _meta(experts, columns, dtype=torch.bfloat16)
    call = grouped_folded_mm_call(
        _meta(MANY_ROWS, fold_width(split, w_fp4=False)),
        _meta(MANY_ROWS, dtype=torch.float32),
        _meta(MANY_ROWS, dtype=torch.int32),
        _meta(experts, dtype=torch.int32),
        FoldedWeight(w4, w6, w8, factor, row_scale, offset if bias else None),
        _meta(MANY_ROWS, columns, dtype=torch.bfloat16),
        _meta(1, dtype=torch.float32),
        _meta(1, dtype=torch.int32),
        fp6=fp6,
        tile=tile,
        split=split_k,
    )
    return kernel_of(call, capability)


def _meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def compile_all(kernels: Sequence[Kernel], *, workers: int = 2) -> list[Compiled | NotSupported]:
    """Compile each kernel, in order, spread over fresh processes. Raises RuntimeError if a compilation fails."""
    shares = [kernels[start::workers] for start in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        done = list(pool.map(_compile_in_process, shares))
    return [done[i % workers][i // workers] for i in range(len(kernels))]


def compile_kernel(kernel: Kernel) -> Compiled | NotSupported:
    """Compile one kernel from nothing, in this process, which must not be running Triton's interpreter.

    Not for use by several threads at once: what ptxas says is taken from standard output.
    Raises ValueError if signature and constexprs are not the function's arguments.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.errors import PTXASError

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: Triton cannot compile in this process")
    options = {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages}
    with ptxas_log() as log:
        try:
            binary = triton.compile(_source(kernel), target=GPUTarget("cuda", kernel.capability, 32), options=options)
        except PTXASError as error:
            if "is not defined for option 'gpu-name'" not in str(error):
                raise
            target = target_name(kernel.capability)
            return NotSupported(target=target, reason=f"the ptxas of triton {triton.__version__} has no {target}")
    return inspect_binary(binary, log.getvalue())


def _source(kernel: Kernel) -> Any:
    """Triton's description of what to compile, with what it finds at a launch: tensors and multiples of 16 are aligned.

    An integer of 1 is a constant. Neither is said of arguments that the kernel is not to be specialized on.
    """
    from triton.compiler import ASTSource

    module, name = kernel.function.split(":")
    function = getattr(importlib.import_module(module), name)
    names = list(function.arg_names)
    given = {**kernel.tensors, **kernel.integers, **kernel.constexprs}
    if set(names) != set(given):
        raise ValueError(f"{kernel.function} takes {names}, got {[*given]}")
    free = {p.name for p in function.params if p.do_not_specialize}
    ones = {name: 1 for name, value in kernel.integers.items() if value == 1 and name not in free}
    aligned = [name for name, value in kernel.integers.items() if value % 16 == 0 and name not in free]
    types = {**kernel.tensors, **dict.fromkeys(kernel.integers.keys() - ones.keys(), "i32")}
    constants = {**kernel.constexprs, **ones}
    return ASTSource(
        fn=function,
        signature={name: types.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in (*kernel.tensors, *aligned)},
    )


@contextlib.contextmanager
def ptxas_log() -> Iterator[io.StringIO]:
    """Catch what ptxas reports about the kernels compiled inside, none of which come from Triton's cache."""
    import triton

    log, knobs = io.StringIO(), triton.knobs
    with (
        tempfile.TemporaryDirectory() as cache,
        knobs.cache.scope(),
        knobs.nvidia.scope(),
        contextlib.redirect_stdout(log),
    ):
        knobs.cache.dir = cache
        knobs.nvidia.dump_ptxas_log = True
        yield log


def in_process(module: str, kernels: Sequence[Any]) -> list[dict[str, Any]]:
    """What a module, run in a new process without the interpreter, prints of these dataclasses: a JSON object each.

    Raises RuntimeError if it ends with an error.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    text = json.dumps([asdict(kernel) for kernel in kernels])
    command = [sys.executable, "-m", module]
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling offline ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    results: list[dict[str, Any]] = json.loads(done.stdout)
    return results


def _compile_in_process(kernels: Sequence[Kernel]) -> list[Compiled | NotSupported]:
    """`compile_kernel` of each in a new process."""
    return [_result(fields) for fields in in_process("micromix_compile.targets.offline", kernels)]


def _result(fields: dict[str, Any]) -> Compiled | NotSupported:
    """A result from its JSON object."""
    return NotSupported(**fields) if "reason" in fields else Compiled.from_fields(fields)


def main() -> None:
    """Compile the kernels that standard input lists."""
    kernels = [Kernel(**fields) for fields in json.load(sys.stdin)]
    results = []
    for kernel in kernels:
        try:
            results.append(asdict(compile_kernel(kernel)))
        except Exception as error:
            error.add_note(f"while compiling {kernel}")
            raise
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    main()

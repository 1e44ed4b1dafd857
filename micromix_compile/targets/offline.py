"""Compile the Triton kernels for GPUs that aren't here, and read in the result what they would run.

Triton compiles for any GPU it knows without having one, but not in a process that runs its interpreter, and it keeps
state: `compile_all` therefore works in processes of its own.

    python -m micromix_compile.targets.offline    reads a JSON list of kernels, writes a JSON list of results
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from micromix_compile.targets.tiles import Family, FoldedTile, Tile

# Columns of tensor memory that one sm_100 processor has (PTX ISA, "Tensor Memory").
TENSOR_MEMORY_COLUMNS: Final = 512

_MATMUL: Final = "micromix_compile.templates.triton.mixed_mx_mm:mixed_mx_mm_kernel"
_FOLDED: Final = "micromix_compile.templates.triton.folded_mm:folded_mm_kernel"

# What PTX says of the source: comments, its lines and files with the labels for them, debug sections, modules.
_OF_SOURCE: Final = (
    r"//.*",
    r"^\s*\.(loc|file)\b.*",
    r"^\s*\$L__(tmp|func_begin|func_end)\d+:",
    r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}",
    r"\bmicromix_compile(\.|_\$_)(\w+?(\.|_\$_))*",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """One kernel to compile, as plain data.

    function: "module:name" of a `triton.jit` function. capability: ten times the major plus the minor number of the
    GPU's compute capability. signature: type of each run-time argument ("*u8", "i32"). constexprs: value of each
    compile-time argument. aligned: run-time arguments known to be multiples of 16, as Triton finds at a launch.
    """

    function: str
    capability: int
    signature: Mapping[str, str]
    constexprs: Mapping[str, bool | int | float | str | None]
    aligned: tuple[str, ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Compiled:
    """What came out of one compilation.

    target: as ptxas names it ("sm_100a"). mma_blocks: (kind, instructions) of every straight piece of code with matrix
    instructions; one step along K is one piece, and a peeled first step another. Kinds are "tcgen05.mma mxf4" and the
    like, see `mma_kind`. registers: per thread. spilled_bytes: stored, per thread. shared_bytes, tensor_columns: of
    one program. serialized: ptxas has each asynchronous matrix instruction end before the next begins. trap: the code
    can end in a trap; a kernel that the compiler gave up on is nothing else. flushing: the instructions that take
    float32 subnormals for zero, such as "rsqrt.approx.ftz.f32". before_wait: those that read or write memory before the
    kernel waits for its inputs, None if it does not wait. mma_ended: of each straight piece with asynchronous matrix
    instructions that read registers, which ptxas writes to behind it: whether it waits for all of them. ptx_digest: see
    the function.
    """

    target: str
    mma_blocks: tuple[tuple[str, int], ...]
    registers: int
    spilled_bytes: int
    shared_bytes: int
    tensor_columns: int
    serialized: bool
    trap: bool
    flushing: tuple[str, ...]
    before_wait: tuple[str, ...] | None
    mma_ended: tuple[bool, ...]
    ptx_digest: str

    @property
    def mma(self) -> dict[str, int]:
        """Matrix instructions in the whole kernel, by kind."""
        counts: dict[str, int] = {}
        for kind, count in self.mma_blocks:
            counts[kind] = counts.get(kind, 0) + count
        return counts

    @property
    def emulated(self) -> bool:
        """Whether any matrix instruction, or all for want of one, works without block scales."""
        return not self.mma_blocks or not all(is_block_scaled(kind) for kind, _ in self.mma_blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class NotSupported:
    """The installed Triton or its ptxas cannot compile for the target. reason: a sentence that names the version."""

    target: str
    reason: str


def is_block_scaled(kind: str) -> bool:
    """Whether a kind of `Compiled.mma_blocks` takes MX scales itself."""
    return kind.split()[1].startswith("mx")


def target_name(capability: int) -> str:
    """The target that Triton compiles for: with architecture-specific instructions from sm_90 on."""
    return f"sm_{capability}{'a' if capability >= 90 else ''}"


def mixed_mx_mm(
    capability: int, tile: Tile, family: Family, *, w_fp4: bool = False, fp6: str = "e2m3", x_swizzled: bool = False,
    w_swizzled: bool = False, bias: bool = True, out_dtype: str = "bf16",
) -> Kernel:  # fmt: skip
    """The mixed matmul with one tile of a family. out_dtype: of bias and output, in Triton's spelling."""
    pointers = dict.fromkeys(("x4", "x6", "x8", "x_scale", "w4", "w6", "w8", "w_scale"), "*u8")
    pointers |= {"bias": f"*{out_dtype}", "out": f"*{out_dtype}"}
    return Kernel(
        function=_MATMUL,
        capability=capability,
        signature=pointers | dict.fromkeys(("M", "N", "blocks4", "blocks6", "blocks8"), "i32"),
        constexprs=family.constants(
            tile, fp6=fp6, w_fp4=w_fp4, has_bias=bias, x_swizzled=x_swizzled, w_swizzled=w_swizzled
        ),
        aligned=(*pointers, "N"),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def folded_mm(
    capability: int, tile: FoldedTile, *, fp6: str = "e2m3", groups: int = 1, bias: bool = True, split_k: int = 1,
    out_dtype: str = "bf16", columns: int = 4096, split: tuple[int, int, int] = (3072, 832, 192),
) -> Kernel:  # fmt: skip
    """The folded product of `groups` weights.

    columns: of each, of which Triton sees if it is 1 or a multiple of 16. split: channels per format.
    """
    weights = dict.fromkeys((f"{name}_{i}" for i in range(3) for name in ("w4", "w6", "w8", "w_factor")), "*u8")
    scales = dict.fromkeys(("x_row_scale", *(f"w_row_scale_{i}" for i in range(3))), "*fp32")
    biases = [f"bias_{i}" for i in range(3)]
    pointers = weights | scales | (dict.fromkeys(biases, f"*{out_dtype}") if bias else {})
    pointers |= dict.fromkeys((f"out_{i}" for i in range(3)), f"*{out_dtype}")
    pointers |= {"x": "*u8", "partial": "*fp32", "locks": "*i32"}
    extents = {f"N{i}": columns if i < groups else 0 for i in range(3)}
    numbers = ("tiles0", "tiles1", "column_tiles", "whole", "shared")
    constants = {name: value for name, value in extents.items() if value == 1} | ({} if bias else dict.fromkeys(biases))
    extents = {name: value for name, value in extents.items() if value != 1}
    return Kernel(
        function=_FOLDED,
        capability=capability,
        signature=pointers | dict.fromkeys((*extents, "M", "odd4", "odd6", "odd8", *numbers), "i32"),
        constexprs={
            "FP6": fp6, "GROUPS": groups, "HAS_BIAS": bias, "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N,
            "BLOCK_K": tile.BLOCK_K, "SPLIT_K": split_k, "COPIED": tile.copied_factors, "SUM_STEPS": tile.SUM_STEPS,
            "SEGMENT_START": tile.SEGMENT_START, "STAGES8": tile.stages8(split, groups),
            "LAUNCH_PDL": True, "RELEASES": tile.releases,
            **constants,
        },
        aligned=(*pointers, *(name for name, value in extents.items() if value % 16 == 0)),
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )  # fmt: skip


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
    with _ptxas_log() as log:
        try:
            binary = triton.compile(_source(kernel), target=GPUTarget("cuda", kernel.capability, 32), options=options)
        except PTXASError as error:
            if "is not defined for option 'gpu-name'" not in str(error):
                raise
            target = target_name(kernel.capability)
            return NotSupported(target=target, reason=f"the ptxas of triton {triton.__version__} has no {target}")
    return _inspect(binary, log.getvalue())


def mma_kind(instruction: str) -> str | None:
    """A PTX matrix instruction's kind, such as "mma.sync mxf8f6f4" or "wgmma bf16"; None for another instruction.

    The name begins with "mx" exactly if the instruction takes block scales.
    """
    if not (match := re.match(r"(tcgen05\.mma|mma\.sync|wgmma)\.(?!fence|commit|wait)", instruction)):
        return None
    if kind := re.search(r"kind::(\w+)", instruction):
        name = kind[1]
        if name.startswith("mx") and ".block_scale" not in instruction:
            name = f"unscaled-{name}"
    else:
        name = instruction.rstrip().split(".")[-2 if match[1] == "mma.sync" else -1]
    return f"{match[1]} {name}"


def ptx_digest(ptx: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a kernel's PTX, which stay the same when its source moves.

    Another line, file or module of a function changes nothing, nor does a comment; any other instruction does.
    """
    for pattern in _OF_SOURCE:
        ptx = re.sub(pattern, "", ptx, flags=re.MULTILINE)
    lines = (line.strip() for line in ptx.splitlines())
    return hashlib.sha256("\n".join(line for line in lines if line).encode()).hexdigest()[:16]


def _source(kernel: Kernel) -> Any:
    """Triton's description of what to compile."""
    from triton.compiler import ASTSource

    module, name = kernel.function.split(":")
    function = getattr(importlib.import_module(module), name)
    names = list(function.arg_names)
    if set(names) != {*kernel.signature, *kernel.constexprs}:
        raise ValueError(f"{kernel.function} takes {names}, got {[*kernel.signature, *kernel.constexprs]}")
    return ASTSource(
        fn=function,
        signature={name: kernel.signature.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in kernel.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in kernel.aligned},
    )


@contextlib.contextmanager
def _ptxas_log() -> Iterator[io.StringIO]:
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


def _inspect(binary: Any, log: str) -> Compiled:
    """Read a compiled kernel. log: of `ptxas -v`."""
    ptx = binary.asm["ptx"]
    (target,) = re.findall(r"^\.target (\w+)", ptx, re.MULTILINE)
    (registers,) = re.findall(r"Used (\d+) registers", log)
    return Compiled(
        target=target,
        mma_blocks=tuple(_mma_blocks(ptx)),
        registers=int(registers),
        spilled_bytes=sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", log)),
        shared_bytes=int(binary.metadata.shared),
        tensor_columns=int(getattr(binary.metadata, "tmem_size", None) or 0),
        serialized="instructions are serialized" in log,
        trap=re.search(r"\btrap;", ptx) is not None,
        flushing=tuple(sorted(set(re.findall(r"[a-z][\w.]*\.ftz\b[\w.]*", ptx)))),
        before_wait=_before_wait(ptx),
        mma_ended=tuple(_mma_ended(ptx)),
        ptx_digest=ptx_digest(ptx),
    )


def _before_wait(ptx: str) -> tuple[str, ...] | None:
    """Memory instructions in front of the wait, which stands in a kernel's straight beginning; arguments are none."""
    beginning, wait, _ = ptx.partition("griddepcontrol.wait")
    found = re.findall(r"\b(?:ld|st|atom|red|cp)\.(?!param)[\w.:]+", beginning)
    return tuple(sorted(set(found))) if wait else None


def _mma_ended(ptx: str) -> Iterator[bool]:
    """Of pieces between labels and branches with `wgmma` that reads its left operand from registers: all waited for."""
    ended: bool | None = None
    for line in (*ptx.splitlines(), "$L__BB_end:"):
        statement = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line)
        if re.match(r"wgmma\.mma_async\S*\s+\{[^}]*\},\s*\{", statement):
            ended = False
        elif ended is not None and re.match(r"wgmma\.wait_group\S*\s+0\b", statement):
            ended = True
        elif ended is not None and re.match(r"\$L__BB\w+:|bra", statement):
            yield ended
            ended = None


def _mma_blocks(ptx: str) -> Iterator[tuple[str, int]]:
    """(kind, count) of the matrix instructions between labels and branches, in the order of the text."""
    counts: dict[str, int] = {}
    for line in (*ptx.splitlines(), "$L__BB_end:"):
        statement = re.sub(r"^\s*(@!?%p\d+\s+)?", "", line)
        if re.match(r"\$L__BB\w+:|bra", statement):
            yield from counts.items()
            counts = {}
        elif kind := mma_kind(statement.split()[0] if statement else ""):
            counts[kind] = counts.get(kind, 0) + 1


def _compile_in_process(kernels: Sequence[Kernel]) -> list[Compiled | NotSupported]:
    """`compile_kernel` of each in a new process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "micromix_compile.targets.offline"]
    text = json.dumps([asdict(kernel) for kernel in kernels])
    done = subprocess.run(command, input=text, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling offline ended with code {done.returncode}:\n{done.stderr[-4000:]}")
    return [_result(fields) for fields in json.loads(done.stdout)]


def _result(fields: dict[str, Any]) -> Compiled | NotSupported:
    """A result from its JSON object."""
    if "reason" in fields:
        return NotSupported(**fields)
    fields["mma_blocks"] = tuple((kind, count) for kind, count in fields["mma_blocks"])
    fields["flushing"] = tuple(fields["flushing"])
    fields["before_wait"] = None if fields["before_wait"] is None else tuple(fields["before_wait"])
    fields["mma_ended"] = tuple(fields["mma_ended"])
    return Compiled(**fields)


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

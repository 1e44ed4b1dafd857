"""Compile the Gluon kernel for sm_90 where there is none, in a process of its own, and read what came out.

python -m micromix_compile.targets.gluon_offline    reads a JSON list of kernels, writes a JSON list of results
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from micromix_compile.targets.gluon_kernels import compile_kernel
from micromix_compile.targets.gluon_tiles import GluonKernel, GluonTile
from micromix_compile.targets.offline import in_process, ptxas_log
from micromix_compile.targets.ptx import Compiled, inspect_binary
from micromix_compile.targets.sass import disassemble

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


@dataclass(frozen=True, kw_only=True, slots=True)
class GluonCompiled:
    """What came out of one compilation.

    compiled: from the PTX. threads: of a program. boxes: Triton's account of the descriptors, as (rows, columns,
    swizzle, element type) of each. parameters: bytes of each of the kernel's. read: which of them it reads. The others:
    see `sass.Listing`.
    """

    compiled: Compiled
    threads: int
    boxes: tuple[tuple[int, ...], ...]
    parameters: tuple[int, ...]
    read: tuple[int, ...]
    matrix_instructions: int
    overwritten: tuple[str, ...]
    unfenced: tuple[str, ...]
    vector_counting: tuple[str, ...]
    spills_in_loops: tuple[str, ...]

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> GluonCompiled:
        """From what JSON makes of one's fields."""
        compiled = Compiled.from_fields(fields["compiled"])
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        boxes = tuple(tuple(box) for box in fields["boxes"])
        return cls(**{**fields, **lists, "compiled": compiled, "boxes": boxes})


def compile_all(kernels: Sequence[GluonKernel]) -> list[GluonCompiled]:
    """Compile each, in order, in one fresh process. Raises RuntimeError if a compilation fails."""
    found = in_process("micromix_compile.targets.gluon_offline", kernels)
    return [GluonCompiled.from_fields(fields) for fields in found]


def inspect_kernel(kernel: GluonKernel) -> GluonCompiled:
    """Compile one from nothing, in this process, which must not be running Triton's interpreter."""
    with ptxas_log() as log:
        binary = compile_kernel(kernel)
    listing = disassemble(binary.asm["cubin"])
    _, _, entry = binary.asm["ptx"].partition(".visible .entry")
    declared, _, body = entry.partition(")")
    name = binary.metadata.name
    return GluonCompiled(
        compiled=inspect_binary(binary, log.getvalue()),
        threads=32 * binary.metadata.num_warps,
        boxes=tuple((*box["block_size"], box["swizzle"], box["elem_type"]) for box in binary.metadata.tensordesc_meta),
        parameters=tuple(int(size or bits) // (1 if size else 8) for bits, size in _declarations(declared)),
        read=tuple(sorted({int(number) for number in re.findall(rf"{name}_param_(\d+)", body)})),
        matrix_instructions=listing.matrix_instructions(),
        overwritten=tuple(f"{writer} behind {mma}" for mma, writer in listing.overwritten()),
        unfenced=tuple(listing.unfenced()),
        vector_counting=tuple(listing.vector_counting()),
        spills_in_loops=tuple(listing.spills_in_loops()),
    )


def _declarations(declared: str) -> list[tuple[str, str]]:
    """(bits of a number, or bytes of an array) of each parameter that PTX declares."""
    return re.findall(r"\.param(?: \.align \d+)? \.[bu](\d+)[^\[,\n]*(?:\[(\d+)\])?", declared)


def main() -> None:
    """Compile the kernels that standard input lists."""
    given = json.load(sys.stdin)
    kernels = [GluonKernel(**{**fields, "tile": GluonTile(**fields["tile"])}) for fields in given]
    json.dump([asdict(inspect_kernel(kernel)) for kernel in kernels], sys.stdout)


if __name__ == "__main__":
    main()

"""What a compiled kernel would run, read in its PTX and in what ptxas says of it."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# Columns of tensor memory that one sm_100 processor has (PTX ISA, "Tensor Memory").
TENSOR_MEMORY_COLUMNS: Final = 512

# What PTX says of the source: comments, its lines and files with the labels for them, debug sections, modules.
_OF_SOURCE: Final = (
    r"//.*",
    r"^\s*\.(loc|file)\b.*",
    r"^\s*\$L__(tmp|func_begin|func_end)\d+:",
    r"^\s*\.section\s+\.debug\w*\s*\{[^}]*\}",
    r"\bmicromix_compile(\.|_\$_)(\w+?(\.|_\$_))*",
)


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
    instructions that read registers, which ptxas writes to behind it: whether it waits for all of them. half_defined:
    packed conversions joined with a half that nothing defines. Such a half ptxas 12.8 takes from its stack pointer, and
    then it may read this one for the other: two bytes of it came out in the place of results. ptx_digest: see the
    function.
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
    half_defined: tuple[str, ...]
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

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Compiled:
        """From what JSON makes of one's fields."""
        blocks = tuple((kind, count) for kind, count in fields["mma_blocks"])
        before = fields["before_wait"]
        tuples = {name: tuple(fields[name]) for name in ("flushing", "mma_ended", "half_defined")}
        return cls(
            **{**fields, **tuples, "mma_blocks": blocks, "before_wait": None if before is None else tuple(before)}
        )


def is_block_scaled(kind: str) -> bool:
    """Whether a kind of `Compiled.mma_blocks` takes MX scales itself."""
    return kind.split()[1].startswith("mx")


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


def inspect_binary(binary: Any, log: str) -> Compiled:
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
        half_defined=tuple(_half_defined(ptx)),
        ptx_digest=ptx_digest(ptx),
    )


def _before_wait(ptx: str) -> tuple[str, ...] | None:
    """Memory instructions in front of the wait, which stands in a kernel's straight beginning; arguments are none."""
    beginning, wait, _ = ptx.partition("griddepcontrol.wait")
    found = re.findall(r"\b(?:ld|st|atom|red|cp)\.(?!param)[\w.:]+", beginning)
    return tuple(sorted(set(found))) if wait else None


def _half_defined(ptx: str) -> Iterator[str]:
    """Registers with the result of a packed conversion which are joined with a register that is written nowhere."""
    converted = set(re.findall(r"\bcvt\.\w+\.\w+\.e\dm\dx2\.\S+\s+(%rs\d+)", ptx))
    written = set(re.findall(r"^\s*(?:@!?%p\d+\s+)?\w[\w.:]*\s+(%rs\d+)\b", ptx, re.MULTILINE))
    for several in re.findall(r"^\s*(?:@!?%p\d+\s+)?\w[\w.:]*\s+\{([^}]*)\}", ptx, re.MULTILINE):
        written.update(re.findall(r"%rs\d+", several))
    for low, high in re.findall(r"mov\.b32\s+%r\d+, \{(%rs\d+), (%rs\d+)\}", ptx):
        if low in converted and high not in written:
            yield low


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

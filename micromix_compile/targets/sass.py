"""What ptxas made of a kernel, read in the disassembly: registers and stages that are written while they are read.

Both mistakes gave wrong results and neither shows in PTX. ptxas keeps other values out of the registers that a WGMMA in
flight reads only as far as the end of a basic block. And a barrier of threads does not order their reads of shared
memory before the copy engine's writes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_WIDTHS: Final = ((r"\.128|M88\.4", 4), (r"\.64|^CS2R|WIDE", 2))
_WRITES_NONE: Final = r"ST|BAR|SYNCS\.ARRIVE|BRA|RED|U[A-Z]"
_PREDICATE: Final = r"(?:@!?U?P\w+\s+)?"
_ALL_ENDED: Final = "DEPBAR.LE gsb0, 0x0"
_BRANCH: Final = r"BRA.* `\((\.L_x_\d+)\)"


def disassemble(binary: bytes) -> Listing:
    """The code of a cubin, by the nvdisasm that comes with Triton."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True)
    return Listing.of(done.stdout)


@dataclass(frozen=True, slots=True)
class Listing:
    """Instructions with their predicates, and labels by the instruction that they stand before."""

    code: list[str]
    labels: dict[str, int]

    @classmethod
    def of(cls, text: str) -> Listing:
        """From nvdisasm's text."""
        code: list[str] = []
        labels: dict[str, int] = {}
        for line in text.splitlines():
            if match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?)\s*;", line):
                code.append(match[1])
            elif match := re.match(r"\s*(\.L_x_\d+):", line):
                labels[match[1]] = len(code)
        return cls(code, labels)

    def matrix_instructions(self) -> int:
        """FP8 WGMMA that takes its left operand from registers."""
        return sum(_operand(text) != set() for text in self.code)

    def overwritten(self) -> list[tuple[str, str]]:
        """(WGMMA, instruction that writes a register of its left operand before all WGMMA have ended)."""
        found = []
        for place, text in enumerate(self.code):
            if operand := _operand(text):
                writers = (one for one in self._until_ended(place + 1) if _written(one) & operand)
                found += [(text, writer) for writer in writers]
        return found

    def _until_ended(self, place: int) -> Iterator[str]:
        """Instructions that may run from a place on, along all branches, but other WGMMA."""
        seen: set[int] = set()
        todo = [place]
        while todo:
            place = todo.pop()
            while place < len(self.code) and place not in seen:
                seen.add(place)
                text = self.code[place]
                if _ALL_ENDED in text or text.startswith("EXIT"):
                    break
                if "QGMMA" not in text:
                    yield text
                branch = re.search(_BRANCH, text)
                if branch:
                    todo.append(self.labels[branch[1]])
                    if not text.startswith("@"):
                        break
                place += 1

    def loops_of_steps(self) -> list[list[str]]:
        """The innermost loops with matrix instructions or loads by TMA.

        What waits for a barrier again and again stands behind the end of the code, and branches back to no loop's
        beginning: what lies between is none.
        """
        spans = []
        for end, text in enumerate(self.code):
            branch = re.search(_BRANCH, text)
            if branch and self.labels[branch[1]] <= end:
                loop = self.code[self.labels[branch[1]] : end + 1]
                works = any(re.search(r"QGMMA|UTMALDG", one) for one in loop)
                if works and not any(re.search(r"\bEXIT|USETMAXREG", one) for one in loop):
                    spans.append((self.labels[branch[1]], end + 1))
        inner = [one for one in spans if not any(_is_inside(other, one) for other in spans)]
        return [self.code[first:last] for first, last in inner]

    def unfenced(self) -> list[str]:
        """Arrivals in loops of steps behind reads of shared memory without a fence between them."""
        found = []
        for loop in self.loops_of_steps():
            has_read = False
            for text in loop:
                if re.match(_PREDICATE + r"LDSM?\b", text):
                    has_read = True
                elif re.match(_PREDICATE + r"FENCE\.VIEW\.ASYNC", text):
                    has_read = False
                elif has_read and re.match(_PREDICATE + r"SYNCS\.ARRIVE", text):
                    found.append(text)
        return found

    def vector_counting(self) -> list[str]:
        """What loops with matrix instructions move to uniform registers, in which alone these take their addresses."""
        loops = [loop for loop in self.loops_of_steps() if any("QGMMA" in text for text in loop)]
        return [text for loop in loops for text in loop if re.match(_PREDICATE + "R2UR", text)]

    def spills_in_loops(self) -> list[str]:
        """Local memory that loops of steps touch."""
        return [text for loop in self.loops_of_steps() for text in loop if re.match(_PREDICATE + r"(LDL|STL)\b", text)]


def _is_inside(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner != outer and outer[0] <= inner[0] and inner[1] <= outer[1]


def _operand(text: str) -> set[int]:
    """Registers from which a WGMMA takes its left operand."""
    match = re.search(r"QGMMA\S*\s+R\d+,\s*R(\d+),\s*gdesc", text)
    return set(range(int(match[1]), int(match[1]) + 4)) if match else set()


def _written(text: str) -> set[int]:
    """Registers that an instruction writes."""
    match = re.match(_PREDICATE + r"(\S+)\s+(.*)", text)
    if not match or re.match(_WRITES_NONE, match[1]):
        return set()
    register = re.match(r"R(\d+)$", match[2].split(",")[0].strip())
    if not register:
        return set()
    width = next((width for pattern, width in _WIDTHS if re.search(pattern, match[1])), 1)
    return set(range(int(register[1]), int(register[1]) + width))

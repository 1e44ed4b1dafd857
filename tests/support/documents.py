"""The pages of the documentation, and the code and commands in them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = ("README.md", *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")))
_FENCE: Final = re.compile(r"^```(.*?)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROGRAMS: Final = ("micromix", "python", "make", "pip")


@dataclass(frozen=True)
class Block:
    """Fenced text of a page."""

    page: str
    line: int
    language: str
    text: str

    def run(self, namespace: dict[str, object]) -> None:
        """Execute it as Python. A traceback shows page and line."""
        exec(compile("\n" * self.line + self.text, str(ROOT / self.page), "exec"), namespace)


def text_of(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def blocks(page: str, language: str | None = None) -> list[Block]:
    """Those of one language, or all, in their order."""
    text = text_of(page)
    found = [Block(page, text.count("\n", 0, m.start()) + 1, m[1], m[2]) for m in _FENCE.finditer(text)]
    return [block for block in found if language in (None, block.language)]


def prose(page: str) -> str:
    """A page without its fenced text."""
    return _FENCE.sub("", text_of(page))


def commands(page: str) -> Iterator[str]:
    """Each command line of a page's fenced text: one line, without what follows a #."""
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            command = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
            if command:
                yield command


def mentioned(page: str) -> Iterator[str]:
    """Each command line between words of a page."""
    for text in re.findall(r"`([^`]+)`", prose(page)):
        words = text.split()
        if words and words[0] in _PROGRAMS and len(words) > 1:
            yield " ".join(words)

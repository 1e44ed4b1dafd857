"""What commands print: tables and texts on standard output, progress on standard error."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from micromix_compile import files
from micromix_compile.evaluation.machine import hardware, versions

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.status import Status

    from micromix_compile.evaluation.types import Metric, RowResult
    from micromix_compile.recipe.types import Recipe


def console() -> Console:
    """Standard output, wide enough for a table where it is a file. Brackets and colons of paths are no markup."""
    return Console(width=None if sys.stdout.isatty() else 150, markup=False, emoji=False)


def status(text: str) -> Status:
    """A spinner on standard error, as long as something runs."""
    return Console(stderr=True).status(Text(text))


def note(text: str) -> None:
    """Says how far it is, on standard error, to people who watch a log instead of a terminal."""
    if not sys.stderr.isatty():
        typer.echo(text, err=True)


def print_text(label: str, text: str) -> None:
    """What a model wrote."""
    typer.echo(f"\n{label}: {text}")


def summary(recipe: Recipe) -> str:
    """A recipe in a line."""
    padded = f", {len(recipe.padded)} padded to whole blocks of 32 channels" if recipe.padded else ""
    experts = sum(linear.experts is not None for linear in recipe.linears.values())
    held = f" ({experts} of experts)" if experts else ""
    few = sum(map(len, recipe.starved.values()))
    starved = f", {few} matrices of experts rounded to nearest for want of tokens" if few else ""
    bits = f"{recipe.bits_text}, {recipe.stored_bytes / 2**20:.1f} MiB"
    return f"{len(recipe.linears)} linears{held}, {bits}{padded}{starved}"


def table(results: Sequence[RowResult], title: str) -> Table:
    """One line a row; tasks are the last columns."""
    made = Table(title=title, title_justify="left")
    made.add_column("row")
    for column in ("element\nbits", "stored\nbits", "stored\nMiB", "perplexity", "KL", "top-1"):
        made.add_column(column, justify="right")
    for task in results[0].tasks:
        made.add_column(f"{task.task}\n{task.metric}\n({task.items} items)", justify="right")
    for result in results:
        made.add_row(*_cells(result))
    return made


def _cells(result: RowResult) -> list[str]:
    quality = result.evaluation
    return [
        result.row,
        _number(result.element_bits, 2),
        _number(result.stored_bits, 2),
        _number(None if result.stored_bytes is None else result.stored_bytes / 2**20, 1),
        _number(quality.perplexity, 3),
        _number(quality.kl, 4),
        _number(quality.top1, 3),
        *(_metric(task.metrics[task.metric]) for task in result.tasks),
    ]


def _metric(metric: Metric) -> str:
    error = "" if metric.standard_error is None else f" ± {metric.standard_error:.3f}"
    return f"{metric.value:.3f}{error}"


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write_json(path: Path, settings: dict[str, Any], results: Sequence[RowResult]) -> None:
    """The rows, what they were measured with, and on what machine."""
    content = {
        **settings,
        "rows": [result.to_dict() for result in results],
        "versions": versions(),
        "hardware": hardware(),
    }
    files.write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def is_json_of_results(path: Path) -> bool:
    """Whether `write_json` wrote the file. Weights, say, are known by the first byte and stay unread."""
    with path.open("rb") as file:
        if not file.peek(1).startswith(b"{"):
            return False
        try:
            content: dict[str, Any] = json.load(file)
        except (ValueError, RecursionError):
            return False
    return {"rows", "versions", "hardware"} <= content.keys()

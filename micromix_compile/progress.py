"""Progress bars on standard error, silent where that is not a terminal."""

from __future__ import annotations

import sys
from collections.abc import Sized
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

T = TypeVar("T")


def make_progress(*, show: bool = True) -> Progress:
    """A bar with counts and times."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("elapsed,"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    return Progress(*columns, console=Console(stderr=True), disable=not (show and sys.stderr.isatty()))


def track(items: Iterable[T], description: str, *, total: int | None = None, show: bool = True) -> Iterator[T]:
    """Yield `items` while a bar counts them. total: their number, if `items` has no length."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with make_progress(show=show) as progress:
        yield from progress.track(items, total=total, description=description)


class CallProgress:
    """One bar that advances with the calls of a function instead of a loop."""

    _running: Progress | None = None  # one bar at a time on a terminal

    def __init__(self, description: str, *, show: bool) -> None:
        self._description = description
        self._show = show

    def update(self, completed: int, total: int) -> None:
        """Show that `completed` of `total` calls are done."""
        if not self._show or not sys.stderr.isatty():
            return
        if CallProgress._running is None:
            CallProgress._running = make_progress()
            CallProgress._running.add_task(self._description, total=total)
            CallProgress._running.start()
        CallProgress._running.update(CallProgress._running.task_ids[0], completed=completed, total=total)

    def stop(self) -> None:
        """Take the bar away."""
        if CallProgress._running is not None:
            CallProgress._running.stop()
            CallProgress._running = None

"""Runs passes in order, counts what they matched, cleans up after them, and dumps graphs on request."""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from micromix_compile.passes.context import PassContext
from micromix_compile.passes.graph import clean_up

if TYPE_CHECKING:
    from torch import fx

logger = logging.getLogger("micromix_compile")

Pass = Callable[["fx.Graph", PassContext], int]
"""A pass changes the graph in place and returns how many places it matched."""

_counts: ContextVar[Counter[str] | None] = ContextVar("counts of passes", default=None)


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """Collects how many places each pass, by name, matches in all graphs that are compiled inside.

    None of them comes from a cache, for what does has no pass run.
    """
    counts: Counter[str] = Counter()
    token = _counts.set(counts)
    try:
        yield counts
    finally:
        _counts.reset(token)


def is_counting() -> bool:
    """Whether somebody collects the counts of passes."""
    return _counts.get() is not None


def run_passes(
    graph: fx.Graph, passes: Sequence[Pass], context: PassContext, *, functional: bool = False
) -> dict[str, int]:
    """Run `passes` in order on `graph`; returns the number of matches of each by name.

    functional: whether the graph is one of Inductor's, after autograd, and not one of Dynamo's.
    """
    matches = {}
    for graph_pass in passes:
        name = name_of(graph_pass)
        _dump(graph, context, f"before.{name}")
        matches[name] = graph_pass(graph, context)
        if matches[name] or not functional:
            clean_up(graph, functional=functional)
        _dump(graph, context, f"after.{name}")
    if (counts := _counts.get()) is not None:
        counts.update(matches)
    kind = "post-grad" if functional else "pre-grad"
    logger.debug("%s passes: %s", kind, ", ".join(f"{name} {count}" for name, count in matches.items()))
    return matches


def for_inductor(passes: Sequence[Pass], context: PassContext) -> Callable[[fx.Graph], dict[str, int]]:
    """`passes`, as they are, bound to a context for the graph that comes of `context`'s after autograd."""
    return partial(run_passes, passes=tuple(passes), context=context.after_autograd(), functional=True)


def identities(passes: Sequence[Pass]) -> list[list[str]]:
    """What compiled code is cached by: the names of its passes in order, with what tells versions of one apart.

    That is the SHA-256 of the file that a pass is defined in; of ours nothing, for the cache knows our own files.
    Raises ValueError for a pass from outside that is not a function of a module: what else decides what it does (a
    closure, arguments of a partial, an instance) nobody could tell.
    """
    return [[name_of(one), "" if _is_ours(one) else _digest_of(one)] for one in passes]


def _is_ours(graph_pass: Pass) -> bool:
    return str(getattr(graph_pass, "__module__", "")).partition(".")[0] == "micromix_compile"


def name_of(graph_pass: Pass) -> str:
    """What a pass is called in logs and dumps."""
    return str(getattr(graph_pass, "__name__", type(graph_pass).__name__))


def _digest_of(graph_pass: Pass) -> str:
    path = Path(inspect.getfile(graph_pass)) if inspect.isfunction(graph_pass) else Path()
    if not path.is_file() or "<locals>" in graph_pass.__qualname__:
        raise ValueError(
            f"the pass {name_of(graph_pass)} must be a function of a module in a file, by which compiled code is cached"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _dump(graph: fx.Graph, context: PassContext, moment: str) -> None:
    """Write a graph to the next file of a folder if its pass is wanted. moment: "before.PASS" or "after.PASS"."""
    if not {"all", moment.partition(".")[2]} & set(context.dump):
        return
    folder = Path(context.dump_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.glob('*.txt'))):04d}.{moment}.txt"
    path.write_text(f"{graph}\n\n{graph.python_code('self').src}\n")
    logger.info("graph %s: %s", moment.replace(".", " "), path)

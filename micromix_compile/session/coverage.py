"""Which linears really run quantized: at its recompile limit torch.compile falls back to eager code silently."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from micromix_compile.lowering.torch_private.dynamo import limit_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.session.names import Names
    from micromix_compile.session.state import LinearState

logger = logging.getLogger("micromix_compile")

COVERAGE_CALLS: Final = frozenset({3, 10, 30, 100, 300, 1000})
"""After so many calls of a linear the others are looked at."""


class Coverage:
    """Counts calls of quantized linears; warns if others seldom or never run while these do again and again."""

    def __init__(self, names: Names) -> None:
        self._names = names
        self._checked: set[int] = set()

    def count(self, states: Sequence[LinearState]) -> None:
        """Note that linears ran quantized."""
        for state in states:
            state.calls += 1
            if state.calls in COVERAGE_CALLS and state.calls not in self._checked:
                self._check(state.calls)

    def _check(self, calls: int) -> None:
        self._checked.add(calls)
        idle = [state.name for state in self._names if state.linear is not None and 2 * state.calls < calls]
        if idle:
            logger.warning(
                "%d linears of %s have a recipe but ran quantized seldom or never (%s, ...): they aren't reached, or "
                "torch.compile gave up on their graph at %s",
                len(idle),
                self._names.model_id,
                idle[0],
                limit_text(),
            )

"""Inductor's pattern matcher."""

from __future__ import annotations

from torch._inductor.pattern_matcher import (
    MULTIPLE,
    CallFunction,
    KeywordArg,
    Match,
    PatternExpr,
    PatternMatcherPass,
    register_graph_pattern,
)

__all__ = [
    "MULTIPLE",
    "CallFunction",
    "KeywordArg",
    "Match",
    "PatternExpr",
    "PatternMatcherPass",
    "register_graph_pattern",
]

"""What is evaluated, and what comes out: plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor


class NothingQuantizedError(RuntimeError):
    """A row was to be measured, and the compiled model is the unquantized one."""


class LanguageModel(Protocol):
    """What is evaluated: a Hugging Face causal model, or the same compiled."""

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> Any:
        """An output whose `logits` are (1, T, V); input_ids are (1, T)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """perplexity: exp of the mean negative log-likelihood over `predictions` tokens.

    kl: mean Kullback-Leibler divergence of the reference's next-token distributions from the model's, in nats.
    top1: share of tokens at which both prefer the same next token. Both are None without a reference.
    """

    perplexity: float
    predictions: int
    kl: float | None = None
    top1: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """standard_error: the items being a sample; None where there is no estimate."""

    value: float
    standard_error: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskResult:
    """What a model reached in `items` questions. metric: the name of the one in `metrics` that a table shows."""

    task: str
    items: int
    metric: str
    metrics: Mapping[str, Metric]


@dataclass(frozen=True, slots=True, kw_only=True)
class RowResult:
    """One line of the table: bits and bytes of the linears' weights where they are known, and the quality."""

    row: str
    element_bits: float | None = None
    stored_bits: float | None = None
    stored_bytes: int | None = None
    evaluation: Evaluation
    tasks: tuple[TaskResult, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON; a perplexity or divergence that isn't finite becomes None."""
        flat = {**asdict(self), **asdict(self.evaluation)}
        del flat["evaluation"]
        return {key: _finite(value) for key, value in flat.items()}


def _finite(value: Any) -> Any:
    """The same, in which numbers that JSON has not are None."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None

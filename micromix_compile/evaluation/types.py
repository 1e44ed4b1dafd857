"""What is evaluated, and what comes out: plain values."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from torch import Tensor


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
class TaskResult:
    """accuracy: the share of `items` that were right. standard_error: of that share, the items being a sample."""

    task: str
    items: int
    accuracy: float

    @property
    def standard_error(self) -> float:
        """sqrt(p (1 - p) / n)."""
        return math.sqrt(self.accuracy * (1 - self.accuracy) / self.items)


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
        flat["tasks"] = [{**asdict(task), "standard_error": task.standard_error} for task in self.tasks]
        return {key: value if _has_json(value) else None for key, value in flat.items()}


def _has_json(value: object) -> bool:
    return not isinstance(value, float) or math.isfinite(value)

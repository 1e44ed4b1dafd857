"""Perplexity of a language model, and how far it moved from a reference model."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.evaluation.types import Evaluation
from micromix_compile.progress import track

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.evaluation.types import LanguageModel

_ROWS_AT_ONCE: Final = 128
"""Tokens whose distributions are compared at a time; bounds the memory that a large vocabulary takes."""

_LARGEST_EXPONENT: Final = 709.0
"""math.exp overflows above."""


@torch.inference_mode()
def evaluate(
    model: LanguageModel,
    windows: Tensor,
    reference: LanguageModel | None = None,
    *,
    label: str = "evaluating",
    progress: bool = True,
) -> Evaluation:
    """Perplexity over `windows`, with divergence from and agreement with `reference`.

    windows: (W, T) int64; each is a sequence of its own, so W * (T - 1) tokens are predicted.
    reference: runs beside the model window by window, so memory does not grow with W.

    Distributions are computed in float32 from the logits; sums are in float64.
    Raises ValueError unless windows is (W >= 1, T >= 2).
    """
    if windows.ndim != 2 or windows.shape[0] < 1 or windows.shape[1] < 2:
        raise ValueError(f"windows must be (W >= 1, T >= 2), got {tuple(windows.shape)}")
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    for window in track(windows.split(1), label, show=progress):
        logits = _logits(model, window)
        expected = None if reference is None else _logits(reference, window)
        totals += _compare(logits, expected, window[0, 1:])
    predictions = windows.shape[0] * (windows.shape[1] - 1)
    nll, kl, agreed = (totals / predictions).tolist()
    perplexity = math.inf if nll > _LARGEST_EXPONENT else math.exp(nll)  # NaN stays NaN
    if reference is None:
        return Evaluation(perplexity=perplexity, predictions=predictions)
    return Evaluation(perplexity=perplexity, predictions=predictions, kl=kl, top1=agreed)


def _logits(model: LanguageModel, window: Tensor) -> Tensor:
    """(1, T) tokens -> (T - 1, V) logits: what the model expects after each token but the last."""
    logits: Tensor = model(input_ids=window, use_cache=False).logits
    return logits[0, :-1]


def _compare(logits: Tensor, expected: Tensor | None, targets: Tensor) -> Tensor:
    """Sums over the tokens of a window: (negative log-likelihood, KL divergence, top-1 agreement) in float64.

    logits, expected: (T - 1, V) of any float dtype. targets: (T - 1,) int64.
    """
    totals = torch.zeros(3, dtype=torch.float64, device="cpu")
    for start in range(0, targets.numel(), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        log_q = logits[rows].float().log_softmax(-1)
        totals[0] -= log_q.gather(1, targets[rows, None]).double().sum().item()
        if expected is None:
            continue
        log_p = expected[rows].float().log_softmax(-1)
        each = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True)
        kl = each.masked_fill(log_p == -torch.inf, 0).sum(-1)  # 0 log 0 = 0
        totals[1] += kl.double().sum().item()
        totals[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
    return totals

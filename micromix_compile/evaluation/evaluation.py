"""Perplexity of a language model, how far it moved from a reference model, and the table of all of it."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch

from micromix_compile.calibration.assignment import assign
from micromix_compile.evaluation.harness import HarnessTask, run_harness_task
from micromix_compile.evaluation.tasks import run_task
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.numerics.formats import FP6_FORMATS
from micromix_compile.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor, nn

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.evaluation.tasks import Task, TaskResult
    from micromix_compile.recipe.types import Recipe

FULL_PRECISION: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Name of the unquantized row in each dtype."""

_ROWS_AT_ONCE: Final = 128
"""Tokens whose distributions are compared at a time; bounds the memory that a large vocabulary takes."""

_LARGEST_EXPONENT: Final = 709.0
"""math.exp overflows above."""

_VERSIONED: Final = ("micromix-compile", "transformers", "triton", "numpy")


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
        kl = torch.nn.functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        totals[1] += kl.double().sum().item()
        totals[2] += (log_q.argmax(-1) == log_p.argmax(-1)).sum().item()
    return totals


@torch.inference_mode()
def linear_sqnr(model: nn.Module, packed: nn.Module, windows: Tensor) -> dict[str, float]:
    """Signal to quantization noise of each packed linear's output, in dB, on the unquantized model's own inputs.

    model: unquantized. packed: the same model after `quantize_`. windows: (W, T) int64. Linears that were not reached
    are left out. An error of zero gives infinity.
    """
    sums: dict[str, Tensor] = {}

    def compare(name: str, linear: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            exact = output.to(torch.float32)
            noise = linear(args[0]).to(torch.float32) - exact
            energies = torch.stack((exact.square().sum(), noise.square().sum())).to("cpu", torch.float64)
            sums[name] = sums[name] + energies if name in sums else energies

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(compare(name, linear))
        for name, linear in packed.named_modules()
        if isinstance(linear, MicroMixLinear)
    ]
    try:
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(10 * torch.log10(signal / noise)) for name, (signal, noise) in sums.items()}


def row_names(dtype: torch.dtype) -> tuple[str, ...]:
    """The rows of the table for a model of this dtype, in order."""
    return (FULL_PRECISION[dtype], "mxfp8", *(f"mxfp6-{fp6}" for fp6 in FP6_FORMATS), "mxfp4", "micromix")


def row_config(row: str, config: MicroMixConfig) -> MicroMixConfig:
    """`config` itself for "micromix"; else the uniform policy that the row's name says, in its plainest form.

    Raises ValueError for a name that is no quantized row.
    """
    if row == "micromix":
        return config
    policy, _, fp6 = row.partition("-")
    if row not in row_names(torch.float32)[1:]:
        raise ValueError(f"row must be one of {', '.join(row_names(torch.float32)[1:])}, got {row!r}")
    plain: dict[str, Any] = {"weight_rounding": "nearest", "scale_search": False, "uniform_order": "model"}
    return replace(config, policy=policy, fp6=fp6 or config.fp6, weights="same", **plain)


def evaluate_rows(
    model: nn.Module,
    recipe: Recipe,
    rows: Sequence[str],
    windows: Tensor,
    *,
    tasks: Sequence[Task | HarnessTask] = (),
    progress: bool = True,
) -> Iterator[RowResult]:
    """One result per row, each on the real model through `torch.compile(backend="micromix")`.

    model: an unquantized causal model; it is also the reference. recipe: of that model; its statistics are split again
    for every row, and its config is the row "micromix". rows: from `row_names(dtype of the model)`.

    Raises ValueError for an unknown row, before anything runs, and RuntimeError if a quantized row turns out to be
    the unquantized model.
    """
    dtype = next(model.parameters()).dtype
    configs = [None if row == FULL_PRECISION[dtype] else row_config(row, recipe.config) for row in rows]
    for row, config in zip(rows, configs, strict=True):
        if config is None:
            full = _full_precision(row, model, recipe, windows, progress)
            yield replace(full, tasks=_run_tasks(model, tasks, windows, row, progress))
            continue
        assigned = assign(recipe, config)
        torch.compiler.reset()
        options: dict[str, Any] = {"recipe": assigned}
        compiled: LanguageModel = torch.compile(model, backend="micromix", options=options)
        result = evaluate(compiled, windows, model, label=f"compiling and evaluating {row}", progress=progress)
        if result.kl == 0.0:
            raise RuntimeError(f"row {row} equals the reference to the bit: nothing was quantized")
        yield RowResult(
            row=row,
            element_bits=assigned.element_bits,
            stored_bits=assigned.stored_bits,
            stored_bytes=assigned.stored_bytes,
            evaluation=result,
            tasks=_run_tasks(compiled, tasks, windows, row, progress),
        )
    torch.compiler.reset()


def _run_tasks(
    model: Any, tasks: Sequence[Task | HarnessTask], windows: Tensor, row: str, progress: bool
) -> tuple[TaskResult, ...]:
    return tuple(
        run_harness_task(model, task)
        if isinstance(task, HarnessTask)
        else run_task(model, task, device=windows.device, label=row, progress=progress)
        for task in tasks
    )


def _full_precision(row: str, model: nn.Module, recipe: Recipe, windows: Tensor, progress: bool) -> RowResult:
    result = evaluate(model, windows, label=f"evaluating {row}", progress=progress)
    weights = sum(linear.in_features * linear.out_features for linear in recipe.linears.values())
    item_bytes = next(model.parameters()).dtype.itemsize
    return RowResult(
        row=row,
        element_bits=8.0 * item_bytes,
        stored_bits=8.0 * item_bytes,
        stored_bytes=weights * item_bytes,
        evaluation=replace(result, kl=0.0, top1=1.0),
    )


def packed_row(
    model: LanguageModel, windows: Tensor, *, tasks: Sequence[Task | HarnessTask] = (), progress: bool = True
) -> RowResult:
    """The row of a packed checkpoint: perplexity and tasks only, for want of the unquantized model."""
    result = evaluate(model, windows, label="evaluating packed", progress=progress)
    return RowResult(row="packed", evaluation=result, tasks=_run_tasks(model, tasks, windows, "packed", progress))


def versions() -> dict[str, str]:
    """Python's and the packages' versions, torch's with its build; packages that aren't installed are left out."""
    found = {"python": platform.python_version(), "torch": str(torch.__version__)}
    for package in _VERSIONED:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, str]:
    """What this machine computes on: processor, threads, vector instructions, GPU."""
    found = {
        "cpu": _cpu_name(),
        "cpus": str(os.cpu_count()),
        "threads": str(torch.get_num_threads()),
        "vector_isa": torch.backends.cpu.get_cpu_capability(),
    }
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        found["gpu"] = f"{torch.cuda.get_device_name()} (sm_{major}{minor})"
    return found


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text("utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()

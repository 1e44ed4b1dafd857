"""The table of formats: which rows it has, and each of them measured through the compiled backend."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from micromix_compile.calibration.assignment import assign
from micromix_compile.evaluation.harness import compiled_twin, run_harness_tasks
from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.evaluation.types import NothingQuantizedError, RowResult, TaskResult
from micromix_compile.numerics.formats import FP6_FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from torch import Tensor, nn

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.evaluation.harness import HarnessTask
    from micromix_compile.evaluation.types import LanguageModel
    from micromix_compile.recipe.types import Recipe

FULL_PRECISION: Final = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
"""Name of the unquantized row in each dtype."""


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
    one_format: dict[str, Any] = {"weights": "same", "activations": "same", "rotate": "none"}
    return replace(config, policy=policy, fp6=fp6 or config.fp6, **one_format, **plain)


def evaluate_rows(
    model: nn.Module,
    recipe: Recipe | None,
    rows: Sequence[str],
    windows: Tensor,
    *,
    tasks: Sequence[HarnessTask] = (),
    responses: Path | None = None,
    progress: bool = True,
) -> Iterator[RowResult]:
    """One result per row, each on the real model through `torch.compile(backend="micromix")`.

    model: an unquantized causal model; it is also the reference. recipe: of that model; its statistics are split again
    for every row, and its config is the row "micromix". None will do where no row is quantized. rows: from
    `row_names(dtype of the model)`. responses: a folder in which answers to the tasks' questions are kept, a file a
    row, and looked up first.

    Raises ValueError for an unknown row or a quantized one without a recipe, before anything runs, and
    `NothingQuantizedError` if a quantized row turns out to be the unquantized model.
    """
    dtype = next(model.parameters()).dtype
    quantized = [row for row in rows if row != FULL_PRECISION[dtype]]
    if recipe is None and quantized:
        raise ValueError(f"a recipe must be given for the rows {', '.join(quantized)}, got None")
    configs = {} if recipe is None else {row: row_config(row, recipe.config) for row in quantized}
    measured = _Measured(windows, tasks, responses, progress)
    for row in rows:
        if recipe is None or row not in configs:
            yield _full_precision(row, model, recipe, measured)
        else:
            yield _quantized(row, model, assign(recipe, configs[row]), measured)
    torch.compiler.reset()


class _Measured(NamedTuple):
    """What every row is measured on. windows: (W, T) int64."""

    windows: Tensor
    tasks: Sequence[HarnessTask]
    responses: Path | None
    progress: bool

    def run_tasks(self, model: Any, row: str, recipe: Recipe | None = None) -> tuple[TaskResult, ...]:
        """The tasks on `model`, compiled if there is a recipe; its answers are those of `row`."""
        if not self.tasks:
            return ()
        file = None if self.responses is None else self.responses / row
        runs = model if recipe is None else compiled_twin(model, recipe)
        return run_harness_tasks(runs, self.tasks, responses=file)


def _quantized(row: str, model: nn.Module, recipe: Recipe, measured: _Measured) -> RowResult:
    torch.compiler.reset()
    options: dict[str, Any] = {"recipe": recipe}
    compiled: LanguageModel = torch.compile(model, backend="micromix", options=options)
    label = f"compiling and evaluating {row}"
    result = evaluate(compiled, measured.windows, model, label=label, progress=measured.progress)
    if result.kl == 0.0:
        raise NothingQuantizedError(f"row {row} equals the reference to the bit: nothing was quantized")
    return RowResult(
        row=row,
        element_bits=recipe.element_bits,
        stored_bits=recipe.stored_bits,
        stored_bytes=recipe.stored_bytes,
        evaluation=result,
        tasks=measured.run_tasks(model, row, recipe),
    )


def _full_precision(row: str, model: nn.Module, recipe: Recipe | None, measured: _Measured) -> RowResult:
    result = evaluate(model, measured.windows, label=f"evaluating {row}", progress=measured.progress)
    item_bytes = next(model.parameters()).dtype.itemsize
    return RowResult(
        row=row,
        element_bits=8.0 * item_bytes,
        stored_bits=8.0 * item_bytes,
        stored_bytes=None if recipe is None else recipe.parameters * item_bytes,
        evaluation=replace(result, kl=0.0, top1=1.0),
        tasks=measured.run_tasks(model, row),
    )


def packed_row(
    model: LanguageModel,
    windows: Tensor,
    *,
    tasks: Sequence[HarnessTask] = (),
    responses: Path | None = None,
    progress: bool = True,
) -> RowResult:
    """The row of a packed checkpoint: perplexity and tasks only, for want of the unquantized model."""
    result = evaluate(model, windows, label="evaluating packed", progress=progress)
    measured = _Measured(windows, tasks, responses, progress)
    return RowResult(row="packed", evaluation=result, tasks=measured.run_tasks(model, "packed"))

"""micromix eval."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import typer

from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import (
    CalibrationText,
    check_packed,
    decide,
    dtype_of,
    is_packed,
    load,
    load_recipe,
)
from micromix_compile.cli.options import (
    CALIBRATION_WINDOWS,
    EVALUATION_WINDOWS,
    TASK_BATCH,
    TASK_ITEMS,
    AllowCodeExecution,
    BatchSize,
    CalibrationWindows,
    Column,
    Data,
    DeviceOption,
    DType,
    JsonFile,
    Model,
    RecipeOption,
    Resume,
    Rows,
    Suite,
    TaskData,
    TaskItems,
    Tasks,
    WindowLength,
    Windows,
    changed,
    takes_config,
)
from micromix_compile.cli.outputs import check_beside, check_file
from micromix_compile.cli.resume import Kept, fingerprint
from micromix_compile.cli.show import console, is_json_of_results, note, table, write_json
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.harness import TaskSettings, load_harness_task
from micromix_compile.evaluation.suites import SUITES, LoadedSuite, load_suite
from micromix_compile.evaluation.task_data import TASK_DATA, resolve

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

    from micromix_compile.evaluation.harness import HarnessTask
    from micromix_compile.evaluation.types import RowResult
    from micromix_compile.recipe.types import Recipe


@takes_config
def eval_(
    context: typer.Context,
    changes: dict[str, Any],
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeOption = None,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    rows: Rows = None,
    windows: Windows = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "float32",
    device: DeviceOption = "cpu",
    suite: Suite = None,
    tasks: Tasks = None,
    task_items: TaskItems = TASK_ITEMS,
    task_data: TaskData = "auto",
    batch_size: BatchSize = TASK_BATCH,
    allow_code_execution: AllowCodeExecution = False,
    resume: Resume = None,
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity, and what is reached in tasks, in each format.

    Every row runs through the compiled backend and is compared with the unquantized model. Of a packed checkpoint,
    which has one format and no unquantized model beside it, only perplexity and tasks are measured.
    """
    if json_file is not None:
        check_file("--json", json_file, "results of evaluations", is_json_of_results)
        if resume is not None:
            check_beside("--json", json_file, "--resume", resume)
    names = _row_names(rows, dtype)
    how = _how(suite, task_items, task_data, batch_size, allow_code_execution)
    check_packed(context, model)
    recipe = load_recipe(recipe_file)
    config = changed(MicroMixConfig() if recipe is None else recipe.config, changes)
    source = CalibrationText(data=data, column=column, windows=calibration_windows, length=window_length)
    settings = _settings(model, dtype, source, recipe_file, None if is_packed(model) else config)
    kept = Kept(resume, {**settings, "device": device, "model files": fingerprint(model)})
    loaded = load(model, dtype, device)
    text = texts.load_texts(data, column=column)
    measured = texts.token_windows(text.evaluation, loaded.tokenizer, windows, window_length).to(device)
    wanted = _tasks(loaded, suite, tasks, how)
    if not is_packed(model) and _any_quantized(names):
        recipe = kept.recipe(functools.partial(decide, recipe, config, loaded, source))
    kept.claim()
    if is_packed(model):
        results = _measure_packed(loaded, measured, wanted.tasks, resume)
    else:
        results = measure(loaded, recipe, names, measured, wanted.tasks, resume)
    console().print(table(results, f"{model}, {text.name}, {windows} windows of {window_length} tokens, {dtype}"))
    if json_file is not None:
        write_json(json_file, {**settings, "windows": windows, "tasks left out": wanted.left_out}, results)


def _settings(
    model: str, dtype: str, source: CalibrationText, recipe_file: Path | None, config: MicroMixConfig | None
) -> dict[str, Any]:
    """What the numbers depend on; config is None for a packed model."""
    calibrated = recipe_file is None and config is not None
    return {
        "model": model,
        "data": source.data,
        "column": source.column,
        "window_length": source.length,
        "calibration_windows": source.windows if calibrated else None,
        "dtype": dtype,
        "recipe": None if recipe_file is None else fingerprint(recipe_file),
        "config": None if config is None else config.to_dict(),
    }


def _how(suite: str | None, items: int, data: str, batch_size: int, allow_code_execution: bool) -> TaskSettings:
    """How tasks are run. Raises UsageError for another suite or another place of data than there are."""
    if suite not in (None, *SUITES):
        raise UsageError(f"--suite must be one of {', '.join(SUITES)}, got {suite!r}")
    if data not in TASK_DATA:
        raise UsageError(f"--task-data must be one of {', '.join(TASK_DATA)}, got {data!r}")
    return TaskSettings(items=items, batch_size=batch_size, data=data, allow_code_execution=allow_code_execution)


def _row_names(given: Sequence[str] | None, dtype: str) -> tuple[str, ...]:
    """The names of the rows, checked before anything slow runs. Raises UsageError."""
    from micromix_compile.evaluation.rows import row_names

    accepted = row_names(dtype_of(dtype))
    names = tuple(name for part in given or () for name in part.split()) or accepted
    for name in names:
        if name not in accepted:
            raise UsageError(f"--rows must be among {', '.join(accepted)} for {dtype}, got {name!r}")
    return names


def _any_quantized(names: Sequence[str]) -> bool:
    from micromix_compile.evaluation.rows import FULL_PRECISION

    return not set(names) <= set(FULL_PRECISION.values())


def _tasks(loaded: zoo.LoadedModel, suite: str | None, tasks: Sequence[str] | None, how: TaskSettings) -> LoadedSuite:
    """Those of the suite, then those that are named; says what of the suite is left out."""
    if suite is not None or tasks:
        how = dataclasses.replace(how, data=resolve(how.data))
    found = LoadedSuite((), {}) if suite is None else load_suite(suite, loaded.tokenizer, how)
    for name, reason in found.left_out.items():
        typer.echo(f"left out: {name}: {reason}", err=True)
    named = [load_harness_task(name, loaded.tokenizer, how) for part in tasks or () for name in part.split()]
    return LoadedSuite((*found.tasks, *named), found.left_out)


def measure(
    loaded: zoo.LoadedModel,
    recipe: Recipe | None,
    rows: Sequence[str],
    windows: torch.Tensor,
    tasks: Sequence[HarnessTask] = (),
    responses: Path | None = None,
) -> list[RowResult]:
    """All rows; says on standard error how far it is, for people who watch a log instead of a terminal."""
    from micromix_compile.evaluation.rows import evaluate_rows

    results = []
    for result in evaluate_rows(loaded.model, recipe, rows, windows, tasks=tasks, responses=responses):
        results.append(result)
        note(f"{result.row}: perplexity {result.evaluation.perplexity:.3f}")
    return results


def _measure_packed(
    loaded: zoo.LoadedModel, windows: torch.Tensor, tasks: Sequence[HarnessTask], responses: Path | None
) -> list[RowResult]:
    from micromix_compile.evaluation.rows import packed_row

    return [packed_row(loaded.model, windows, tasks=tasks, responses=responses)]

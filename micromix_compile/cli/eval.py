"""micromix eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

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
    TASK_ITEMS,
    CalibrationWindows,
    Column,
    Data,
    DeviceOption,
    DType,
    JsonFile,
    Model,
    RecipeOption,
    WindowLength,
    Windows,
    changed,
    choices,
    takes_config,
)
from micromix_compile.cli.outputs import check_output
from micromix_compile.cli.show import console, note, table, write_json
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.harness import load_harness_task
from micromix_compile.evaluation.tasks import BUNDLED, load_task

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from micromix_compile.evaluation.harness import HarnessTask
    from micromix_compile.evaluation.tasks import Task
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
    rows: Annotated[
        list[str] | None, typer.Option(help="Rows of the table, separated by spaces or repeated; all by default.")
    ] = None,
    windows: Windows = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "float32",
    device: DeviceOption = "cpu",
    tasks: Annotated[
        list[str] | None, typer.Option(help=f"Zero-shot tasks: {choices(tuple(BUNDLED))}, or a local .jsonl file.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness, by name or as a local .yaml file.")
    ] = None,
    task_items: Annotated[int, typer.Option(min=1, help="Items of each task.")] = TASK_ITEMS,
    json_file: JsonFile = None,
) -> None:
    """Measure perplexity, and accuracy on zero-shot tasks, in each format.

    Every row runs through the compiled backend and is compared with the unquantized model. Of a packed checkpoint,
    which has one format and no unquantized model beside it, only perplexity and tasks are measured.
    """
    if json_file is not None:
        check_output("--json", json_file, is_file=True)
    names = _row_names(rows, dtype)
    check_packed(context, model)
    recipe = load_recipe(recipe_file)
    config = changed(MicroMixConfig() if recipe is None else recipe.config, changes)
    loaded = load(model, dtype, device)
    text = texts.load_texts(data, column=column)
    measured = texts.token_windows(text.evaluation, loaded.tokenizer, windows, window_length).to(device)
    wanted = _tasks(loaded, tasks, lm_eval, task_items)
    packed = is_packed(model)
    if packed:
        results = _measure_packed(loaded, measured, wanted)
    else:
        source = CalibrationText(data=data, column=column, windows=calibration_windows, length=window_length)
        results = measure(loaded, decide(recipe, config, loaded, source), names, measured, wanted)
    console().print(table(results, f"{model}, {text.name}, {windows} windows of {window_length} tokens, {dtype}"))
    if json_file is not None:
        settings = {
            "model": model,
            "data": text.name,
            "windows": windows,
            "window_length": window_length,
            "calibration_windows": None if recipe_file or packed else calibration_windows,
            "dtype": dtype,
            "config": None if packed else config.to_dict(),
        }
        write_json(json_file, settings, results)


def _row_names(given: Sequence[str] | None, dtype: str) -> tuple[str, ...]:
    """The names of the rows, checked before anything slow runs. Raises UsageError."""
    from micromix_compile.evaluation.rows import row_names

    accepted = row_names(dtype_of(dtype))
    names = tuple(name for part in given or () for name in part.split()) or accepted
    for name in names:
        if name not in accepted:
            raise UsageError(f"--rows must be among {', '.join(accepted)} for {dtype}, got {name!r}")
    return names


def _tasks(
    loaded: zoo.LoadedModel, tasks: Sequence[str] | None, lm_eval: Sequence[str] | None, items: int
) -> list[Task | HarnessTask]:
    """The first `items` of each task that the options name."""
    own = [load_task(name, loaded.tokenizer, items) for part in tasks or () for name in part.split()]
    others = [load_harness_task(name, loaded.tokenizer, items) for part in lm_eval or () for name in part.split()]
    return [*own, *others]


def measure(
    loaded: zoo.LoadedModel,
    recipe: Recipe,
    rows: Sequence[str],
    windows: torch.Tensor,
    tasks: Sequence[Task | HarnessTask] = (),
) -> list[RowResult]:
    """All rows; says on standard error how far it is, for people who watch a log instead of a terminal."""
    from micromix_compile.evaluation.rows import evaluate_rows

    results = []
    for result in evaluate_rows(loaded.model, recipe, rows, windows, tasks=tasks):
        results.append(result)
        note(f"{result.row}: perplexity {result.evaluation.perplexity:.3f}")
    return results


def _measure_packed(
    loaded: zoo.LoadedModel, windows: torch.Tensor, tasks: Sequence[Task | HarnessTask]
) -> list[RowResult]:
    from micromix_compile.evaluation.rows import packed_row

    return [packed_row(loaded.model, windows, tasks=tasks)]

"""The options that commands share. Those of the config are made from its fields."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, get_type_hints

import typer

from micromix_compile.cli.errors import UsageError
from micromix_compile.config import MicroMixConfig, Option
from micromix_compile.evaluation import zoo
from micromix_compile.evaluation.suites import SUITES
from micromix_compile.evaluation.task_data import TASK_DATA
from micromix_compile.numerics.formats import ScaleRounding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

DTYPES: Final = ("float32", "bfloat16", "float16")
EVALUATION_WINDOWS: Final = 12
CALIBRATION_WINDOWS: Final = 32
TASK_ITEMS: Final = 200
TASK_BATCH: Final = 8
CONVERTED_ACTIVATIONS: Final = ("same", "fp8", "mxfp6", "mxfp8")
DEMO_PROMPT: Final = "Explain in two sentences why the sky is blue."

CONFIG_OPTIONS: Final = {
    field.name: option for field in dataclasses.fields(MicroMixConfig) if (option := Option.of(field)).help_text
}
"""The fields of the config that commands take, in the order in which they take them."""

NOT_FOR_PACKED: Final = (*CONFIG_OPTIONS, "recipe_file", "rows", "which", "compiled")
"""Parameters of commands that say what is done to a model that is not packed yet."""

_COMMAND_LINE_TYPES: Final[dict[Any, Any]] = {ScaleRounding: str, tuple[str, ...]: list[str]}
"""What stands for the type of a field that the command line has not: names, and options that are repeated."""


def choices(values: Sequence[object]) -> str:
    """Values, as help texts list them."""
    return " | ".join(map(str, values))


Model = Annotated[str, typer.Option(help=f"{zoo.DEFAULT_MODEL}, or a local Hugging Face directory.")]
Data = Annotated[str, typer.Option(help="Text: wiki, c4, technical, or a local .txt, .jsonl, .json or .parquet file.")]
Column = Annotated[str, typer.Option(help="The column that holds the text, for files of rows.")]
DType = Annotated[str, typer.Option(help=f"{choices(DTYPES)}.")]
DeviceOption = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
Windows = Annotated[int, typer.Option(min=1, help="Windows of evaluation text.")]
CalibrationWindows = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
RecipeOption = Annotated[Path | None, typer.Option("--recipe", help="A recipe to use instead of calibrating.")]
NewRecipe = Annotated[Path, typer.Option(help="File to write the recipe to (safetensors).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")]
NewCheckpoint = Annotated[Path, typer.Option(help="Directory to write the packed checkpoint to.")]
Source = Annotated[
    Path, typer.Argument(help="Directory quantized by compressed-tensors or ModelOpt, or a packed checkpoint.")
]
Destination = Annotated[Path, typer.Argument(help="Directory to write its twin to.")]
ConvertedActivations = Annotated[
    str | None,
    typer.Option(help=f"Round activations to these, not as the checkpoint says: {choices(CONVERTED_ACTIVATIONS)}."),
]
Rows = Annotated[
    list[str] | None, typer.Option(help="Rows of the table, separated by spaces or repeated; all by default.")
]
Suite = Annotated[str | None, typer.Option(help=f"A set of tasks of lm-eval: {choices(tuple(SUITES))}.")]
Tasks = Annotated[
    list[str] | None, typer.Option(help="Tasks or groups of lm-eval, by name or as a local .yaml file; repeatable.")
]
TaskItems = Annotated[int, typer.Option(min=1, help="Items of each task; a group shares them out.")]
TaskData = Annotated[str, typer.Option(help=f"Where tasks get their data: {choices(TASK_DATA)}.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Sequences of a task at once.")]
AllowCodeExecution = Annotated[
    bool, typer.Option("--allow-code-execution", help="Run programs that the model wrote, for tasks of code.")
]
Resume = Annotated[
    Path | None, typer.Option(help="Directory that keeps answers, so that the same command goes on where it stopped.")
]
JsonFile = Annotated[Path | None, typer.Option("--json", help="File to write the results to.")]
Prompt = Annotated[str, typer.Option(help="What to continue or, with a chat template, to answer.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]


def takes_config(command: Callable[..., None]) -> Callable[..., None]:
    """A command with the options of the config at its end; it gets those that were given as `changes`, by name."""

    @functools.wraps(command)
    def run(**given: Any) -> None:
        options = {name: given.pop(name) for name in CONFIG_OPTIONS}
        command(**given, changes={name: value for name, value in options.items() if value not in (None, [])})

    hints = get_type_hints(command, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in inspect.signature(command).parameters.values()]
    parameters = [*(p for p in own if p.name != "changes"), *map(_parameter, CONFIG_OPTIONS, CONFIG_OPTIONS.values())]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in parameters}
    return run


def _parameter(name: str, option: Option) -> inspect.Parameter:
    """One that is None, or without elements, unless it was given."""
    hint = get_type_hints(MicroMixConfig)[name]
    text = f"{option.help_text}: {choices(option.choices)}." if option.choices else f"{option.help_text}."
    kind: Any = _COMMAND_LINE_TYPES.get(hint, hint)
    annotation: Any = Annotated[kind | None, typer.Option(help=text)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def changed(base: MicroMixConfig, changes: dict[str, Any]) -> MicroMixConfig:
    """`base` with the options that were given. Raises UsageError."""
    try:
        return dataclasses.replace(base, **changes)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error

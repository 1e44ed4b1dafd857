"""micromix quantize."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import typer

from micromix_compile import files
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import CalibrationText, decide, load, load_recipe
from micromix_compile.cli.options import (
    CALIBRATION_WINDOWS,
    CalibrationWindows,
    Column,
    Data,
    DeviceOption,
    DType,
    Model,
    NewCheckpoint,
    Overwrite,
    RecipeOption,
    WindowLength,
    changed,
    takes_config,
)
from micromix_compile.cli.outputs import check_output, check_replaceable
from micromix_compile.cli.show import status, summary
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    from pathlib import Path

    from micromix_compile.recipe.types import Recipe


@takes_config
def quantize(
    out: NewCheckpoint,
    changes: dict[str, Any],
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeOption = None,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: DeviceOption = "cpu",
    overwrite: Overwrite = False,
) -> None:
    """Write a checkpoint with packed linear layers.

    It is calibrated first unless a recipe is given, and loads with transformers.
    """
    target = files.plain_path(out)
    if os.path.lexists(target):
        if not overwrite:
            raise UsageError(f"{out} exists; --overwrite replaces it")
        check_replaceable(target)
    check_output("--out", out, is_file=False)
    recipe = load_recipe(recipe_file)
    config = changed(MicroMixConfig() if recipe is None else recipe.config, changes)
    loaded = load(model, dtype, device)
    text = CalibrationText(data=data, column=column, windows=windows, length=window_length)
    recipe = decide(recipe, config, loaded, text)
    _write_packed(loaded, recipe, target)
    typer.echo(f"{out}: {summary(recipe)}")


def _write_packed(loaded: zoo.LoadedModel, recipe: Recipe, target: Path) -> None:
    """Packing changes the model in place. Raises UsageError if `target` is something else by now."""
    import micromix_compile as micromix

    with status("packing"), files.replace_directory(target) as directory:
        micromix.quantize_(loaded.model, recipe)
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)
        if os.path.lexists(target):
            check_replaceable(target)

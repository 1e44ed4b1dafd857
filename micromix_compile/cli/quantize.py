"""micromix quantize."""

from __future__ import annotations

import functools
from typing import Any

import typer

from micromix_compile import files
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
from micromix_compile.cli.outputs import check_directory
from micromix_compile.cli.show import status, summary
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo


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
    import micromix_compile as micromix

    check = functools.partial(check_directory, "--out", out, overwrite=overwrite, made_from=recipe_file)
    check()
    recipe = load_recipe(recipe_file)
    config = changed(MicroMixConfig() if recipe is None else recipe.config, changes)
    loaded = load(model, dtype, device)
    text = CalibrationText(data=data, column=column, windows=windows, length=window_length)
    recipe = decide(recipe, config, loaded, text)
    with status("packing"), files.replace_directory(out) as directory:
        micromix.quantize_(loaded.model, recipe)
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)
        check()
    typer.echo(f"{out}: {summary(recipe)}")

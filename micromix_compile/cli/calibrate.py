"""micromix calibrate."""

from __future__ import annotations

from typing import Any

import typer

from micromix_compile.cli.models import CalibrationText, decide, load
from micromix_compile.cli.options import (
    CALIBRATION_WINDOWS,
    CalibrationWindows,
    Column,
    Data,
    DeviceOption,
    DType,
    Model,
    NewRecipe,
    WindowLength,
    changed,
    takes_config,
)
from micromix_compile.cli.outputs import check_file
from micromix_compile.cli.show import summary
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo
from micromix_compile.recipe.file import is_recipe


@takes_config
def calibrate(
    out: NewRecipe,
    changes: dict[str, Any],
    model: Model = zoo.DEFAULT_MODEL,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Measure activations on text; write a recipe."""
    check_file("--out", out, "recipes", is_recipe)
    config = changed(MicroMixConfig(), changes)
    loaded = load(model, dtype, device)
    text = CalibrationText(data=data, column=column, windows=windows, length=window_length)
    recipe = decide(None, config, loaded, text)
    recipe.save(out)
    typer.echo(f"{out}: {summary(recipe)}")

"""The model that a command works on, and the recipe for it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.options import DTYPES, NOT_FOR_PACKED
from micromix_compile.cli.show import note
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    import torch
    import typer

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.types import Recipe


def load(model: str, dtype: str, device: str) -> zoo.LoadedModel:
    """The model of the options. Raises UsageError for another dtype or device."""
    return zoo.load_model(model, dtype_of(dtype), device=_device(device))


def dtype_of(name: str) -> torch.dtype:
    """The dtype of the option. Raises UsageError."""
    import torch

    if name not in DTYPES:
        raise UsageError(f"--dtype must be one of {', '.join(DTYPES)}, got {name!r}")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _device(name: str) -> torch.device:
    import torch

    accepted = ["cpu"]
    if torch.accelerator.is_available() and (found := torch.accelerator.current_accelerator()) is not None:
        accepted += [found.type, *(f"{found.type}:{index}" for index in range(torch.accelerator.device_count()))]
    if name not in accepted:
        raise UsageError(f"--device must be one of {', '.join(accepted)} here, got {name!r}")
    return torch.device(name)


def is_packed(model: str) -> bool:
    """Whether the model of the option is a packed checkpoint."""
    directory = Path(model).expanduser()
    return model != zoo.DEFAULT_MODEL and (directory / "config.json").is_file() and zoo.is_packed(directory)


def check_packed(context: typer.Context, model: str) -> None:
    """Raises UsageError if `model` is packed and an option was given that cannot apply to it any more."""
    for option in context.command.params if is_packed(model) else ():
        source = context.get_parameter_source(option.name) if option.name in NOT_FOR_PACKED else None
        if source is not None and source.name != "DEFAULT":
            name = "/".join((*option.opts, *option.secondary_opts))
            raise UsageError(f"{name} needs a model that is not packed yet, and {model} is packed already")


def load_recipe(path: Path | None) -> Recipe | None:
    """The recipe of the option, if there is one."""
    import micromix_compile as micromix

    return None if path is None else micromix.Recipe.load(path)


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationText:
    """What is calibrated on without a recipe: the first `windows` windows of a text, each of `length` tokens."""

    data: str
    column: str = "text"
    windows: int
    length: int

    def batches(self, loaded: zoo.LoadedModel) -> tuple[torch.Tensor, ...]:
        """(1, length) tokens of the model, window by window, on its device."""
        text = texts.load_texts(self.data, column=self.column)
        tokens = texts.token_windows(text.calibration, loaded.tokenizer, self.windows, self.length)
        batches: tuple[torch.Tensor, ...] = tokens.to(loaded.model.device).split(1)
        return batches


def decide(recipe: Recipe | None, config: MicroMixConfig, loaded: zoo.LoadedModel, text: CalibrationText) -> Recipe:
    """The given recipe, its splits solved again under `config`; or one that is calibrated on the text."""
    import micromix_compile as micromix

    if recipe is not None:
        return micromix.assign(recipe, config) if config != recipe.config else recipe
    batches = text.batches(loaded)
    note(f"calibrating on {text.windows} windows of {text.length} tokens")
    return micromix.calibrate(loaded.model, batches, config)

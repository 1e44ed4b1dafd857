"""micromix calibrate: the recipe that it writes, and the text that it reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

import micromix_compile as micromix
from micromix_compile.evaluation import texts

if TYPE_CHECKING:
    from pathlib import Path

    import torch

    from micromix_compile.recipe.types import Recipe
from support.command_line import SHORT, run, run_well
from support.models import default_tokenizer


def test_calibrate_writes_a_recipe_with_the_options_it_was_given(recipe_file: Path) -> None:
    """The recipe says what it was made with."""
    recipe = micromix.Recipe.load(recipe_file)
    assert recipe.config.fp6 == "e3m2"
    assert len(recipe.linears) == 7
    assert not any("lm_head" in name for name in recipe.linears)


@pytest.mark.parametrize("data", ["wiki", "c4", "technical"])
def test_calibration_never_reads_evaluation_text(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """Whatever reaches the model is looked for in the evaluation articles: all windows, with gradients and without."""
    seen: list[torch.Tensor] = []
    calibrate = micromix.calibrate

    def spy(model: torch.nn.Module, batches: tuple[torch.Tensor, ...], *rest: object, **options: object) -> Recipe:
        def note(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
            seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])  # type: ignore[arg-type]

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return calibrate(model, batches, *rest, **options)  # type: ignore[arg-type]
        finally:
            handle.remove()

    monkeypatch.setattr(micromix, "calibrate", spy)
    options = ("--policy", "budget", "--weight-rounding", "gptq", "--windows", 10)
    run_well("calibrate", "--model", small_model, "--data", data, "--out", tmp_path / "r", *options)
    text = texts.load_texts(data)
    tokenizer = default_tokenizer()
    shown = [tokenizer.decode(ids) for batch in seen for ids in batch]
    assert len(shown) == 10 + 8  # 4,096 tokens are run backward too
    calibration, evaluated = "\n\n".join(text.calibration), "\n\n".join(text.evaluation)
    for window in shown:
        pieces = [window[i : i + 200] for i in range(20, len(window) - 220, 50)]
        assert sum(piece in calibration for piece in pieces) > 0.9 * len(pieces)
        assert not any(piece in evaluated for piece in pieces)


def test_parents_of_an_output_are_made_only_when_it_is_written(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that fails first leaves none."""
    path = tmp_path / "new" / "deeper" / "r"
    arguments = ("--model", small_model, "--windows", 1, *SHORT, "--weight-rounding", "nearest", "--out", path)
    assert run("calibrate", *arguments, "--data", "books").exit_code == 1
    assert not list(tmp_path.iterdir())
    run_well("calibrate", *arguments)
    assert path.is_file()

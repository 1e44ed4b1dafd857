"""micromix demo."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from micromix_compile.cli.eval import measure
from micromix_compile.cli.generate import write_text, write_text_quantized
from micromix_compile.cli.models import CalibrationText, decide, load
from micromix_compile.cli.options import (
    CALIBRATION_WINDOWS,
    DEMO_PROMPT,
    EVALUATION_WINDOWS,
    CalibrationWindows,
    MaxNewTokens,
    Prompt,
    Windows,
)
from micromix_compile.cli.report import check_page, devices, write_page
from micromix_compile.cli.show import console, print_text, table
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    from micromix_compile.recipe.types import Recipe

DEMO_ROWS: Final = ("bf16", "mxfp8", "mxfp6-e2m3", "mxfp4", "micromix")
GPUS: Final = ("sm_90", "sm_100", "sm_120")
"""Of which the report names the kernels."""


def demo(
    windows: Windows = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    prompt: Prompt = DEMO_PROMPT,
    max_new_tokens: MaxNewTokens = 48,
    page: Annotated[Path, typer.Option("--report", help="File to write the report to.")] = Path("micromix-report.html"),
) -> None:
    """Do all of it once, on the default model, and write a page about it."""
    start = time.perf_counter()
    check_page("--report", page, overwrite=True)
    loaded = load(zoo.DEFAULT_MODEL, "bfloat16", "cpu")
    data, length = texts.DEFAULT_DATA, texts.WINDOW_LENGTH
    text = CalibrationText(data=data, windows=calibration_windows, length=length)
    recipe = decide(None, MicroMixConfig(), loaded, text)
    measured = texts.token_windows(texts.load_texts(data).evaluation, loaded.tokenizer, windows, length)
    results = measure(loaded, recipe, DEMO_ROWS, measured)
    console().print(table(results, f"{zoo.DEFAULT_MODEL}, {data}, {windows} windows of {length} tokens, bfloat16"))
    print_text("BF16", write_text(loaded, prompt, max_new_tokens))
    print_text("MicroMix", write_text_quantized(loaded, recipe, prompt, max_new_tokens, compiled=False))
    _write_report(page, recipe)
    typer.echo(f"\nfinished in {time.perf_counter() - start:.0f} s")


def _write_report(path: Path, recipe: Recipe) -> None:
    from micromix_compile.report.facts import of_recipe

    facts = of_recipe(recipe, zoo.DEFAULT_MODEL)
    write_page(path, facts, devices(facts, GPUS))
    typer.echo(f"\nformats, bytes, costs and kernels in pictures: {path.resolve()}")

"""micromix demo."""

from __future__ import annotations

import time
from typing import Final

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
from micromix_compile.cli.show import console, print_text, table
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo

DEMO_ROWS: Final = ("bf16", "mxfp8", "mxfp6-e2m3", "mxfp4", "micromix")


def demo(
    windows: Windows = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    prompt: Prompt = DEMO_PROMPT,
    max_new_tokens: MaxNewTokens = 48,
) -> None:
    """Do all of it once, on the default model."""
    start = time.perf_counter()
    loaded = load(zoo.DEFAULT_MODEL, "bfloat16", "cpu")
    data, length = texts.DEFAULT_DATA, texts.WINDOW_LENGTH
    text = CalibrationText(data=data, windows=calibration_windows, length=length)
    recipe = decide(None, MicroMixConfig(), loaded, text)
    measured = texts.token_windows(texts.load_texts(data).evaluation, loaded.tokenizer, windows, length)
    results = measure(loaded, recipe, DEMO_ROWS, measured)
    console().print(table(results, f"{zoo.DEFAULT_MODEL}, {data}, {windows} windows of {length} tokens, bfloat16"))
    print_text("BF16", write_text(loaded, prompt, max_new_tokens))
    print_text("MicroMix", write_text_quantized(loaded, recipe, prompt, max_new_tokens, compiled=False))
    typer.echo(f"\nfinished in {time.perf_counter() - start:.0f} s")

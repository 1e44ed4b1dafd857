"""micromix generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import CalibrationText, check_packed, decide, is_packed, load, load_recipe
from micromix_compile.cli.options import (
    CALIBRATION_WINDOWS,
    DEMO_PROMPT,
    CalibrationWindows,
    Column,
    Data,
    DeviceOption,
    DType,
    MaxNewTokens,
    Model,
    Prompt,
    RecipeOption,
    WindowLength,
    changed,
    takes_config,
)
from micromix_compile.cli.show import print_text, status
from micromix_compile.config import MicroMixConfig
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    from transformers import BatchEncoding

    from micromix_compile.recipe.types import Recipe


@takes_config
def generate(
    context: typer.Context,
    changes: dict[str, Any],
    prompt: Prompt = DEMO_PROMPT,
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeOption = None,
    which: Annotated[str, typer.Option(help="full | micromix | both.")] = "both",
    max_new_tokens: MaxNewTokens = 48,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Through torch.compile: slower to start, faster per token.")
    ] = False,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: DeviceOption = "cpu",
) -> None:
    """Write text greedily, unquantized and quantized."""
    if which not in ("full", "micromix", "both"):
        raise UsageError(f"--which must be full, micromix or both, got {which!r}")
    check_packed(context, model)
    recipe = load_recipe(recipe_file)
    config = changed(MicroMixConfig() if recipe is None else recipe.config, changes)
    loaded = load(model, dtype, device)
    _encode(loaded, prompt)  # refuses it before anything slow runs
    if is_packed(model):
        print_text("packed", write_text(loaded, prompt, max_new_tokens))
        return
    if which != "micromix":
        print_text(dtype, write_text(loaded, prompt, max_new_tokens))
    if which == "full":
        return
    text = CalibrationText(data=data, column=column, windows=windows, length=window_length)
    recipe = decide(recipe, config, loaded, text)
    print_text("MicroMix", write_text_quantized(loaded, recipe, prompt, max_new_tokens, compiled=compiled))


def write_text(loaded: zoo.LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt, or answer to it where the tokenizer has a chat template."""
    import torch

    inputs, tokenizer = _encode(loaded, prompt), loaded.tokenizer
    with status("generating"), torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            cache_implementation="static",
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _encode(loaded: zoo.LoadedModel, prompt: str) -> BatchEncoding:
    """The prompt's tokens, on the model's device. Raises UsageError if there are none."""
    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise UsageError(f"--prompt must have a token at least for a model without a chat template, got {prompt!r}")
    return inputs.to(loaded.model.device)


def write_text_quantized(
    loaded: zoo.LoadedModel, recipe: Recipe, prompt: str, max_new_tokens: int, *, compiled: bool
) -> str:
    """Greedy text from the packed model, or from the compiled one. Packing changes the model in place."""
    import torch

    import micromix_compile as micromix

    if compiled:
        options: dict[str, Any] = {"recipe": recipe}
        loaded.model.forward = torch.compile(loaded.model.forward, backend="micromix", options=options)
    else:
        micromix.quantize_(loaded.model, recipe)
    return write_text(loaded, prompt, max_new_tokens)

"""The command line: `micromix calibrate | quantize | eval | generate | doctor | demo`.

Tables and texts go to standard output, progress to standard error. What the user did wrong is one line on standard
error: exit code 2 for a wrong option, 1 for anything else.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import platform
import stat
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from rich.console import Console
from rich.table import Table

from micromix_compile import files
from micromix_compile.config import (
    GRANULARITIES,
    POLICIES,
    TARGET_KINDS,
    UNIFORM_ORDERS,
    WEIGHT_MODES,
    WEIGHT_ROUNDINGS,
    MicroMixConfig,
)
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.harness import load_harness_task
from micromix_compile.evaluation.tasks import BUNDLED, load_task
from micromix_compile.numerics.formats import FP6_FORMATS, ScaleRounding

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from micromix_compile.evaluation.evaluation import RowResult
    from micromix_compile.evaluation.harness import HarnessTask
    from micromix_compile.evaluation.tasks import Task
    from micromix_compile.recipe.types import Recipe

logger = logging.getLogger("micromix_compile")

app = typer.Typer(
    name="micromix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

DTYPES: Final = ("float32", "bfloat16", "float16")
EVALUATION_WINDOWS: Final = 12
CALIBRATION_WINDOWS: Final = 32
TASK_ITEMS: Final = 200
DEMO_PROMPT: Final = "Explain in two sentences why the sky is blue."
CONFIG_OPTIONS: Final = (
    *("policy", "target_bits", "target_kind", "lam", "fp6", "weights", "scale_rounding", "weight_rounding"),
    *("scale_search", "uniform_order", "granularity", "skip"),
)
"""The fields of the config that commands take, in the order in which they take them."""
NOT_FOR_PACKED: Final = (*CONFIG_OPTIONS, "recipe_file", "rows", "which", "compiled")
"""Parameters of commands that say what is done to a model that is not packed yet."""

USER_ERRORS: Final = (ValueError, OSError, ModuleNotFoundError)


class UsageError(Exception):
    """An option's value is wrong, or options contradict each other."""


def _choices(values: Sequence[object]) -> str:
    return " | ".join(map(str, values))


Model = Annotated[str, typer.Option(help=f"{zoo.DEFAULT_MODEL}, or a local Hugging Face directory.")]
Data = Annotated[str, typer.Option(help="Text: wiki, c4, technical, or a local .txt, .jsonl, .json or .parquet file.")]
Column = Annotated[str, typer.Option(help="The column that holds the text, for files of rows.")]
DType = Annotated[str, typer.Option(help=f"{_choices(DTYPES)}.")]
Device = Annotated[str, typer.Option(help="Where the model runs, such as cpu or cuda.")]
WindowLength = Annotated[int, typer.Option(min=2, help="Tokens in a window.")]
CalibrationWindows = Annotated[int, typer.Option(min=1, help="Windows of calibration text.")]
RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="A recipe to use instead of calibrating.")]
Prompt = Annotated[str, typer.Option(help="What to continue or, with a chat template, to answer.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="Tokens to generate.")]
Policy = Annotated[str | None, typer.Option(help=f"How channels are split: {_choices(POLICIES)}.")]
TargetBits = Annotated[float | None, typer.Option(help="What the policy budget may spend on average.")]
TargetKind = Annotated[str | None, typer.Option(help=f"The bits that the target counts: {_choices(TARGET_KINDS)}.")]
WeightRounding = Annotated[str | None, typer.Option(help=f"How weights are rounded: {_choices(WEIGHT_ROUNDINGS)}.")]
ScaleSearch = Annotated[
    bool | None, typer.Option("--scale-search/--no-scale-search", help="Choose the scales of weights by error.")
]
UniformOrder = Annotated[
    str | None, typer.Option(help=f"Order of channels that all have one format: {_choices(UNIFORM_ORDERS)}.")
]
Lam = Annotated[float | None, typer.Option(help="Factor on the thresholds; larger means more MXFP4.")]
FP6 = Annotated[str | None, typer.Option(help=f"The MXFP6 element format: {_choices(FP6_FORMATS)}.")]
Weights = Annotated[str | None, typer.Option(help=f"Formats of the weights: {_choices(WEIGHT_MODES)}.")]
Rounding = Annotated[str | None, typer.Option(help=f"How block scales are rounded: {_choices(tuple(ScaleRounding))}.")]
Granularity = Annotated[int | None, typer.Option(help=f"Channel counts are multiples of: {_choices(GRANULARITIES)}.")]
Skip = Annotated[list[str] | None, typer.Option(help="Names (fnmatch) of linears to leave as they are; repeatable.")]


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Registers a command whose user errors end in one line instead of a traceback."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> None:
            try:
                function(*args, **kwargs)
            except Exception as error:
                code, message = exit_of(error)
                if message is None:
                    raise
                logger.debug("where the error came from", exc_info=True)
                typer.echo(f"micromix {name}: {message}", err=True)
                raise typer.Exit(code) from None

        return app.command(name)(run)

    return register


def _print_version(wanted: bool) -> None:
    if wanted:
        import torch

        import micromix_compile as micromix

        typer.echo(f"micromix {micromix.__version__}, torch {torch.__version__}, Python {platform.python_version()}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show versions and exit.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show the log, and where errors come from.")] = False,
) -> None:
    """Run the linear layers of a language model in a per-channel mix of MXFP4, MXFP6 and MXFP8."""
    assert not version, "it ends the program"
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logger.setLevel(logging.DEBUG)


def exit_of(error: Exception) -> tuple[int, str | None]:
    """(exit code, line to print); no line for errors that aren't the user's."""
    from torch._dynamo.exc import BackendCompilerFailed

    if isinstance(error, BackendCompilerFailed):
        error = error.inner_exception
    if isinstance(error, UsageError):
        return 2, str(error)
    if isinstance(error, USER_ERRORS):
        return 1, " ".join(str(error).split()) or type(error).__name__
    return 1, None


@_command("calibrate")
def calibrate(
    out: Annotated[Path, typer.Option(help="File to write the recipe to (safetensors).")],
    model: Model = zoo.DEFAULT_MODEL,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: Device = "cpu",
    policy: Policy = None,
    target_bits: TargetBits = None,
    target_kind: TargetKind = None,
    lam: Lam = None,
    fp6: FP6 = None,
    weights: Weights = None,
    scale_rounding: Rounding = None,
    weight_rounding: WeightRounding = None,
    scale_search: ScaleSearch = None,
    uniform_order: UniformOrder = None,
    granularity: Granularity = None,
    skip: Skip = None,
) -> None:
    """Measure activations on text; write a recipe."""
    _check_output("--out", out, is_file=True)
    chosen = (policy, target_bits, target_kind, lam, fp6, weights, scale_rounding, weight_rounding, scale_search)
    config = _config(MicroMixConfig(), *chosen, uniform_order, granularity, skip)
    loaded = _load(model, dtype, device)
    recipe = _decide(None, config, loaded, data, column, windows, window_length)
    recipe.save(out)
    typer.echo(f"{out}: {_summary(recipe)}")


@_command("quantize")
def quantize(
    out: Annotated[Path, typer.Option(help="Directory to write the packed checkpoint to.")],
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeFile = None,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: Device = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the directory if it exists.")] = False,
    policy: Policy = None,
    target_bits: TargetBits = None,
    target_kind: TargetKind = None,
    lam: Lam = None,
    fp6: FP6 = None,
    weights: Weights = None,
    scale_rounding: Rounding = None,
    weight_rounding: WeightRounding = None,
    scale_search: ScaleSearch = None,
    uniform_order: UniformOrder = None,
    granularity: Granularity = None,
    skip: Skip = None,
) -> None:
    """Write a checkpoint with packed linear layers.

    It is calibrated first unless a recipe is given, and loads with transformers.
    """
    import micromix_compile as micromix

    target = files.plain_path(out)
    if os.path.lexists(target):
        if not overwrite:
            raise UsageError(f"{out} exists; --overwrite replaces it")
        _check_replaceable(target)
    _check_output("--out", out, is_file=False)
    recipe = _load_recipe(recipe_file)
    base = MicroMixConfig() if recipe is None else recipe.config
    chosen = (policy, target_bits, target_kind, lam, fp6, weights, scale_rounding, weight_rounding, scale_search)
    config = _config(base, *chosen, uniform_order, granularity, skip)
    loaded = _load(model, dtype, device)
    recipe = _decide(recipe, config, loaded, data, column, windows, window_length)
    with _status("packing"), files.replace_directory(target) as directory:
        micromix.quantize_(loaded.model, recipe)
        loaded.model.save_pretrained(directory)
        loaded.tokenizer.save_pretrained(directory)
        if os.path.lexists(target):
            _check_replaceable(target)  # it may be another by now
    typer.echo(f"{out}: {_summary(recipe)}")


@_command("eval")
def eval_(
    context: typer.Context,
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeFile = None,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    rows: Annotated[
        list[str] | None, typer.Option(help="Rows of the table, separated by spaces or repeated; all by default.")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="Windows of evaluation text.")] = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "float32",
    device: Device = "cpu",
    tasks: Annotated[
        list[str] | None, typer.Option(help=f"Zero-shot tasks: {_choices(tuple(BUNDLED))}, or a local .jsonl file.")
    ] = None,
    lm_eval: Annotated[
        list[str] | None, typer.Option(help="Tasks of lm-evaluation-harness, by name or as a local .yaml file.")
    ] = None,
    task_items: Annotated[int, typer.Option(min=1, help="Items of each task.")] = TASK_ITEMS,
    json_file: Annotated[Path | None, typer.Option("--json", help="File to write the results to.")] = None,
    policy: Policy = None,
    target_bits: TargetBits = None,
    target_kind: TargetKind = None,
    lam: Lam = None,
    fp6: FP6 = None,
    weights: Weights = None,
    scale_rounding: Rounding = None,
    weight_rounding: WeightRounding = None,
    scale_search: ScaleSearch = None,
    uniform_order: UniformOrder = None,
    granularity: Granularity = None,
    skip: Skip = None,
) -> None:
    """Measure perplexity, and accuracy on zero-shot tasks, in each format.

    Every row runs through the compiled backend and is compared with the unquantized model. Of a packed checkpoint,
    which has one format and no unquantized model beside it, only perplexity and tasks are measured.
    """
    from micromix_compile.evaluation import evaluation

    if json_file is not None:
        _check_output("--json", json_file, is_file=True)
    names = _rows(rows, dtype)
    _check_packed(context, model)
    recipe = _load_recipe(recipe_file)
    base = MicroMixConfig() if recipe is None else recipe.config
    chosen = (policy, target_bits, target_kind, lam, fp6, weights, scale_rounding, weight_rounding, scale_search)
    config = _config(base, *chosen, uniform_order, granularity, skip)
    loaded = _load(model, dtype, device)
    text = texts.load_texts(data, column=column)
    measured = texts.token_windows(text.evaluation, loaded.tokenizer, windows, window_length).to(device)
    wanted = _tasks(loaded, tasks, lm_eval, task_items)
    if _is_packed(model):
        results = [evaluation.packed_row(loaded.model, measured, tasks=wanted)]
    else:
        recipe = _decide(recipe, config, loaded, data, column, calibration_windows, window_length)
        results = _measure(loaded, recipe, names, measured, wanted)
    _console().print(_table(results, f"{model}, {text.name}, {windows} windows of {window_length} tokens, {dtype}"))
    if json_file is not None:
        settings = {
            "model": model,
            "data": text.name,
            "windows": windows,
            "window_length": window_length,
            "calibration_windows": None if recipe_file or _is_packed(model) else calibration_windows,
            "dtype": dtype,
            "config": None if _is_packed(model) else config.to_dict(),
        }
        _write_json(json_file, settings, results)


@_command("generate")
def generate(
    context: typer.Context,
    prompt: Prompt = DEMO_PROMPT,
    model: Model = zoo.DEFAULT_MODEL,
    recipe_file: RecipeFile = None,
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
    device: Device = "cpu",
    policy: Policy = None,
    target_bits: TargetBits = None,
    target_kind: TargetKind = None,
    lam: Lam = None,
    fp6: FP6 = None,
    weights: Weights = None,
    scale_rounding: Rounding = None,
    weight_rounding: WeightRounding = None,
    scale_search: ScaleSearch = None,
    uniform_order: UniformOrder = None,
    granularity: Granularity = None,
    skip: Skip = None,
) -> None:
    """Write text greedily, unquantized and quantized."""
    if which not in ("full", "micromix", "both"):
        raise UsageError(f"--which must be full, micromix or both, got {which!r}")
    _check_packed(context, model)
    recipe = _load_recipe(recipe_file)
    base = MicroMixConfig() if recipe is None else recipe.config
    chosen = (policy, target_bits, target_kind, lam, fp6, weights, scale_rounding, weight_rounding, scale_search)
    config = _config(base, *chosen, uniform_order, granularity, skip)
    loaded = _load(model, dtype, device)
    if _is_packed(model):
        _print_text("packed", _generate(loaded, prompt, max_new_tokens))
        return
    if which != "micromix":
        _print_text(dtype, _generate(loaded, prompt, max_new_tokens))
    if which == "full":
        return
    recipe = _decide(recipe, config, loaded, data, column, windows, window_length)
    _print_text("MicroMix", _generate_quantized(loaded, recipe, prompt, max_new_tokens, compiled))


@_command("doctor")
def doctor() -> None:
    """Say what this machine will run.

    The exit code is 1 if the backend isn't registered.
    """
    import torch._dynamo

    from micromix_compile.evaluation import evaluation
    from micromix_compile.targets import cpu, target

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (*evaluation.versions().items(), *evaluation.hardware().items()):
        table.add_row(name, value)
    registered = "micromix" in torch._dynamo.list_backends()
    table.add_row("backend", "registered" if registered else "not registered: pip install micromix-compile")
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        with _status(f"looking at {device}"):
            found = target.target_of(torch.device(device))
        table.add_row(f"runs on {device}", found.name if found.emulated is None else f"plain PyTorch: {found.emulated}")
    for name, value in dataclasses.asdict(cpu.status()).items():
        if value not in ("", None):
            table.add_row(f"native {name}", str(value))
    table.add_row("model cache", str(zoo.cache_dir()))
    _console().print(table)
    if not registered:
        raise typer.Exit(1)


@_command("demo")
def demo(
    windows: Annotated[int, typer.Option(min=1, help="Windows of evaluation text.")] = EVALUATION_WINDOWS,
    calibration_windows: CalibrationWindows = CALIBRATION_WINDOWS,
    prompt: Prompt = DEMO_PROMPT,
    max_new_tokens: MaxNewTokens = 48,
) -> None:
    """Do all of it once, on the default model."""
    start = time.perf_counter()
    loaded = _load(zoo.DEFAULT_MODEL, "bfloat16", "cpu")
    data, length = texts.DEFAULT_DATA, texts.WINDOW_LENGTH
    recipe = _decide(None, MicroMixConfig(), loaded, data, "text", calibration_windows, length)
    measured = texts.token_windows(texts.load_texts(data).evaluation, loaded.tokenizer, windows, length)
    results = _measure(loaded, recipe, DEMO_ROWS, measured)
    _console().print(_table(results, f"{zoo.DEFAULT_MODEL}, {data}, {windows} windows of {length} tokens, bfloat16"))
    _print_text("BF16", _generate(loaded, prompt, max_new_tokens))
    _print_text("MicroMix", _generate_quantized(loaded, recipe, prompt, max_new_tokens, compiled=False))
    typer.echo(f"\nfinished in {time.perf_counter() - start:.0f} s")


DEMO_ROWS: Final = ("bf16", "mxfp8", "mxfp6-e2m3", "mxfp4", "micromix")


def _config(base: MicroMixConfig, *given: object) -> MicroMixConfig:
    """`base` with the options that were given, in the order of CONFIG_OPTIONS; None is none. Raises UsageError."""
    options = dict(zip(CONFIG_OPTIONS, given, strict=True))
    values: dict[str, Any] = {name: value for name, value in options.items() if value not in (None, [])}
    try:
        return dataclasses.replace(base, **values)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error


def _console() -> Console:
    """Standard output, wide enough for a table where it is a file."""
    return Console(width=None if sys.stdout.isatty() else 150)


def _rows(given: Sequence[str] | None, dtype: str) -> tuple[str, ...]:
    """The names of the rows, checked before anything slow runs. Raises UsageError."""
    from micromix_compile.evaluation import evaluation

    accepted = evaluation.row_names(_dtype(dtype))
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


def _dtype(name: str) -> torch.dtype:
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


def _check_output(option: str, path: Path, *, is_file: bool) -> None:
    """Raises UsageError unless `path` can be written, its parents being made if need be; writes nothing that stays."""
    if is_file and path.is_dir():
        raise UsageError(f"{option} must be a file, and {path} is a directory")
    if path.exists() and not stat.S_ISREG(path.stat().st_mode) and is_file:  # a device or a pipe is written to as it is
        if not os.access(path, os.W_OK):
            raise UsageError(f"{option} must be a path that can be written to, got {path}")
        return
    nearest = next((parent for parent in path.absolute().parents if os.path.lexists(parent)), path)
    try:
        with tempfile.TemporaryDirectory(prefix=".micromix-", dir=nearest):
            pass  # os.access says yes to root where the file system says no
    except OSError as error:
        raise UsageError(f"{option} must be a path that can be written to, got {path}: {error.strerror}") from error


def _check_replaceable(target: Path) -> None:
    """Raises UsageError unless `target`, a `files.plain_path`, is a packed checkpoint or an empty directory.

    What is in use is no such directory even so: where the program runs or a home, what these are in, a git checkout.
    """
    here = (Path.cwd(), Path.home().resolve())
    if target.is_symlink() or not target.is_dir():
        fact = "is not a directory" if not target.is_symlink() else "is a link"
    elif any(target == place or target in place.parents for place in here):
        fact = "holds the current directory or a home"
    elif (target / ".git").exists():
        fact = "is a git checkout"
    elif any(target.iterdir()) and not _is_packed(str(target)):
        fact = "holds no packed checkpoint"
    else:
        return
    raise UsageError(f"--overwrite replaces packed checkpoints and empty directories, and {target} {fact}")


def _load(model: str, dtype: str, device: str) -> zoo.LoadedModel:
    return zoo.load_model(model, _dtype(dtype), device=_device(device))


def _is_packed(model: str) -> bool:
    directory = Path(model).expanduser()
    return model != zoo.DEFAULT_MODEL and (directory / "config.json").is_file() and zoo.is_packed(directory)


def _check_packed(context: typer.Context, model: str) -> None:
    """Raises UsageError if `model` is packed and an option was given that cannot apply to it any more."""
    for option in context.command.params if _is_packed(model) else ():
        source = context.get_parameter_source(option.name) if option.name in NOT_FOR_PACKED else None
        if source is not None and source.name != "DEFAULT":
            name = "/".join((*option.opts, *option.secondary_opts))
            raise UsageError(f"{name} needs a model that is not packed yet, and {model} is packed already")


def _load_recipe(path: Path | None) -> Recipe | None:
    import micromix_compile as micromix

    return None if path is None else micromix.Recipe.load(path)


def _decide(
    recipe: Recipe | None,
    config: MicroMixConfig,
    loaded: zoo.LoadedModel,
    data: str,
    column: str,
    windows: int,
    window_length: int,
) -> Recipe:
    """The given recipe, its splits solved again under `config`; or one calibrated on `windows` windows of the text."""
    import micromix_compile as micromix

    if recipe is not None:
        return micromix.assign(recipe, config) if config != recipe.config else recipe
    batches = _calibration_batches(loaded, data, column, windows, window_length)
    _note(f"calibrating on {windows} windows of {window_length} tokens")
    return micromix.calibrate(loaded.model, batches, config)


def _calibration_batches(
    loaded: zoo.LoadedModel, data: str, column: str, windows: int, window_length: int
) -> tuple[torch.Tensor, ...]:
    text = texts.load_texts(data, column=column)
    tokens = texts.token_windows(text.calibration, loaded.tokenizer, windows, window_length)
    batches: tuple[torch.Tensor, ...] = tokens.to(loaded.model.device).split(1)
    return batches


def _measure(
    loaded: zoo.LoadedModel,
    recipe: Recipe,
    rows: Sequence[str],
    windows: torch.Tensor,
    tasks: Sequence[Task | HarnessTask] = (),
) -> list[RowResult]:
    """All rows; says on standard error how far it is, for people who watch a log instead of a terminal."""
    from micromix_compile.evaluation import evaluation

    results = []
    for result in evaluation.evaluate_rows(loaded.model, recipe, rows, windows, tasks=tasks):
        results.append(result)
        _note(f"{result.row}: perplexity {result.evaluation.perplexity:.3f}")
    return results


def _note(text: str) -> None:
    if not sys.stderr.isatty():
        typer.echo(text, err=True)


def _generate(loaded: zoo.LoadedModel, prompt: str, max_new_tokens: int) -> str:
    """Greedy continuation of the prompt, or answer to it where the tokenizer has a chat template."""
    import torch

    tokenizer = loaded.tokenizer
    if tokenizer.chat_template:
        turns = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(loaded.model.device)
    with _status("generating"), torch.inference_mode():
        output = loaded.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=max_new_tokens,
            cache_implementation="static",
            pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        )
    text: str = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()


def _generate_quantized(
    loaded: zoo.LoadedModel, recipe: Recipe, prompt: str, max_new_tokens: int, compiled: bool
) -> str:
    """Greedy text from the packed model, or from the compiled one. Packing changes the model in place."""
    import torch

    import micromix_compile as micromix

    if compiled:
        options: dict[str, Any] = {"recipe": recipe}
        loaded.model.forward = torch.compile(loaded.model.forward, backend="micromix", options=options)
    else:
        micromix.quantize_(loaded.model, recipe)
    return _generate(loaded, prompt, max_new_tokens)


def _summary(recipe: Recipe) -> str:
    padded = f", {len(recipe.padded)} padded to whole blocks of 32 channels" if recipe.padded else ""
    return f"{len(recipe.linears)} linears, {recipe.bits_text}, {recipe.stored_bytes / 2**20:.1f} MiB{padded}"


def _table(results: Sequence[RowResult], title: str) -> Table:
    table = Table(title=title, title_justify="left")
    table.add_column("row")
    for column in ("element\nbits", "stored\nbits", "stored\nMiB", "perplexity", "KL", "top-1"):
        table.add_column(column, justify="right")
    for task in results[0].tasks:
        table.add_column(f"{task.task}\n({task.items} items)", justify="right")
    for result in results:
        quality = result.evaluation
        table.add_row(
            result.row,
            _number(result.element_bits, 2),
            _number(result.stored_bits, 2),
            _number(None if result.stored_bytes is None else result.stored_bytes / 2**20, 1),
            _number(quality.perplexity, 3),
            _number(quality.kl, 4),
            _number(quality.top1, 3),
            *(f"{task.accuracy:.3f} ± {task.standard_error:.3f}" for task in result.tasks),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _write_json(path: Path, settings: dict[str, Any], results: Sequence[RowResult]) -> None:
    from micromix_compile.evaluation import evaluation

    content = {
        **settings,
        "rows": [result.to_dict() for result in results],
        "versions": evaluation.versions(),
        "hardware": evaluation.hardware(),
    }
    files.write_atomically(path, (json.dumps(content, indent=2, allow_nan=False) + "\n").encode())


def _print_text(label: str, text: str) -> None:
    typer.echo(f"\n{label}: {text}")


def _status(text: str) -> Any:
    return Console(stderr=True).status(text)

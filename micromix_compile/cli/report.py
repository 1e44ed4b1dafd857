"""micromix report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from micromix_compile import files
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.models import load
from micromix_compile.cli.options import (
    EVALUATION_WINDOWS,
    Column,
    Data,
    DeviceOption,
    DType,
    WindowLength,
    Windows,
)
from micromix_compile.cli.outputs import check_beside, check_output
from micromix_compile.cli.show import note, status
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.report.facts import Facts
    from micromix_compile.report.machines import Machine
    from micromix_compile.report.measured import Measured
    from micromix_compile.report.page import Report

MARK: Final = b"MicroMix report"
"""Stands in the files that are written, which alone are overwritten."""


def report(
    source: Annotated[Path, typer.Argument(help="A recipe, or the directory of a packed checkpoint.")],
    out: Annotated[Path, typer.Option(help="File to write the page to.")] = Path("report.html"),
    pictures: Annotated[Path | None, typer.Option(help="Directory to write the pictures to, as PNG.")] = None,
    target: Annotated[
        list[str] | None, typer.Option(help="A GPU to name the kernels of, such as sm_100; repeatable.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help=f"Measure errors beside this model, which was quantized: {zoo.DEFAULT_MODEL}, or a directory."
        ),
    ] = None,
    data: Data = texts.DEFAULT_DATA,
    column: Column = "text",
    windows: Windows = EVALUATION_WINDOWS,
    window_length: WindowLength = texts.WINDOW_LENGTH,
    dtype: DType = "bfloat16",
    device: DeviceOption = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace reports that exist.")] = False,
) -> None:
    """Write a page about a recipe or a packed checkpoint: formats, bytes, errors, kernels.

    The page asks for nothing from elsewhere. With --model, errors are measured on text and passes are counted.
    """
    from micromix_compile.report.facts import read

    check_page("--out", out, overwrite=overwrite)
    if pictures is not None:
        _check_directory(pictures, out, overwrite=overwrite)
    facts = read(source)
    found = devices(facts, target or ())
    measured = None
    if model is not None:
        text = texts.load_texts(data, column=column)
        measured = _measure(source, facts, load(model, dtype, device), text, (windows, window_length))
    made = write_page(out, facts, found, measured)
    if pictures is not None:
        with files.replace_directory(pictures) as fresh:
            for picture in made.pictures:
                (fresh / f"{picture.name}.png").write_bytes(picture.png())
            _check_directory(pictures, out, overwrite=overwrite)
    typer.echo(f"{out}: {len(facts.linears)} linears, {facts.stored_bits:.2f} stored bits")


def check_page(option: str, path: Path, *, overwrite: bool) -> None:
    """Raises UsageError unless a page can be written to `path`, and ModuleNotFoundError if what draws it is missing."""
    from micromix_compile.report.pictures import check_matplotlib

    check_matplotlib()
    check_output(option, path, is_file=True)
    if path.is_file():
        _check_ours(path, overwrite=overwrite)


def devices(facts: Facts, names: Sequence[str] = ()) -> list[Machine]:
    """This machine's and the named ones. Raises ValueError for a name that is none."""
    from micromix_compile.report.machines import machines

    with status("looking at this machine"):
        return machines(facts, names)


def write_page(path: Path, facts: Facts, found: Sequence[Machine], measured: Measured | None = None) -> Report:
    """Draws and writes it."""
    from micromix_compile.report.page import Report
    from micromix_compile.report.pictures import pictures

    with status("drawing"):
        made = Report(facts=facts, machines=found, pictures=pictures(facts, measured), measured=measured)
        files.write_atomically(path, made.html().encode())
        return made


def _measure(source: Path, facts: Facts, loaded: zoo.LoadedModel, text: texts.Texts, size: tuple[int, int]) -> Measured:
    """size: windows, and tokens in each."""
    from micromix_compile.report.measured import measure_packed, measure_recipe

    model, (windows, length) = loaded.model, size
    tokens = texts.token_windows(text.evaluation, loaded.tokenizer, windows, length).to(model.device)
    name = f"{text.name}, {windows} windows of {length} tokens, in {str(model.dtype).removeprefix('torch.')}"
    note(f"measuring on {name}")
    if facts.recipe is not None:
        return measure_recipe(model, facts.recipe, tokens, name)
    packed = zoo.load_model(str(source), model.dtype, device=model.device)
    return measure_packed(model, packed.model, tokens, name)


def _check_directory(path: Path, page: Path, *, overwrite: bool) -> None:
    """Raises UsageError unless pictures can be written to `path`, and `page` outlives that."""
    check_output("--pictures", path, is_file=False)
    check_beside("--out", page, "--pictures", path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise UsageError(f"--pictures must be a directory, got {path}")
    if files.is_in_use(files.plain_path(path)):
        raise UsageError(f"--pictures must not hold the current directory or a home, got {path}")
    for file in sorted(path.iterdir()) if path.is_dir() else ():
        _check_ours(file, overwrite=overwrite)


def _check_ours(path: Path, *, overwrite: bool) -> None:
    if not overwrite:
        raise UsageError(f"{path} exists; --overwrite replaces it")
    if not path.is_file() or MARK not in path.read_bytes():
        raise UsageError(f"--overwrite replaces reports and their pictures, and {path} is none")

"""The program: its commands, in the order in which its help lists them, and its own options."""

from __future__ import annotations

import logging
import platform
from typing import TYPE_CHECKING, Annotated, Final

import typer

from micromix_compile.cli.calibrate import calibrate
from micromix_compile.cli.convert import convert
from micromix_compile.cli.demo import demo
from micromix_compile.cli.doctor import doctor
from micromix_compile.cli.errors import Command
from micromix_compile.cli.eval import eval_
from micromix_compile.cli.generate import generate
from micromix_compile.cli.quantize import quantize
from micromix_compile.cli.report import report

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger("micromix_compile")

COMMANDS: Final[dict[str, Callable[..., None]]] = {
    "calibrate": calibrate,
    "quantize": quantize,
    "convert": convert,
    "eval": eval_,
    "generate": generate,
    "report": report,
    "doctor": doctor,
    "demo": demo,
}

app = typer.Typer(
    name="micromix",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for _name, _function in COMMANDS.items():
    app.command(_name, cls=Command)(_function)


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

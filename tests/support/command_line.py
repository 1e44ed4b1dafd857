"""`micromix` in the tests' own process."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from typer.testing import CliRunner

from micromix_compile.cli import app

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

SHORT = ("--window-length", 32)


def run(*arguments: object) -> Result:
    """`micromix ARGUMENTS` in this process."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def run_well(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_packed_config(directory: Path) -> None:
    """By which a directory is known as one that we wrote."""
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "micromix"}}), "utf-8")

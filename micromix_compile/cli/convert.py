"""micromix convert."""

from __future__ import annotations

import os

import typer

from micromix_compile import files
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.options import (
    CONVERTED_ACTIVATIONS,
    ConvertedActivations,
    Destination,
    Overwrite,
    Source,
)
from micromix_compile.cli.outputs import check_output, check_replaceable
from micromix_compile.cli.show import status


def convert(
    source: Source, destination: Destination, activations: ConvertedActivations = None, overwrite: Overwrite = False
) -> None:
    """Turn MX checkpoints of others into packed ones, with exactly their weights, and back.

    A packed checkpoint whose linears have one format each, in the model's order, becomes compressed-tensors'.
    """
    if activations not in (None, *CONVERTED_ACTIVATIONS):
        raise UsageError(f"--activations must be one of {', '.join(CONVERTED_ACTIVATIONS)}, got {activations!r}")
    target = files.plain_path(destination)
    if target == files.plain_path(source):
        raise UsageError(f"DESTINATION must be another directory than SOURCE, got {destination}")
    if os.path.lexists(target):
        if not overwrite:
            raise UsageError(f"{destination} exists; --overwrite replaces it")
        check_replaceable(target)
    check_output("DESTINATION", destination, is_file=False)
    import micromix_compile as micromix

    def check_again() -> None:
        if os.path.lexists(target):
            check_replaceable(target)

    with status("converting"):
        text = micromix.convert(source, target, activations=activations, before_replacing=check_again)
    typer.echo(f"{destination}: {text}")

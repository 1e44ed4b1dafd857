"""micromix convert."""

from __future__ import annotations

import functools

import typer

from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.options import (
    CONVERTED_ACTIVATIONS,
    ConvertedActivations,
    Destination,
    Overwrite,
    Source,
)
from micromix_compile.cli.outputs import check_directory
from micromix_compile.cli.show import status


def convert(
    source: Source, destination: Destination, activations: ConvertedActivations = None, overwrite: Overwrite = False
) -> None:
    """Turn MX checkpoints of others into packed ones, with exactly their weights, and back.

    A packed checkpoint whose linears have one format each, in the model's order, becomes compressed-tensors'.
    """
    if activations not in (None, *CONVERTED_ACTIVATIONS):
        raise UsageError(f"--activations must be one of {', '.join(CONVERTED_ACTIVATIONS)}, got {activations!r}")
    check = functools.partial(
        check_directory, "DESTINATION", destination, overwrite=overwrite, made_from=source, copied=True
    )
    check()
    import micromix_compile as micromix

    with status("converting"):
        text = micromix.convert(source, destination, activations=activations, before_replacing=check)
    typer.echo(f"{destination}: {text}")

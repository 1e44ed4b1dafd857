"""micromix doctor."""

from __future__ import annotations

import dataclasses

import typer
from rich.table import Table

from micromix_compile.cli.show import console, status
from micromix_compile.evaluation import zoo
from micromix_compile.evaluation.machine import hardware, versions


def doctor() -> None:
    """Say what this machine will run.

    The exit code is 1 if the backend isn't registered.
    """
    import torch

    from micromix_compile.targets import cpu, target

    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in (*versions().items(), *hardware().items()):
        table.add_row(name, value)
    registered = "micromix" in torch.compiler.list_backends()
    table.add_row("backend", "registered" if registered else "not registered: pip install micromix-compile")
    for device in ("cpu", *(("cuda",) if torch.cuda.is_available() else ())):
        with status(f"looking at {device}"):
            found = target.target_of(torch.device(device))
        table.add_row(f"runs on {device}", found.name if found.emulated is None else f"plain PyTorch: {found.emulated}")
    for name, value in dataclasses.asdict(cpu.status()).items():
        if value not in ("", None):
            table.add_row(f"native {name}", str(value))
    table.add_row("model cache", str(zoo.cache_dir()))
    console().print(table)
    if not registered:
        raise typer.Exit(1)

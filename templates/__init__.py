"""Kernel text: Triton in `triton` and C++ for the CPU in `cpu`, one kernel a file; Gluon in `gluon`."""

from __future__ import annotations

from pathlib import Path

if __name__ == "templates":
    message = "import micromix_compile.templates: the folder at the repository's root is not a package of its own"
    raise ImportError(message)


def cpu_sources() -> list[Path]:
    """The C++ sources and headers of the CPU kernels, sorted by name."""
    folder = Path(__file__).parent / "cpu"
    return sorted(path for path in folder.iterdir() if path.suffix in (".cpp", ".h"))

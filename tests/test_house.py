"""The house as a whole: what its modules may know of each other."""

from __future__ import annotations

import ast
import os
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Iterator

PACKAGE = Path(__file__).parents[1] / "micromix_compile"


def module_files(package: Path) -> dict[str, Path]:
    """Every module of a package by name, in folders that are linked into it too."""
    found = {}
    for folder, _, names in os.walk(package, followlinks=True):
        for path in (Path(folder) / name for name in names if name.endswith(".py")):
            parts = path.relative_to(package.parent).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Those that run when a module is imported: not what functions do, nor what only type checkers read."""
    for one in body:
        if isinstance(one, ast.If) and ast.unparse(one.test) == "TYPE_CHECKING":
            yield from statements(one.orelse)
        elif not isinstance(one, ast.FunctionDef | ast.AsyncFunctionDef):
            yield one
            for field in ("body", "orelse", "handlers", "finalbody"):
                yield from statements(getattr(one, field, []))


def imported_names(path: Path) -> Iterator[str]:
    """Modules, and names in modules, that a file imports when it is imported itself."""
    for one in statements(ast.parse(path.read_text("utf-8")).body):
        if isinstance(one, ast.Import):
            yield from (alias.name for alias in one.names)
        elif isinstance(one, ast.ImportFrom) and one.module is not None:
            yield from (f"{one.module}.{alias.name}" for alias in one.names)


def import_graph(package: Path) -> dict[str, set[str]]:
    """Module -> the modules of the same package that it imports, without the packages that importing these runs."""
    modules = module_files(package)
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {name if name in modules else name.rpartition(".")[0] for name in imported_names(path)}
        graph[module] = {name for name in names if name in modules}
    return graph


def circle(package: Path) -> list[str]:
    """Modules of which each imports the one before, if there are such."""
    try:
        TopologicalSorter(import_graph(package)).prepare()
    except CycleError as error:
        found: list[str] = error.args[1]
        return found
    return []


def test_no_module_is_imported_by_what_it_imports() -> None:
    assert len(import_graph(PACKAGE)) > 100, "linked folders count"
    assert circle(PACKAGE) == []


@pytest.mark.parametrize("where", ["from house.b import f", "if True:\n    import house.b", "from house import b"])
def test_a_circle_is_found_and_one_inside_functions_or_for_type_checkers_is_none(tmp_path: Path, where: str) -> None:
    (tmp_path / "house").mkdir()
    (tmp_path / "house" / "__init__.py").touch()
    (tmp_path / "house" / "b.py").write_text("from house.c import g\n")
    (tmp_path / "house" / "c.py").write_text("import house.a\n")
    (tmp_path / "house" / "a.py").write_text(where)
    assert set(circle(tmp_path / "house")) == {"house.a", "house.b", "house.c"}
    lines = where.replace("\n", "\n    ")
    for harmless in (f"if TYPE_CHECKING:\n    {lines}\n", f"def f():\n    {lines}\n"):
        (tmp_path / "house" / "a.py").write_text(harmless)
        assert circle(tmp_path / "house") == []

"""The house as a whole: what its modules may know of each other."""

from __future__ import annotations

import ast
import os
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from statistics import median
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


ROOT = PACKAGE.parent
FOLDERS = ("micromix_compile", "passes", "lowering", "templates", "tests", "bench", "examples")
MOST_LINES = 400
MOST_LINES_OF_A_FUNCTION = 60
SHORT = 25
"""Lines that nine functions of ten have at most, their signatures and docstrings counted."""


def python_files() -> list[Path]:
    """Ours, each once: folders that are linked into the package are not walked again."""
    return sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))


def function_lengths(path: Path) -> dict[str, int]:
    """Lines by "file:function"."""
    nodes = ast.walk(ast.parse(path.read_text("utf-8")))
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    ends = [(function, function.end_lineno or function.lineno) for function in functions]
    return {f"{path.relative_to(ROOT)}:{one.lineno} {one.name}": end - one.lineno + 1 for one, end in ends}


def test_files_and_functions_are_short() -> None:
    """Prints the figures, for `pytest -s`."""
    lines = {str(path.relative_to(ROOT)): path.read_text("utf-8").count("\n") for path in python_files()}
    lengths = {name: length for path in python_files() for name, length in function_lengths(path).items()}
    short = sum(length <= SHORT for length in lengths.values()) / len(lengths)
    print(f"\n{len(lines)} files, the longest {max(lines.values())} lines")
    print(f"{len(lengths)} functions, median {median(lengths.values())} lines, the longest {max(lengths.values())}")
    print(f"{short:.1%} of the functions have {SHORT} lines at most")
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert {name: count for name, count in lengths.items() if count > MOST_LINES_OF_A_FUNCTION} == {}
    assert short >= 0.9


def test_private_parts_of_torch_are_named_in_one_folder_only() -> None:
    """The linter sees imports and attributes; this sees texts, too."""
    named = re.compile(r"torch\._(inductor|dynamo)")
    allowed = (ROOT / "tests", ROOT / "lowering" / "torch_private")
    files = [path for path in python_files() if not any(path.is_relative_to(folder) for folder in allowed)]
    assert [str(path) for path in files if named.search(path.read_text("utf-8"))] == []


def test_waits_for_a_gpu_are_refused_by_the_one_means_that_ends_with_the_test() -> None:
    """Torch's own mode outlasts a test that fails, and all that follow it fail."""
    named = [path for path in python_files() if "set_sync_" + "debug_mode" in path.read_text("utf-8")]
    assert named == [ROOT / "tests" / "support" / "gpu.py"]


def rooms() -> dict[str, set[str]]:
    """Folder -> names of the source files in it, as CONTRIBUTING's map has them."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8").partition("<!-- map -->")[2].partition("<!-- end -->")[0]
    found: dict[str, set[str]] = {}
    for line in text.splitlines():
        if room := re.match(r"    ([\w/]+)/ +\w", line):
            found[room[1]] = names = set()
        elif line.startswith(" " * 8):
            names |= set(line.split())
    return found


def sources() -> dict[str, set[str]]:
    """The same, as the tree has them: Python by their names without a suffix, others with it."""
    found: dict[str, set[str]] = {}
    for folder in FOLDERS[:4]:
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".cpp", ".h", ".jinja") and path.name != "__init__.py":
                name = path.stem if path.suffix == ".py" else path.name
                found.setdefault(str(path.parent.relative_to(ROOT)).removeprefix("micromix_compile/"), set()).add(name)
    return found


def test_the_map_of_the_house_is_the_tree() -> None:
    assert rooms() == sources()


def test_every_module_has_a_layer() -> None:
    """Of `lowering` the modules are listed one by one, for its private parts of torch lie below everything else."""
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]["contracts"]
    layers = contracts[0]["layers"]
    assert len(layers) <= 9
    assert not any(contract.get("ignore_imports") for contract in contracts)
    listed = {module for layer in layers for module in layer.split(" : ")}
    modules = [name for name in module_files(PACKAGE) if name not in ("micromix_compile", "micromix_compile.lowering")]
    assert [name for name in modules if not any(name == one or name.startswith(f"{one}.") for one in listed)] == []

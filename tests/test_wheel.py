"""The wheel: built as `python -m build` builds it, it has all that the tree has, and runs away from the checkout."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import micromix_compile as micromix
from micromix_compile.targets import cpu

ROOT = Path(__file__).parents[1]
KINDS = (".py", ".cpp", ".h", ".jinja", ".typed")

USE = """
import importlib.metadata, pathlib, sys
import torch
import micromix_compile as micromix

site, version = pathlib.Path(sys.argv[1]), sys.argv[2]
assert pathlib.Path(micromix.__file__).is_relative_to(site), micromix.__file__
assert micromix.__version__ == importlib.metadata.version("micromix-compile") == version
model = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 64)).eval()
x = torch.randn(8, 64)
recipe = micromix.calibrate(model, [x], micromix.MicroMixConfig(policy="mxfp8"), progress=False)
packed = micromix.quantize_(model, recipe)
assert sorted(recipe.linears) == ["0", "2"] and packed(x).isfinite().all()
from micromix_compile.targets import cpu
print(cpu.status().available)
"""


def python(*arguments: str, cwd: Path, **environment: str) -> str:
    """Standard output of a fresh interpreter that must succeed."""
    run = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def tree() -> set[str]:
    """Files of the package, those in linked folders too."""
    found = set()
    for folder, _, names in os.walk(ROOT / "micromix_compile", followlinks=True):
        found |= {str((Path(folder) / name).relative_to(ROOT)) for name in names if name.endswith(KINDS)}
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made from a source distribution, which is made from a copy of the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    checkout = place / "checkout"
    checkout.mkdir()
    for name in ("micromix_compile", "passes", "lowering", "templates"):
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    build = "import sys, setuptools.build_meta as b; getattr(b, 'build_' + sys.argv[1])(sys.argv[2])"
    python("-c", build, "sdist", str(place), cwd=checkout)
    (archive,) = place.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(place / "unpacked", filter="data")
    (sources,) = (place / "unpacked").iterdir()
    python("-c", build, "wheel", str(place), cwd=sources)
    (made,) = place.glob("*.whl")
    return made


def test_the_wheel_has_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = [
            name for name in file.namelist() if not name.startswith(f"{wheel.name.rpartition('-py3')[0]}.dist-info")
        ]
    assert set(names) == tree()
    assert {"micromix_compile/py.typed", "micromix_compile/templates/cpu/block.h"} <= set(names)


def test_the_installed_wheel_runs_from_another_folder(wheel: Path, tmp_path: Path) -> None:
    """Installed without dependencies into a folder of its own, which comes before the checkout's installation."""
    site = tmp_path / "site"
    install = ("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site), str(wheel))
    python(*install, cwd=tmp_path)
    (tmp_path / "use.py").write_text(USE)
    out = python("use.py", str(site), micromix.__version__, cwd=tmp_path, PYTHONPATH=str(site))
    assert out.strip() == str(cpu.status().available), "with its own C++ sources it compiles what the checkout compiles"

"""Packaging: what importing costs, what the installation registers, what the repository pins."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
FOLDERS = ("passes", "lowering", "templates")


def python(code: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter in the repository's root."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)


def constraints() -> dict[str, Version]:
    """Package -> pinned version."""
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pins = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {normalized(name): Version(version) for name, version in pins}


def normalized(name: str) -> str:
    """A project's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def project() -> dict[str, dict[str, object]]:
    """The `project` table of pyproject.toml."""
    table: dict[str, dict[str, object]] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    return table


def requirements() -> list[Requirement]:
    """Everything the project or one of its extras asks for, but itself."""
    extras = project()["optional-dependencies"].values()
    texts = [*project()["dependencies"], *(text for extra in extras for text in extra)]  # type: ignore[attr-defined]
    return [requirement for requirement in map(Requirement, texts) if requirement.name != "micromix-compile"]


def test_importing_the_package_imports_neither_inductor_nor_triton() -> None:
    """They take seconds, and a program that only loads recipes needs none of it."""
    heavy = "[name for name in ('torch._inductor', 'triton', 'transformers', 'datasets') if name in sys.modules]"
    result = python(f"import sys, micromix_compile; print({heavy})")
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_the_backend_is_listed_without_importing_the_package() -> None:
    """An entry point, found by torch itself. Another, of transformers_hook, may be called when torch is imported."""
    code = (
        "import sys, torch; print('micromix' in torch._dynamo.list_backends(), 'micromix_compile.verbs' in sys.modules)"
    )
    result = python(code)
    assert result.stdout.strip() == "True False", result.stderr


def test_the_entry_point_names_the_backend_function() -> None:
    """The name is one that the module has."""
    (entry,) = (e for e in importlib.metadata.entry_points(group="torch_dynamo_backends") if e.name == "micromix")
    assert callable(entry.load())


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bare_import_from_the_repository_root_fails_and_names_the_right_one(folder: str) -> None:
    """The same module under two names would be two modules."""
    result = python(f"import {folder}")
    assert result.returncode == 1
    assert f"ImportError: import micromix_compile.{folder}" in result.stderr.splitlines()[-1]
    assert python(f"import micromix_compile.{folder}").returncode == 0


@pytest.mark.parametrize("folder", FOLDERS)
def test_the_folders_are_linked_into_the_package(folder: str) -> None:
    """Relative, so that a clone works anywhere."""
    assert (ROOT / "micromix_compile" / folder).readlink() == Path("..") / folder


def test_every_pin_is_one_that_an_index_serves() -> None:
    """No local versions, no paths; torch exactly as tested."""
    assert constraints()["torch"] == Version("2.13.0")
    assert not [name for name, version in constraints().items() if version.local]


def test_every_requirement_is_pinned_within_its_range() -> None:
    """What was tested is what pyproject.toml allows."""
    pins = constraints()
    for requirement in requirements():
        assert normalized(requirement.name) in pins, f"{requirement} has no pin"
        assert pins[normalized(requirement.name)] in requirement.specifier, requirement


def test_the_data_packages_are_pinned_as_the_errors_say() -> None:
    """The commands that error messages name install what was tested."""
    from micromix_compile.evaluation import texts, zoo

    for package in (texts.TEXT_PACKAGE, zoo.MODEL_PACKAGE):
        name, _, version = package.partition("==")
        assert constraints()[name] == Version(version)
        assert name in (ROOT / "Makefile").read_text("utf-8")


def test_the_licence_is_the_whole_apache_licence() -> None:
    """As pyproject.toml and the model's own licence say."""
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert project()["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text

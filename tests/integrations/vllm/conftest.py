"""Skips what needs vLLM where it is missing; `make test-vllm` makes an environment that has it."""

from __future__ import annotations

import importlib.metadata

import pytest

from micromix_compile.integrations.vllm.plugin import installed_version


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that ask for vLLM by the fixture of that name."""
    try:
        installed_version()
    except importlib.metadata.PackageNotFoundError:
        for item in items:
            if "vllm" in getattr(item, "fixturenames", ()):
                item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


@pytest.fixture(scope="session")
def vllm() -> None:
    """Asks for vLLM."""

"""Skips what needs vLLM where it is missing; `make test-vllm` makes an environment that has it."""

from __future__ import annotations

import importlib.util

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests of this folder that ask for vLLM by the fixture `vllm`."""
    if importlib.util.find_spec("vllm") is not None:
        return
    for item in items:
        if "vllm" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.skip(reason="needs vLLM: make test-vllm"))


@pytest.fixture(scope="session")
def vllm() -> None:
    """Asks for vLLM."""

"""What all tests share: hypothesis profiles, a fixed seed, poisoned memory, and the rule for tests that need a GPU."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch
import torch.utils.deterministic
from hypothesis import settings

if TYPE_CHECKING:
    from collections.abc import Iterator

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined: before anything imports one

# Of `nan_filled_memory`: torch refuses cuBLAS in deterministic mode without it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

settings.register_profile("quick", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("deep", max_examples=2000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked `gpu` where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(
    scope="module",
    params=[pytest.param("cpu", id="interpreter"), pytest.param("cuda", id="gpu", marks=pytest.mark.gpu)],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where the Triton kernels of a test run: in Triton's interpreter, or compiled on a GPU where there is one."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    return str(request.param)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Start without compiled code and leave none; nothing in the product needs it."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def nan_filled_memory() -> Iterator[None]:
    """Fill `torch.empty` with NaN (integers: the largest value), so that reading what nobody wrote shows.

    Not for every test: torch fills only in deterministic mode, which changes what Inductor generates.
    """
    before = torch.are_deterministic_algorithms_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.use_deterministic_algorithms(before)

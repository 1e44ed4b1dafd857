"""Writing a cache of bytes, by what the CPU has and by plain PyTorch: the same bytes, nothing else touched; checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from support.kv_cache import KvCase, kv_cases

from micromix_compile import ops
from micromix_compile.targets import cpu
from micromix_compile.targets.kernels import PLAIN_CACHE

if TYPE_CHECKING:
    from collections.abc import Callable

WRITERS: list[Callable[..., None]] = [ops.write_kv, PLAIN_CACHE.write]


@pytest.fixture(scope="module", autouse=True)
def kernels() -> None:
    """Without this, a machine that cannot compile would test the plain PyTorch path against itself."""
    assert cpu.load(), cpu.status().reason


@given(kv_cases())
def test_compiled_bytes_equal_the_reference_and_other_places_stay(case: KvCase) -> None:
    got, want = case.cache(), case.cache()
    ops.write_kv(*case.states, case.position, *got, case.rounding)
    PLAIN_CACHE.write(*case.states, case.position, *want, case.rounding)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    others = [place for place in range(case.length) if place not in case.position.tolist()]
    assert all(torch.equal(a[:, :, others], b[:, :, others]) for a, b in zip(got, case.cache(), strict=True))


def operands(**changes: Any) -> list[Any]:
    named: dict[str, Any] = {
        "key": torch.randn(2, 3, 4, 64), "value": torch.randn(2, 3, 4, 32), "position": torch.tensor([0, 5, 2, 6]),
    }  # fmt: skip
    shapes = {"k_q": 64, "k_scale": 2, "v_q": 32, "v_scale": 1}
    named |= {name: torch.zeros((2, 3, 8, last), dtype=torch.uint8) for name, last in shapes.items()}
    return list({**named, "scale_rounding": "fit", **changes}.values())


def test_it_passes_the_checks_of_torch_library() -> None:
    torch.library.opcheck(ops.write_kv, tuple(operands()))
    torch.library.opcheck(ops.write_kv, tuple(operands(key=torch.randn(2, 4, 3, 64).transpose(1, 2))))


@pytest.mark.parametrize("write", WRITERS)
def test_without_tokens_nothing_is_written(write: Callable[..., None]) -> None:
    states = {"key": torch.randn(2, 3, 0, 64), "value": torch.randn(2, 3, 0, 32), "position": torch.zeros(0).long()}
    given = operands(**states)
    write(*given)
    assert not any(part.any() for part in given[3:7])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.uint8)


WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"position": torch.zeros(4)}, TypeError, r"position must be int32 or int64, got torch.float32"),
    ({"position": torch.arange(3)}, ValueError, r"\(B, H, T, D\) and position \(T,\), got shapes \(2, 3, 4, 64\) and"),
    ({"key": torch.randn(2, 4, 64)}, ValueError, r"key must be \(B, H, T, D\)"),
    ({"value": torch.randn(2, 2, 4, 32)}, ValueError, r"with \(2, 3, 4\) in front as key has, got \(2, 2, 4, 32\)"),
    ({"value": torch.randn(2, 3, 4, 32).half()}, ValueError, r"value must be \(B, H, T, D\) torch.float32 with"),
    ({"k_q": zeros(2, 3, 8, 32)}, ValueError, r"k_q must have heads of 64 channels, got shape \(2, 3, 8, 32\)"),
    ({"v_q": zeros(2, 3, 9, 32)}, ValueError, r"v_q must begin with \(B, H, L\) = \(2, 3, 8\), got shape \(2, 3, 9"),
    ({"v_scale": torch.zeros(2, 3, 8, 1)}, TypeError, r"v_scale must be uint8, got torch.float32"),
    ({"k_scale": zeros(2, 3, 8, 3)}, ValueError, r"k_scale must have whole blocks of 64 channels, got \(2, 3, 8, 3\)"),
    ({"k_scale": zeros(2, 3, 8)}, ValueError, r"k_scale must be 4-dimensional and contiguous, got shape \(2, 3, 8\)"),
    ({"k_q": zeros(2, 8, 3, 64).transpose(1, 2)}, ValueError, r"k_q must be 4-dimensional and contiguous"),
    (
        {"key": torch.randn(2, 3, 4, 0), "k_q": zeros(2, 3, 8, 0), "k_scale": zeros(2, 3, 8, 1)},
        ValueError,
        r"k_scale must have whole blocks of 0 channels",
    ),
    ({"scale_rounding": "ceil"}, ValueError, r"'ceil' is not a valid ScaleRounding"),
    ({"position": torch.tensor([0, 8, 1, 2])}, ValueError, r"position must be from 0 to 7, got 8: the cache holds 8"),
    ({"position": torch.tensor([0, 1, -1, 2])}, ValueError, r"position must be from 0 to 7, got -1"),
]


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize(("change", "error", "message"), WRONG)
def test_what_does_not_fit_is_named(
    write: Callable[..., None], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        write(*operands(**change))


@pytest.mark.parametrize("write", WRITERS)
def test_other_dtypes_are_refused(write: Callable[..., None]) -> None:
    states = {"key": torch.randn(2, 3, 4, 64).double(), "value": torch.randn(2, 3, 4, 32).double()}
    with pytest.raises(TypeError, match=r"key and value must be float32, bfloat16 or float16, got torch.float64"):
        write(*operands(**states))

"""The Triton kernel that writes a cache of bytes against the reference: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from support.kv_cache import KvCase, kv_cases
from support.products import INTERPRETED

from micromix_compile.numerics.kv_cache import CACHE_FORMATS, block_of
from micromix_compile.targets import kv_cache
from micromix_compile.targets.kernels import PLAIN_CACHE
from micromix_compile.targets.kv_cache import TRITON_CACHE

pytestmark = INTERPRETED


def check(case: KvCase, device: str) -> None:
    got, want = case.cache(device), case.cache()
    TRITON_CACHE.write(*(x.to(device) for x in case.states), case.position.to(device), *got, case.rounding)
    PLAIN_CACHE.write(*case.states, case.position, *want, case.rounding)
    assert all(torch.equal(a.cpu(), b) for a, b in zip(got, want, strict=True))


@settings(max_examples=25)
@given(kv_cases())
def test_bytes_equal_the_reference_and_other_places_stay(device: str, case: KvCase) -> None:
    check(case, device)


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_many_rows_in_programs_of_several(device: str, cache_format: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "FEW_ROWS", 4)
    key, value = torch.randn(3, 5, 2, 96).transpose(1, 2), torch.randn(3, 2, 5, 64)
    sizes = (block_of(cache_format, 96), block_of(cache_format, 64))
    check(KvCase((key, value), torch.tensor([6, 1, 0, 4, 5]), 7, sizes, "fit"), device)


def test_no_memory_outside_the_cache_is_written(device: str) -> None:
    """On a GPU the kernel's assertion would end this process's use of it: see `test_gpu_kv_cache`."""
    if device != "cpu":
        pytest.skip("only interpreted kernels go on behind an assertion")
    x = torch.randn(1, 2, 2, 32)
    case = KvCase((x, x), torch.tensor([1, 4]), 4, (32, 32), "fit")
    got, want = case.cache(), case.cache()
    TRITON_CACHE.write(x, x, case.position, *got, "fit")
    PLAIN_CACHE.write(x[:, :, :1], x[:, :, :1], case.position[:1], *want, "fit")
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))

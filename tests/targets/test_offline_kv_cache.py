"""The kernel that writes a cache of bytes, compiled for GPUs that aren't here: registers, traps, subnormals."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from test_offline_compile import compile_once

from micromix_compile.numerics.kv_cache import CACHE_FORMATS, block_of
from micromix_compile.targets.kv_cache import write_kv_call
from micromix_compile.targets.offline import Kernel, NotSupported, kernel_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.targets.ptx import Compiled

Case = tuple[int, str, int, int, int, torch.dtype]
"""Capability, format, channels of keys and of values, tokens, dtype: few rows and many, heads of no power of two."""

CASES: list[Case] = [
    case
    for capability in (90, 120)
    for case in (
        (capability, "fp8", 128, 128, 1, torch.bfloat16),
        (capability, "mxfp8", 192, 128, 2048, torch.bfloat16),
        (capability, "fp8", 80, 80, 2048, torch.float32),
    )
]
assert {case[1] for case in CASES} == set(CACHE_FORMATS), "every format is compiled"


def kernel(case: Case) -> Kernel:
    capability, cache_format, keys, values, tokens, dtype = case

    def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    states = [meta(2, 8, tokens, channels, dtype=dtype) for channels in (keys, values)]
    cache = [
        meta(2, 8, 4096, last)
        for channels in (keys, values)
        for last in (channels, channels // block_of(cache_format, channels))
    ]
    call = write_kv_call(states[0], states[1], meta(tokens, dtype=torch.int64), *cache, "fit")  # type: ignore[arg-type]
    return kernel_of(call, capability)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Mapping[Case, Compiled | NotSupported]:
    return compile_once({case: kernel(case) for case in CASES}, tmp_path_factory, "offline_kv_cache")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_it_neither_spills_nor_traps_nor_flushes_subnormals(
    compiled: Mapping[Case, Compiled | NotSupported], case: Case
) -> None:
    result = compiled[case]
    if isinstance(result, NotSupported):
        pytest.skip(result.reason)
    assert result.spilled_bytes == 0
    assert not result.trap
    assert result.flushing == ()
    assert result.registers <= 64

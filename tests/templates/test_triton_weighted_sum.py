"""The Triton kernel of the weighted sum of experts' rows against the reference: interpreted, or compiled on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from support.products import INTERPRETED

from micromix_compile.targets import grouped
from micromix_compile.targets.grouped import TritonGrouped
from micromix_compile.targets.kernels import PLAIN_GROUPED
from micromix_compile.targets.tiles import MIXED_TILES

pytestmark = [pytest.mark.usefixtures("nan_filled_memory"), *INTERPRETED]

KERNELS = TritonGrouped(MIXED_TILES["bf16"])
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@settings(max_examples=25)
@given(
    st.integers(0, 2**32 - 1), st.integers(0, 5), st.integers(0, 4), st.sampled_from([0, 1, 127, 200, 300]), DTYPES,
    DTYPES, DTYPES, st.sampled_from([torch.int32, torch.int64]),
)  # fmt: skip
@example(0, 3, 10, 300, torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.int64)
def test_sums_equal_the_reference_but_for_their_order(
    device: str, seed: int, tokens: int, top_k: int, columns: int, dtype: torch.dtype, weight_dtype: torch.dtype,
    out_dtype: torch.dtype, place_dtype: torch.dtype,
) -> None:  # fmt: skip
    """Rows lie in wider ones; places count from either end; programs have 128 columns here.

    The interpreter cuts off what bfloat16 doesn't hold, a GPU rounds it.
    """
    torch.manual_seed(seed)
    wider, weights = torch.randn(7, columns + 3).to(dtype), torch.rand(7).to(weight_dtype)
    rows, place = wider[:, :columns], torch.randint(-7, 7, (tokens, top_k)).to(place_dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grouped, "SUM_COLUMNS", 128)
        got = KERNELS.weighted_sum(rows.to(device), weights.to(device), place.to(device), out_dtype).cpu()
    want = PLAIN_GROUPED.weighted_sum(rows, weights, place, torch.float32)
    size = PLAIN_GROUPED.weighted_sum(rows.abs(), weights, place, torch.float32)
    assert (got.shape, got.dtype) == (want.shape, out_dtype)
    ulps = 1.0 if device == "cpu" and out_dtype is torch.bfloat16 else 0.5
    bound = 4 * (top_k + 1) * 2.0**-24 * size + ulps * torch.finfo(out_dtype).eps * 1.01 * want.abs()
    assert ((got.float() - want).abs() <= bound).all()


@pytest.mark.gpu
def test_rows_beyond_32_bits_of_memory_are_found() -> None:
    rows = torch.empty((2**19, 2**13 + 32), dtype=torch.bfloat16, device="cuda")  # 8.0 GiB
    rows[-1] = 3.0
    rows[0] = 5.0
    place = torch.tensor([[0, 2**19 - 1], [-1, -1]], device="cuda")
    weights = torch.ones(len(rows), device="cuda")
    got = KERNELS.weighted_sum(rows, weights, place, torch.float32)
    assert got[0].eq(8.0).all()
    assert got[1].eq(6.0).all()

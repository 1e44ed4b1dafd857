"""The rotation of blocks in Triton against `numerics.rotation`, bit for bit: in Triton's interpreter, or on a GPU."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from support.products import INTERPRETED
from support.strategies import blocks, matrices
from torch import Tensor

from micromix_compile.numerics import rotation
from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.targets.launch import current_device
from micromix_compile.templates.triton.rotate import rotate_blocks

pytestmark = INTERPRETED


@triton.jit
def rotate_kernel(y_ptr, out_ptr, rotated, blocks, BLOCKS: tl.constexpr):  # noqa: ANN001, ANN201, N803 - for Triton
    block = tl.arange(0, BLOCKS)
    place = block[:, None] * 32 + tl.arange(0, 32)[None, :]
    exists = (block < blocks)[:, None]
    y = tl.load(y_ptr + place, mask=exists, other=0.0)
    tl.store(out_ptr + place, rotate_blocks(y, block < rotated), mask=exists)


def check(device: str, x: Tensor, rotated: int) -> None:
    """x: (1, K) float32; NaNs differ in their bits between devices, and nothing reads these."""
    y, out = x.to(device), torch.full_like(x, 7.0, device=device)
    count = x.shape[1] // BLOCK_SIZE
    with current_device(y):
        rotate_kernel[(1,)](y, out, rotated // BLOCK_SIZE, count, triton.next_power_of_2(count))
    want = rotation.rotate_activation(x, rotated)
    same = out.cpu().view(torch.int32) == want.view(torch.int32)
    assert bool((same | (want.isnan() & out.cpu().isnan())).all())


@settings(max_examples=100)
@given(matrices(blocks, rows=st.just(1), channels=st.integers(1, 8).map(lambda n: n * 32)), st.integers(0, 8))
def test_leading_blocks_are_rotated_and_others_are_not(device: str, x: Tensor, rotated: int) -> None:
    check(device, x, min(rotated * BLOCK_SIZE, x.shape[1]))


@pytest.mark.parametrize("exponent", [-149, -130, -124, -121, 0, 122])
def test_what_becomes_subnormal_is_rounded_before_it_is_added(device: str, exponent: int) -> None:
    """A product that the compiler fused with the sum would not be."""
    check(device, torch.ldexp(torch.randn(1, 2048), torch.tensor(exponent)), 2048)

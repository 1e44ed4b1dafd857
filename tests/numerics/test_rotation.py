"""The rotation of blocks: what the matrix is, that products stay what they are, and in which order sums round."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.strategies import Block, finite_blocks, lattice_blocks, matrices
from torch import Tensor

from micromix_compile.numerics import rotation
from micromix_compile.numerics.formats import BLOCK_SIZE

H32 = rotation.rotate_weight(torch.eye(BLOCK_SIZE), BLOCK_SIZE).double()

integers = lattice_blocks(min_exponent=0, max_exponent=0).map(np.round)
"""Of 8 bits at most: their butterflies need no rounding."""

rotated_channels = st.integers(0, 4).map(lambda blocks: blocks * BLOCK_SIZE)


def operands(rows: int) -> st.SearchStrategy[Tensor]:
    """Integers (rows, 128)."""
    return matrices(integers, rows=st.just(rows), channels=st.just(4 * BLOCK_SIZE))


def scalar_butterflies(block: Block) -> Block:
    """block 2**-5 H32, one sum after the other, in place."""
    y = block * np.float32(2.0**-5)
    for apart in (16, 8, 4, 2, 1):
        for i in range(BLOCK_SIZE):
            if not i & apart:
                y[i], y[i + apart] = y[i] + y[i + apart], y[i] - y[i + apart]
    return y


def test_the_matrix_is_a_symmetric_hadamard_matrix() -> None:
    assert bool((H32.abs() == 1).all())
    assert torch.equal(H32, H32.T)
    assert torch.equal(H32 @ H32.T, BLOCK_SIZE * torch.eye(BLOCK_SIZE, dtype=torch.float64))


@given(finite_blocks)
@example(np.full(BLOCK_SIZE, 3 * 2.0**-149, dtype=np.float32))
def test_sums_are_those_of_butterflies_that_begin_16_apart(block: Block) -> None:
    actual = rotation.rotate_activation(torch.from_numpy(block)[None], BLOCK_SIZE)[0].numpy()
    np.testing.assert_array_equal(actual.view(np.int32), scalar_butterflies(block).view(np.int32))


@given(matrices(finite_blocks))
def test_no_rotated_value_is_larger_than_the_largest_of_its_block(y: Tensor) -> None:
    """But where 2**-5 of it is subnormal, and rounds by half of 2**-149 at most, 32 times."""
    blocks = rotation.rotate_activation(y, y.shape[1]).unflatten(1, (-1, BLOCK_SIZE))
    largest = y.unflatten(1, (-1, BLOCK_SIZE)).double().abs().amax(2, keepdim=True)
    assert bool((blocks.double().abs() <= largest + 16 * 2.0**-149 * (largest < 2.0**-120)).all())


@example(torch.full((1, 64), 2.0**127) * torch.tensor([1.0, -1.0]).repeat(32), 1)  # sums of weights overflow
@given(matrices(finite_blocks), st.integers(0, 4))
def test_channels_behind_the_rotated_ones_stay_as_they_are(y: Tensor, blocks: int) -> None:
    rotated = min(blocks * BLOCK_SIZE, y.shape[1])
    for rotate in (rotation.rotate_activation, rotation.rotate_weight):
        actual = rotate(y, rotated)
        assert torch.equal(actual[:, rotated:].view(torch.int32), y[:, rotated:].contiguous().view(torch.int32))
        alone = rotate(y[:, :rotated].contiguous(), rotated)
        torch.testing.assert_close(actual[:, :rotated], alone, rtol=0.0, atol=0.0, equal_nan=True)


@given(operands(3), operands(5), rotated_channels)
def test_products_stay_what_they_are(x: Tensor, weight: Tensor, rotated: int) -> None:
    left, right = rotation.rotate_activation(x, rotated), rotation.rotate_weight(weight, rotated)
    assert torch.equal(left.double() @ right.double().T, x.double() @ weight.double().T)


@given(operands(3), rotated_channels)
def test_a_rotated_weight_is_rotated_back(weight: Tensor, rotated: int) -> None:
    assert torch.equal(rotation.unrotate_weight(rotation.rotate_weight(weight, rotated), rotated), weight)


@pytest.mark.parametrize("scale", [2.0**-60, 1.0, 2.0**100])
def test_rotating_back_loses_what_sums_round(scale: float) -> None:
    """5 sums each way, each by at most 2**-24 of a partial sum, which the largest times 32, and 1 later, bounds."""
    weight = torch.randn(40, 96) * scale
    back = rotation.unrotate_weight(rotation.rotate_weight(weight, 96), 96)
    largest = weight.unflatten(1, (3, BLOCK_SIZE)).abs().amax(2, keepdim=True) * BLOCK_SIZE
    error = (back.double() - weight.double()).unflatten(1, (3, BLOCK_SIZE)).abs()
    assert bool((error <= 10 * 2.0**-24 * largest).all())


@given(operands(6), rotated_channels)
def test_the_rotated_moment_is_that_of_rotated_activations(x: Tensor, rotated: int) -> None:
    x = (x / 16).round()  # 8 at most: 6 products and 10 butterflies need 20 bits
    y = rotation.rotate_activation(x, rotated)
    moment, expected = x.T @ x, y.double().T @ y.double()
    assert torch.equal(rotation.rotate_moment(moment, rotated).double(), expected)

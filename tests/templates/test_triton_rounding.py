"""The Triton kernels that round weights by blocks against the plain steps, to the bit: interpreted, or on a GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics import rounding
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS, elem_format
from micromix_compile.numerics.reference import scale_value
from micromix_compile.ops.pack import round_weights
from micromix_compile.recipe.types import ChannelStatistics, GroupRecipe
from micromix_compile.targets import rounding as launched

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

FORMATS = tuple(ELEM_FORMATS)


def random_block(rows: int, seed: int, spread: int) -> tuple[Tensor, Tensor, Tensor]:
    """Values (rows, 32), scales (rows, 1) of up to 2**spread, and a damped moment (32, 32)."""
    generator = torch.Generator().manual_seed(seed)
    scale = scale_value(torch.randint(127 - spread, 128 + spread, (rows, 1), generator=generator).to(torch.uint8))
    part = torch.randn(rows, BLOCK_SIZE, generator=generator) * 3 * scale
    zeros = torch.rand(part.shape, generator=generator)
    part[zeros < 0.1], part[zeros < 0.05] = 0.0, -0.0
    inputs = torch.randn(64, BLOCK_SIZE, generator=generator) @ torch.randn(BLOCK_SIZE, BLOCK_SIZE, generator=generator)
    moment = inputs.T @ inputs
    return part, scale, moment + 0.1 * torch.diagonal(moment).mean() * torch.eye(BLOCK_SIZE)


cases = st.tuples(st.integers(0, 20), st.integers(0, 10**6), st.sampled_from((0, 4, 30)))


@settings(max_examples=15)
@given(cases, st.sampled_from(FORMATS))
def test_compensation_equals_the_plain_step(device: str, case: tuple[int, int, int], name: str) -> None:
    part, scale, moment = random_block(*case)
    factor = torch.linalg.cholesky(torch.linalg.inv(moment.double()), upper=True).float()
    wide = torch.full((len(part), 70), torch.nan)  # what surrounds a block must not matter
    wide[:, 5:37] = part
    here = (wide.to(device)[:, 5:37], scale.to(device), factor.to(device), elem_format(name))
    for got, want in zip(launched.compensate_block(*here), rounding.compensate_block(*here), strict=True):
        assert same_bits(got, want)


def same_bits(got: Tensor, want: Tensor) -> bool:
    """Also of zeros."""
    return torch.equal(got.contiguous().view(torch.int32), want.contiguous().view(torch.int32))


@settings(max_examples=15)
@given(cases, st.sampled_from(FORMATS))
def test_descent_equals_the_plain_step(device: str, case: tuple[int, int, int], name: str) -> None:
    weight, scale, moment = random_block(*case)
    fmt = elem_format(name)
    part = rounding.round_elements(weight / scale, fmt) * scale
    arguments = [value.to(device) for value in ((part - weight) @ moment, scale, moment)]
    wide = torch.zeros(len(part), 64, device=device)
    wide[:, 32:] = part.to(device)
    expected = wide[:, 32:].clone()
    change = rounding.descend_block(expected, *arguments, fmt)
    assert torch.equal(launched.descend_block(wide[:, 32:], *arguments, fmt), change)
    assert same_bits(wide[:, 32:], expected)
    assert not wide[:, :32].any()


def test_whole_weights_equal_those_of_the_plain_steps(device: str) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(19, 96, generator=generator).to(device)
    inputs = torch.randn(300, 96, generator=generator) * torch.exp(torch.randn(96, generator=generator))
    moment = (inputs.T @ inputs).to(device)
    formats = ["e2m1", "e2m3", "e4m3"]
    expected = rounding.round_weight(weight, formats, moment)
    assert torch.equal(rounding.round_weight(weight, formats, moment, steps=launched.TRITON_STEPS), expected)


def test_the_default_dtype_does_not_matter(device: str) -> None:
    part, scale, moment = (tensor.to(device) for tensor in random_block(3, 0, 0))
    factor, fmt = torch.eye(BLOCK_SIZE, device=device), elem_format("e4m3")
    torch.set_default_dtype(torch.bfloat16)
    try:
        results = launched.compensate_block(part, scale, factor, fmt)
        change = launched.descend_block(part, part.clone(), scale, moment, fmt)
    finally:
        torch.set_default_dtype(torch.float32)
    assert {tensor.dtype for tensor in (*results, change)} == {torch.float32}


@pytest.mark.gpu
def test_weights_on_a_gpu_are_rounded_by_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(48, 64, device="cuda")
    statistics = ChannelStatistics(
        abs_mean=torch.rand(64), abs_max=torch.rand(64), elements=1, tokens=1, batches=1, below={}
    )
    group = GroupRecipe(name="g", channel_perm=torch.randperm(64), split=(32, 0, 32), statistics=statistics)

    def refuse(*_: object) -> None:
        raise AssertionError("the plain step ran")

    monkeypatch.setattr(rounding, "PLAIN_STEPS", rounding.BlockSteps(refuse, refuse))  # type: ignore[arg-type]
    assert set(round_weights({"w": weight}, group, torch.eye(64, device="cuda"), MicroMixConfig())) == {"w"}

"""The order in which channels share blocks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.recipes import statistics

from micromix_compile.calibration.assignment import channel_order
from micromix_compile.calibration.orders import SHELTER, sheltered_order
from micromix_compile.calibration.sensitivity import rounding_errors
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.layout import padded_channels


@given(st.integers(1, 300))
def test_the_order_is_ascending_with_padding_first(channels: int) -> None:
    mean = torch.rand(channels)
    order = channel_order(statistics(abs_mean=mean), MicroMixConfig())
    padding = padded_channels(channels) - channels
    assert padded_channels(channels) == math.ceil(channels / 32) * 32
    assert order[:padding].tolist() == [-1] * padding
    assert sorted(order[padding:].tolist()) == list(range(channels))
    assert mean[order[padding:].long()].diff().ge(0).all()


@given(st.integers(1, 150), st.integers(0, 2**31), st.sampled_from((0, 1, 10)))
def test_a_sheltered_order_has_every_channel_once_and_blocks_ascend(channels: int, seed: int, spread: int) -> None:
    mean = torch.randn(channels, generator=torch.Generator().manual_seed(seed)).mul(spread).exp()
    sizes = mean.tolist()
    order = channel_order(statistics(abs_mean=mean), MicroMixConfig(policy="mxfp8"))
    assert sorted(order[order >= 0].tolist()) == list(range(len(sizes)))
    assert (order[: -len(sizes) % 32] == -1).all()
    sheltered = sheltered_order(mean)
    assert sorted(sheltered.tolist()) == list(range(len(sizes)))
    rest = len(sizes) % 32
    tops = [block.max().item() for block in (mean[sheltered[:rest]], *mean[sheltered[rest:]].split(32)) if len(block)]
    assert tops == sorted(tops)


def test_the_largest_channel_takes_those_that_have_least_to_lose() -> None:
    """Channel 0 would flatten any other; channels 1 to 31 hold nearly nothing, and 32 to 63 keep to themselves."""
    mean = torch.tensor([1000.0, *[0.001] * 31, *[1.0] * 32])
    order = sheltered_order(mean)
    assert set(order[32:].tolist()) == set(range(32))


def test_a_large_channel_may_sit_beside_its_equals() -> None:
    """Thirty-two channels of one size lose nothing to each other."""
    mean = torch.tensor([*[100.0] * 32, *[0.5] * 32, *[1.0] * 32])
    order = sheltered_order(mean)
    assert set(order[64:].tolist()) == set(range(32))


def plain_sheltered_order(magnitudes: torch.Tensor) -> torch.Tensor:
    """The definition, word for word: each block looks at all channels that are left."""
    sizes = magnitudes.to(torch.float64)
    left, blocks = torch.argsort(sizes, stable=True), []
    while left.numel() > 32:
        largest, others = left[-1:], left[:-1]
        energy = sizes[others].square()
        losses = torch.minimum(energy, SHELTER * sizes[largest].square()) - SHELTER * energy
        beside = torch.zeros_like(others, dtype=torch.bool)
        beside[torch.argsort(losses, stable=True)[:31]] = True
        blocks.append(torch.cat((others[beside], largest)))
        left = others[~beside]
    return torch.cat((left, *reversed(blocks)))


few_sizes = st.sampled_from(
    (0.0, 1e-45, 1e-38, 0.001, 1.0, float(torch.tensor(1.0).nextafter(torch.tensor(2.0))), 3e38)
)
any_sizes = st.floats(0, width=32, allow_infinity=False, allow_nan=False)


@given(st.lists(few_sizes, max_size=300) | st.lists(any_sizes, max_size=150))
def test_the_sheltered_order_is_that_of_its_definition(sizes: list[float]) -> None:
    magnitudes = torch.tensor(sizes, dtype=torch.float32)
    assert torch.equal(sheltered_order(magnitudes), plain_sheltered_order(magnitudes))


@pytest.mark.parametrize("step", [0.0, 1e-7, 0.3], ids=["equal", "near", "spread"])
def test_the_sheltered_order_of_many_channels_is_that_of_its_definition(step: float) -> None:
    magnitudes = torch.randn(3001).mul(10 * step).exp() * (1 + step * torch.arange(3001).remainder(700))
    assert torch.equal(sheltered_order(magnitudes), plain_sheltered_order(magnitudes))


def test_a_hundred_thousand_channels_are_sheltered_as_a_few_are() -> None:
    """Where each block looked at all that is left this did not end: equal and different sizes, each channel once."""
    magnitudes = torch.cat((torch.ones(65_536), torch.randn(65_536).exp()))
    assert torch.equal(sheltered_order(magnitudes).sort().values, torch.arange(len(magnitudes)))


@pytest.mark.parametrize("name", ["e2m1", "e2m3"])
def test_a_sheltered_order_halves_the_error_that_an_outlier_causes(name: str) -> None:
    """One channel of 256 far above the others, which have many sizes."""
    sizes = torch.rand(256).mul(3).exp()
    sizes[100] *= 300
    x = torch.randn(200, 256) * sizes

    def error(order: torch.Tensor) -> float:
        errors = rounding_errors(x, order, name, ScaleRounding.RCEIL).square().sum(0)
        return (errors.sum() - errors[100]).item()

    assert error(sheltered_order(sizes)) < 0.5 * min(error(torch.argsort(sizes)), error(torch.arange(256)))

"""Thresholds and splits."""

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.calibration.assignment import (
    SHELTER,
    channel_order,
    sheltered_order,
    solve_split,
    split_of,
    thresholds,
)
from micromix_compile.calibration.sensitivity import rounding_errors
from micromix_compile.config import GRANULARITIES, MicroMixConfig
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.layout import padded_channels
from micromix_compile.recipe.types import ChannelStatistics, Threshold

shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda p: (min(p), max(p)))


ANCHOR = MicroMixConfig(policy="mxfp8-anchor")


def statistics(
    below: dict[Threshold, int] | None = None, elements: int = 1000, abs_mean: torch.Tensor | None = None
) -> ChannelStatistics:
    mean = torch.arange(64.0) if abs_mean is None else abs_mean
    return ChannelStatistics(abs_mean=mean, abs_max=mean, elements=elements, tokens=10, batches=1, below=below or {})


@pytest.mark.parametrize(
    ("policy", "fp6", "t4", "t6"),
    [
        ("paper", "e3m2", 0.0105, 0.0360),
        ("paper", "e2m3", 0.0105, 0.0336),
        ("released", "e3m2", 0.0105, 0.0360),
        ("mxfp8-anchor", "e3m2", 0.0729, 0.25),
    ],
)
def test_thresholds_are_those_of_equation_6(policy: str, fp6: str, t4: float, t6: float) -> None:
    low, high = thresholds(MicroMixConfig(policy=policy, fp6=fp6))
    assert low.ratio == pytest.approx(t4, abs=5e-5)
    assert high.ratio == pytest.approx(t6, abs=5e-5)
    assert low.signed is high.signed is (policy == "released")


def test_lam_multiplies_the_thresholds() -> None:
    plain, doubled = thresholds(ANCHOR), thresholds(dataclasses.replace(ANCHOR, lam=2))
    assert [t.ratio for t in doubled] == [2 * t.ratio for t in plain]


def test_uniform_policies_have_no_thresholds() -> None:
    with pytest.raises(ValueError, match="'mxfp8' has no thresholds"):
        thresholds(MicroMixConfig(policy="mxfp8"))


@given(st.integers(1, 400), shares, st.sampled_from(GRANULARITIES))
def test_a_split_sums_to_k_in_multiples_of_the_granularity(blocks: int, pair: tuple[float, float], g: int) -> None:
    channels, share8 = 32 * blocks, pair[0]
    share6 = pair[1] - pair[0]
    k4, k6, k8 = solve_split(channels, share6, share8, g)
    assert k4 + k6 + k8 == channels
    assert min(k4, k6, k8) >= 0
    assert all(k % 32 == 0 for k in (k4, k6, k8))
    assert sum(k % g != 0 for k in (k4, k6, k8)) <= 2  # one takes what K leaves; it may leave MXFP6 and 4 both short
    assert k8 >= min(channels * share8, channels) - 1e-6  # never fewer 8-bit channels than elements ask for
    assert k6 + k8 >= min(channels * (share6 + share8), channels) - 1e-6


@given(st.integers(1, 400), shares, shares, st.sampled_from(GRANULARITIES))
def test_larger_thresholds_never_give_more_bits_than_one_granule(
    blocks: int, first: tuple[float, float], second: tuple[float, float], g: int
) -> None:
    # With lam both shares "below" grow, so share8 and share6 + share8 fall. k8 falls with share8. k6 + k8 is a sum of
    # two counts each rounded up by less than one granule, so it can rise by less than one granule in all.
    channels = 32 * blocks
    eight = sorted((first[0], second[0]))
    both = sorted((first[1], second[1]))
    low = solve_split(channels, max(both[0] - eight[0], 0.0), eight[0], g)  # the larger lam
    high = solve_split(channels, max(both[1] - eight[1], 0.0), eight[1], g)
    assert low[2] <= high[2]
    assert low[0] >= high[0] - g


def test_rounded_counts_that_pass_k_leave_nothing_negative() -> None:
    # 0.5 and 0.5 of 192 are 96 each, rounded up to 128 each: MXFP8 keeps its 128, MXFP6 gets the 64 that are left.
    assert solve_split(192, 0.5, 0.5, 128) == (0, 64, 128)


def test_a_share_outside_the_unit_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"share8 must be in \[0, 1\], got 1.5"):
        solve_split(64, 0.0, 1.5, 32)


def test_the_split_follows_the_counts() -> None:
    config = dataclasses.replace(ANCHOR, granularity=32)
    t4, t6 = thresholds(config)
    counted = statistics({t4: 500, t6: 900}, abs_mean=torch.rand(640))
    assert split_of(counted, config) == (320, 256, 64)


def test_thresholds_that_were_not_counted_are_named() -> None:
    counted = statistics(dict.fromkeys(thresholds(ANCHOR), 1))
    with pytest.raises(ValueError, match=r"lam=3.0 needs counts below 0.2188"):
        split_of(counted, dataclasses.replace(ANCHOR, lam=3.0))


@pytest.mark.parametrize(("policy", "position"), [("mxfp4", 0), ("mxfp6", 1), ("mxfp8", 2)])
def test_uniform_policies_use_one_format_in_the_models_order(policy: str, position: int) -> None:
    config = MicroMixConfig(policy=policy, uniform_order="model")
    counted = statistics(abs_mean=torch.rand(70))
    split = split_of(counted, config)
    assert split[position] == sum(split) == 96
    assert channel_order(counted, config).tolist() == [-1] * 26 + list(range(70))


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


def test_configs_are_hashable_and_comparable() -> None:
    assert len({MicroMixConfig(), MicroMixConfig(), dataclasses.replace(MicroMixConfig(), lam=2.0)}) == 2

"""Thresholds and the splits that follow from what they counted."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.recipes import statistics

from micromix_compile.calibration.thresholds import solve_split, split_of, thresholds
from micromix_compile.config import GRANULARITIES, MicroMixConfig

shares = st.tuples(st.floats(0, 1), st.floats(0, 1)).map(lambda p: (min(p), max(p)))


ANCHOR = MicroMixConfig(policy="mxfp8-anchor")


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

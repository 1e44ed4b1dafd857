"""Splits by calibrated thresholds: which share of elements may run in fewer bits (MicroMix, section 4.1).

Eq. 6 asks that a format's worst rounding error stay under that of a better format, the anchor, at the row's maximum:

    T(n) = lam * 2**b * 2**(n - 1) / qmax_n * max|x| / anchor

with n the element's bits, qmax_n its largest value, b an exponent. An element below T(n) may run in n bits.
The policies differ in anchor, b and comparison:

    paper         INT8 (anchor 254), b the exponent bias, |x|
    released      the same thresholds compared with x, not |x|, as the authors' published calibration does
    mxfp8-anchor  MXFP8-E4M3 (its own 2**b * 2**(n - 1) / qmax_n), b = emax, |x|

A threshold counts elements, the counts give shares, the shares give numbers of channels; the channels are those with
the smallest mean |x|. The threshold is thus a budget, not a bound: MXFP4 blocks do hold elements above T(4).
"""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING

from micromix_compile.config import THRESHOLD_POLICIES, MicroMixConfig
from micromix_compile.numerics.formats import FP6_FORMATS, ElemFormat, elem_format, segment_formats
from micromix_compile.numerics.layout import padded_channels
from micromix_compile.recipe.types import ChannelStatistics, Recipe, Threshold

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import Split

INT8_ANCHOR = 254.0


def thresholds(config: MicroMixConfig) -> tuple[Threshold, Threshold]:
    """(T(4), T(6)) of a threshold policy. Raises ValueError for other policies, which have none."""
    if config.policy not in THRESHOLD_POLICIES:
        raise ValueError(f"policy {config.policy!r} has no thresholds; those of {THRESHOLD_POLICIES} have")
    anchor_is_fp8 = config.policy == "mxfp8-anchor"
    anchor = _error_ratio(elem_format("e4m3"), use_emax=True) if anchor_is_fp8 else INT8_ANCHOR
    t4, t6 = (
        Threshold(
            ratio=config.lam * _error_ratio(elem_format(name), use_emax=anchor_is_fp8) / anchor,
            signed=config.policy == "released",
        )
        for name in segment_formats(config.fp6)[:2]
    )
    return t4, t6


def _error_ratio(fmt: ElemFormat, *, use_emax: bool) -> float:
    exponent = fmt.emax if use_emax else fmt.bias
    return float(2.0**exponent * 2.0 ** (fmt.bits - 1) / fmt.max_value)


def thresholds_to_count(config: MicroMixConfig) -> tuple[Threshold, ...]:
    """The thresholds that calibration counts for a threshold policy: for both MXFP6 formats."""
    both = (thresholds(dataclasses.replace(config, fp6=fp6)) for fp6 in FP6_FORMATS)
    return tuple(dict.fromkeys(t for pair in both for t in pair))


def solve_split(channels: int, share6: float, share8: float, granularity: int) -> Split:
    """(k4, k6, k8) from the shares of elements that need 6 and 8 bits.

    channels: K, a multiple of 32. Both counts are rounded up to `granularity`, MXFP8 first; MXFP4 takes the rest.
    Where the rounded counts pass K, MXFP6 takes what MXFP8 leaves. Raises ValueError unless the shares are in [0, 1].
    """
    for name, share in (("share6", share6), ("share8", share8)):
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"{name} must be in [0, 1], got {share}")
    k8 = min(_round_up(channels * share8, granularity), channels)
    k6 = min(_round_up(channels * share6, granularity), channels - k8)
    return channels - k6 - k8, k6, k8


def _round_up(count: float, granularity: int) -> int:
    return math.ceil(count / granularity) * granularity


def split_by_thresholds(recipe: Recipe) -> dict[str, Split]:
    """The split of every group by what its thresholds counted. Raises ValueError if calibration did not count them."""
    return {name: split_of(group.statistics, recipe.config) for name, group in recipe.groups.items()}


def split_of(statistics: ChannelStatistics, config: MicroMixConfig) -> Split:
    """The split of one activation. Raises ValueError if its thresholds were not counted."""
    t4, t6 = thresholds(config)
    missing = [t for t in (t4, t6) if t not in statistics.below]
    if missing:
        raise ValueError(
            f"policy {config.policy!r} with lam={config.lam} needs counts below {missing[0].ratio:.4g} of each row's "
            f"maximum, which calibration did not take; calibrate with this policy and lam"
        )
    below4, below6 = statistics.below[t4], max(statistics.below[t6], statistics.below[t4])
    share6 = (below6 - below4) / statistics.elements
    share8 = (statistics.elements - below6) / statistics.elements
    return solve_split(padded_channels(statistics.abs_mean.numel()), share6, share8, config.granularity)

"""From statistics to splits: which channels run in MXFP4, MXFP6 and MXFP8 (MicroMix, section 4.1).

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
import logging
import math
from typing import TYPE_CHECKING

import torch

from micromix_compile.calibration.budget import Candidates, solve_budget
from micromix_compile.config import SORTING_POLICIES, THRESHOLD_POLICIES, UNIFORM_POLICIES, MicroMixConfig
from micromix_compile.numerics.formats import BLOCK_SIZE, ElemFormat, elem_format
from micromix_compile.numerics.layout import Split, padded_channels
from micromix_compile.recipe.types import COST_FORMATS, ChannelStatistics, GroupRecipe, Recipe, Threshold

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

logger = logging.getLogger("micromix_compile")

INT8_ANCHOR = 254.0


def thresholds(config: MicroMixConfig) -> tuple[Threshold, Threshold]:
    """(T(4), T(6)) of a threshold policy. Raises ValueError for the uniform policies, which have none."""
    if config.policy not in THRESHOLD_POLICIES:
        raise ValueError(f"policy {config.policy!r} has no thresholds; those of {THRESHOLD_POLICIES} have")
    anchor_is_fp8 = config.policy == "mxfp8-anchor"
    anchor = _error_ratio(elem_format("e4m3"), use_emax=True) if anchor_is_fp8 else INT8_ANCHOR
    t4, t6 = (
        Threshold(
            ratio=config.lam * _error_ratio(elem_format(name), use_emax=anchor_is_fp8) / anchor,
            signed=config.policy == "released",
        )
        for name in ("e2m1", config.fp6)
    )
    return t4, t6


def _error_ratio(fmt: ElemFormat, *, use_emax: bool) -> float:
    exponent = fmt.emax if use_emax else fmt.bias
    return float(2.0**exponent * 2.0 ** (fmt.bits - 1) / fmt.max_value)


def thresholds_to_count(config: MicroMixConfig) -> tuple[Threshold, ...]:
    """The thresholds that calibration counts: those of the policy, for both MXFP6 formats. Empty if uniform."""
    if config.policy not in THRESHOLD_POLICIES:
        return ()
    both = (thresholds(dataclasses.replace(config, fp6=fp6)) for fp6 in ("e2m3", "e3m2"))
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


def split_of(statistics: ChannelStatistics, config: MicroMixConfig) -> Split:
    """The split of one activation under `config`. Raises ValueError if its thresholds were not counted."""
    channels = padded_channels(statistics.abs_mean.numel())
    if config.policy not in THRESHOLD_POLICIES:
        position = UNIFORM_POLICIES.index(config.policy)
        k4, k6, k8 = (channels if i == position else 0 for i in range(3))
        return k4, k6, k8
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
    return solve_split(channels, share6, share8, config.granularity)


def split_groups(recipe: Recipe) -> dict[str, Split]:
    """The split of every group of `recipe` under its config, from its statistics and orders.

    Raises ValueError if calibration did not take the statistics that the policy needs.
    """
    config = recipe.config
    if config.policy != "budget":
        return {name: split_of(group.statistics, config) for name, group in recipe.groups.items()}
    outputs = dict.fromkeys(recipe.groups, 0)
    for linear in recipe.linears.values():
        outputs[linear.group.name] += linear.out_features
    candidates = [_candidates(group, outputs[name], config) for name, group in recipe.groups.items()]
    budget = float(config.target_bits) * recipe.parameters
    try:
        splits = solve_budget(candidates, budget, config.granularity)
    except ValueError as error:
        raise ValueError(
            f"target_bits={config.target_bits} of kind {config.target_kind!r} cannot be had: {error}"
        ) from error
    return dict(zip(recipe.groups, splits, strict=True))


def _candidates(group: GroupRecipe, outputs: int, config: MicroMixConfig) -> Candidates:
    """What one group offers to the budget; `outputs` is the sum of N over its linears."""
    costs = group.statistics.costs
    if costs is None:
        raise ValueError(
            f"policy 'budget' needs the costs of formats, which calibration did not take for {group.name}; "
            f"calibrate with this policy"
        )
    rows = [COST_FORMATS.index(name) for name in ("e2m1", config.fp6, "e4m3")]
    weights = costs.weights[rows] if config.weights == "same" else costs.weights[[rows[0]] * 3]
    if config.weight_rounding == "gptq":
        weights = COMPENSATED * weights
    per_channel = (costs.activations[rows] + weights).to(torch.float64)
    channels = group.channel_perm.numel()
    in_order = torch.zeros(3, channels, dtype=torch.float64, device="cpu")
    real = group.channel_perm >= 0
    in_order[:, real] = per_channel[:, group.channel_perm[real].long()]
    in_features = group.statistics.abs_mean.numel()
    if config.target_kind != "stored":
        spent = (4, 8, 8) if config.target_kind == "time" else (4, 6, 8)
        four, six, eight = (bits * outputs * in_features / channels for bits in spent)
        return Candidates(costs=in_order, prices=(four, six, eight))
    four, six, eight = (float(b * outputs) for b in ((4, 6, 8) if config.weights == "same" else (4, 4, 4)))
    fixed = channels * (outputs * 8 / BLOCK_SIZE + 8 * 4)  # scales, and the order's int32
    return Candidates(costs=in_order, prices=(four, six, eight), fixed=fixed)


def channel_order(statistics: ChannelStatistics, config: MicroMixConfig) -> Tensor:
    """channel_perm: (K,) int32. Padding comes first.

    Mixed formats sort ascending by mean |x|. One format keeps the model's order or is `sheltered_order`.
    """
    in_features = statistics.abs_mean.numel()
    if config.policy in SORTING_POLICIES:
        order = torch.argsort(statistics.abs_mean, stable=True)
    elif config.uniform_order == "sheltered":
        order = sheltered_order(statistics.abs_mean)
    else:
        order = torch.arange(in_features, device="cpu")
    padding = torch.full((padded_channels(in_features) - in_features,), -1, dtype=torch.int64, device="cpu")
    return torch.cat((padding, order)).to(torch.int32)


SHELTER = 0.002
"""Energy, as a share of that of its block's largest channel, up to which a channel is taken to lose all it holds.
MXFP4 takes about so much, MXFP6 less; but small channels also matter less. Chosen on the default model by the predicted
divergence of its activations in MXFP4 (MXFP6), calibration text: .65 (.028) with 0.00006, .61 (.028) with 0.00025, .38
(.023) with 0.001, .38 (.024) with 0.004, .40 (.025) with 0.017, .43 (.026) with 0.25."""


def sheltered_order(magnitudes: Tensor) -> Tensor:
    """(C,) int64: channels in an order whose blocks of 32 lose little to their largest channel.

    magnitudes: (C,) float32, >= 0, finite, typical of each channel.

    A block's scale follows its largest channel, and a channel far below is flattened. So the largest channel that is
    left takes the 31 that lose least beside it, until none is left: those of its own size, or so small that it hardly
    matters. Blocks ascend by their largest channel; the first may be the rest that fills no block.
    """
    sizes, order = magnitudes.to("cpu", torch.float64).sort(stable=True)
    channels, blocks = _Ascending(sizes.square()), []
    while channels.left > BLOCK_SIZE:
        blocks.append(channels.take_block())
    places = [*channels.rest(), *(place for block in reversed(blocks) for place in block)]
    return order[torch.tensor(places, dtype=torch.int64, device="cpu")]


class _Ascending:
    """Channels by ascending energy, as runs [start, stop) of places with equal energies, taken from both ends.

    What a channel of energy e loses beside one of energy E, min(e, SHELTER * E) - SHELTER * e, rises with e and then
    falls. So those that lose least stand at the ends of what is left, and all blocks take as long as one sort. No two
    runs above the peak lose the same: float32 sizes that differ at all do so by far more than float64 rounds.
    """

    def __init__(self, energies: Tensor) -> None:
        values, counts = torch.unique_consecutive(energies, return_counts=True)
        self._energies: list[float] = values.tolist()
        self._stops: list[int] = counts.cumsum(0).tolist()
        self._starts = [0, *self._stops[:-1]]
        self._low, self._high = 0, len(self._energies) - 1
        self.left = energies.numel()

    def take_block(self) -> list[int]:
        """The place of the largest channel, and before it, ascending, those of the 31 that lose least beside it."""
        top = self._energies[self._high]
        self._stops[self._high] -= 1
        beside: list[int] = []
        largest = self._stops[self._high]
        self._drop_empty()
        while (missing := BLOCK_SIZE - 1 - len(beside)) > 0:
            is_high = _loss(self._energies[self._high], top) < _loss(self._energies[self._low], top)
            run = self._high if is_high else self._low
            start = self._starts[run]
            self._starts[run] = min(start + missing, self._stops[run])
            beside += range(start, self._starts[run])
            self._drop_empty()
        self.left -= BLOCK_SIZE
        return [*sorted(beside), largest]

    def _drop_empty(self) -> None:
        while self._low < self._high and self._starts[self._low] == self._stops[self._low]:
            self._low += 1
        while self._low < self._high and self._starts[self._high] == self._stops[self._high]:
            self._high -= 1

    def rest(self) -> list[int]:
        """The places that no block took, ascending."""
        runs = range(self._low, self._high + 1)
        return [place for run in runs for place in range(self._starts[run], self._stops[run])]


def _loss(energy: float, top: float) -> float:
    """What a channel loses beside a block's largest."""
    return min(energy, SHELTER * top) - SHELTER * energy


NUMERIC_OPTIONS = (
    "policy",
    "target_bits",
    "target_kind",
    "lam",
    "fp6",
    "weights",
    "scale_rounding",
    "weight_rounding",
    "scale_search",
    "uniform_order",
    "granularity",
)
"""Options that change orders, splits or packed weights; a recipe stays as it is while these do."""

COMPENSATED = 0.7
"""What error compensation leaves of the weights' predicted cost. Chosen on the default model at 4.5 bits, on 12 windows
of calibration articles that were not calibrated on: divergence .224 with 1, .209 with 0.7, .219 with 0.5."""

ROUNDING = ("weight_rounding", "scale_search")


def assign(recipe: Recipe, config: MicroMixConfig) -> Recipe:
    """The recipe solved again under `config` from its own statistics.

    Weights that calibration rounded are dropped if an option they depend on changes; the new recipe's are rounded to
    nearest, which its config and the log say. Raises ValueError if `config` needs statistics that calibration did not
    take.
    """
    if all(getattr(config, name) == getattr(recipe.config, name) for name in NUMERIC_OPTIONS):
        return dataclasses.replace(recipe, config=config)
    if (
        recipe.packed
        and config.rounds_weights
        and all(getattr(config, n) == getattr(recipe.config, n) for n in ROUNDING)
    ):
        logger.warning("the weights of %s were rounded for other options: now to nearest", recipe.model_id)
        config = dataclasses.replace(config, weight_rounding="nearest", scale_search=False)
    orders = {
        name: dataclasses.replace(group, channel_perm=channel_order(group.statistics, config))
        for name, group in recipe.groups.items()
    }
    return with_splits(_with_groups(dataclasses.replace(recipe, config=config, packed={}), orders))


def with_splits(recipe: Recipe) -> Recipe:
    """The recipe with the splits that its config asks for; orders stay. Raises ValueError as `assign` does."""
    splits = split_groups(recipe)
    groups = {name: dataclasses.replace(group, split=splits[name]) for name, group in recipe.groups.items()}
    return _with_groups(recipe, groups)


def _with_groups(recipe: Recipe, groups: Mapping[str, GroupRecipe]) -> Recipe:
    linears = {
        fqn: dataclasses.replace(linear, group=groups[linear.group.name]) for fqn, linear in recipe.linears.items()
    }
    return dataclasses.replace(recipe, linears=linears)

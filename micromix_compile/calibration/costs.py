"""What channels cost in the formats that a config gives them, and which blocks are rotated for that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.config import THRESHOLD_POLICIES, UNIFORM_POLICIES
from micromix_compile.numerics.formats import segment_formats
from micromix_compile.recipe.types import COST_FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import Split
    from micromix_compile.recipe.types import GroupRecipe

COMPENSATED = 0.7
"""What error compensation leaves of the weights' predicted cost. Chosen on the default model at 4.5 bits, on 12 windows
of calibration articles that were not calibrated on: divergence .224 with 1, .209 with 0.7, .219 with 0.5."""


def costs_in_order(group: GroupRecipe, config: MicroMixConfig) -> Tensor:
    """(3, K) float64: what each channel of the sorted order costs in MXFP4, 6 and 8; padding costs nothing.

    Raises ValueError if calibration did not measure costs.
    """
    costs = group.statistics.costs
    if costs is None:
        raise ValueError(
            f"policy 'budget' needs the costs of formats, which calibration did not take for {group.name}; "
            f"calibrate with this policy"
        )
    return _sum(costs.activations, costs.weights, group, config)


def rotated_costs(group: GroupRecipe, config: MicroMixConfig) -> Tensor | None:
    """The same in rotated blocks; None if there are to be none, or if calibration did not measure it."""
    costs = group.statistics.costs
    if config.rotate == "none" or costs is None or costs.rotated_activations is None or costs.rotated_weights is None:
        return None
    return _sum(costs.rotated_activations, costs.rotated_weights, group, config)


def rotated_channels(group: GroupRecipe, split: Split, config: MicroMixConfig) -> int:
    """How many channels of the order are rotated: all or none."""
    if config.rotate == "all" or (config.rotate == "auto" and config.policy == "mxfp4"):
        return sum(split)
    rotated = rotated_costs(group, config)
    if rotated is None or config.policy in (*THRESHOLD_POLICIES, *UNIFORM_POLICIES):
        return 0
    return sum(split) if _total(rotated, split) < _total(costs_in_order(group, config), split) else 0


def _sum(activations: Tensor, weights: Tensor, group: GroupRecipe, config: MicroMixConfig) -> Tensor:
    """(3, K) float64, of costs (4, C) by `COST_FORMATS`."""
    names = segment_formats(config.fp6)
    of_weights = _rows(weights, names if config.weights == "same" else (names[0],) * 3)
    if config.weight_rounding != "nearest":
        of_weights = COMPENSATED * of_weights
    per_channel = (_rows(activations, activation_formats(config)) + of_weights).to(torch.float64)
    in_order = torch.zeros(3, group.channel_perm.numel(), dtype=torch.float64, device="cpu")
    real = group.channel_perm >= 0
    in_order[:, real] = per_channel[:, group.channel_perm[real].long()]
    return in_order


def activation_formats(config: MicroMixConfig) -> tuple[str, str, str]:
    """What activations are rounded to whose weights are in MXFP4, MXFP6 and MXFP8; E4M3 costs as with block scales."""
    four, six, eight = segment_formats(config.fp6)
    return {"fp8": (eight,) * 3, "mxfp6": (six, six, eight)}.get(config.activations, (four, six, eight))


def _total(costs: Tensor, split: Split) -> float:
    return sum(float(part[row].sum()) for row, part in enumerate(costs.split(list(split), dim=1)))


def _rows(costs: Tensor, names: tuple[str, ...]) -> Tensor:
    return costs[[COST_FORMATS.index(name) for name in names]]


def predicted_cost(group: GroupRecipe, config: MicroMixConfig) -> float | None:
    """What rounding a group as its recipe says is predicted to cost, see `ChannelCosts`; None if nobody measured it."""
    if group.statistics.costs is None:
        return None
    costs = rotated_costs(group, config) if group.rotated else costs_in_order(group, config)
    return None if costs is None else _total(costs, group.split)

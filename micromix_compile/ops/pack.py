"""Packing weights by a recipe: reordered, rounded, in the byte layouts of `packing`."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from micromix_compile import ops
from micromix_compile.numerics import packing, reference, rotation, rounding
from micromix_compile.numerics.layout import (
    PackedWeight,
    RowLayout,
    Split,
    block_formats,
    padded_channels,
    weight_split,
)
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe.types import GroupRecipe, LinearRecipe, Recipe

logger = logging.getLogger("micromix_compile")


def pack_weight(weight: Tensor, group: GroupRecipe, config: MicroMixConfig) -> PackedWeight:
    """Reorder, quantize and pack one weight.

    weight: (N, C) float32, bfloat16 or float16, or (E, N, C) of experts. Raises ValueError if the group is for another
    C.
    """
    if padded_channels(weight.shape[-1]) != group.channel_perm.numel():
        raise ValueError(
            f"group {group.name} orders {group.channel_perm.numel()} channels, but the weight has {weight.shape[-1]}"
        )
    if weight.dim() == 3:
        return stacked([pack_weight(one, group, config) for one in weight], weight.device)
    split, perm = weight_split(group.split, config.weights), group.channel_perm.to(weight.device)
    if not group.rotated:
        return _pack(weight.detach(), perm, split, config)
    rotated = rotation.rotate_weight(reference.reorder(weight.detach(), perm).to(torch.float32), group.rotated)
    return _pack(rotated, torch.arange(perm.numel(), device=weight.device), split, config)


def round_weights(
    weights: Mapping[str, Tensor], group: GroupRecipe, moment: Tensor, config: MicroMixConfig
) -> dict[str, PackedWeight]:
    """Round and pack the weights of one group together, as `config` asks (see `rounding`).

    weights: (N, C) by name. moment: (C, C) float32, the sum of x x^T over the calibrated inputs, of which each may
    have a weight. A weight with a NaN or an infinity is rounded to nearest, which poisons its blocks only.
    """
    finite = {name: weight for name, weight in weights.items() if bool(weight.isfinite().all())}
    packed = {name: pack_weight(weight, group, config) for name, weight in weights.items() if name not in finite}
    if not finite:
        return packed
    device = moment.device
    perm = group.channel_perm.to(device)
    stacked = torch.cat([reference.reorder(w.to(device, torch.float32), perm) for w in finite.values()])
    stacked = rotation.rotate_weight(stacked, group.rotated)
    split = weight_split(group.split, config.weights)
    rounded = rounding.round_weight(
        stacked,
        block_formats(split, config.fp6),
        rotation.rotate_moment(reference.reorder(reference.reorder(moment, perm).T, perm), group.rotated),
        scale_rounding=config.scale_rounding,
        search=config.scale_search,
        compensate=config.weight_rounding != "nearest",
        steps=target_of(stacked.device).steps,
    )
    for (name, weight), part in zip(finite.items(), rounded.split([len(w) for w in finite.values()]), strict=True):
        packed[name] = _pack(part.to(weight.device), torch.arange(perm.numel(), device=weight.device), split, config)
    return packed


def round_experts(
    weight: Tensor, group: GroupRecipe, moments: Tensor | None, starved: Collection[int], config: MicroMixConfig
) -> PackedWeight:
    """Round and pack the weight of a layer's experts, each by the inputs that reached it.

    weight: (E, N, C). moments: (E, C, C) float32, or None where no expert saw a token. starved: those that saw too few,
    which are rounded to nearest.
    """
    packed = []
    for expert, one in enumerate(weight):
        if moments is None or expert in starved:
            packed.append(pack_weight(one, group, config))
        else:
            packed.append(round_weights({"": one}, group, moments[expert], config)[""])
    return stacked(packed, weight.device)


def stacked(experts: Sequence[PackedWeight], device: torch.device) -> PackedWeight:
    """The packed weights of all experts of a layer as one."""
    parts = [torch.stack(part) for part in zip(*experts, strict=True)]
    return PackedWeight(*packing.in_one_storage(parts, device))


def _pack(weight: Tensor, channel_perm: Tensor, split: Split, config: MicroMixConfig) -> PackedWeight:
    layout = RowLayout(*split, config.fp6, str(config.scale_rounding))
    q4, q6, q8, scale = ops.reorder_quantize(weight, channel_perm, *layout)
    parts = (q4, packing.pack_fp6(q6, config.fp6), q8, scale)
    return PackedWeight(*packing.in_one_storage(parts, weight.device))


def packed_weight(weight: Tensor, linear: LinearRecipe, recipe: Recipe) -> PackedWeight:
    """The packed form of one weight (N, C) or (E, N, C): the recipe's own if it has one, else rounded to nearest.

    So is a weight that has changed since it was calibrated, which the log says. Raises ValueError if the recipe's
    config wants weights rounded while calibrating, and this one was not.
    """
    ready = recipe.packed.get(linear.fqn)
    checksums = linear.weight_checksums
    if ready is not None and checksums is not None and checksums.fit(weight.flatten(0, -2)):
        is_there = all(part.device == weight.device for part in ready)
        return ready if is_there else PackedWeight(*packing.in_one_storage(ready, weight.device))
    if ready is not None:
        logger.warning("%s has changed since it was calibrated: it is rounded to nearest", linear.fqn)
    elif recipe.config.rounds_weights:
        raise ValueError(
            f"the recipe has no rounded weight for {linear.fqn}: weight_rounding={recipe.config.weight_rounding!r} and "
            f"scale_search={recipe.config.scale_search} take effect while calibrating, so calibrate with them"
        )
    return pack_weight(weight, linear.group, recipe.config)

"""Parts of `hf`: empty packed experts for a checkpoint to fill, and under which names a packed model is saved."""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

from micromix_compile.linear.experts import (
    ExpertsWeight,
    MicroMixExperts,
    expert_shapes,
    in_place_of,
    is_experts,
    weight_names,
)
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.numerics.layout import padded_channels

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import nn

    from micromix_compile.config import MicroMixConfig


def holders_of(linears: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """What a checkpoint says of experts: by the module that holds them, each weight's description by its own name."""
    holders: dict[str, dict[str, Mapping[str, Any]]] = {}
    for fqn, described in linears.items():
        if "experts" in described:
            holder, _, name = fqn.rpartition(".")
            holders.setdefault(holder, {})[name] = described
    return holders


def empty_experts(
    module: nn.Module, weights: Mapping[str, Mapping[str, Any]], config: MicroMixConfig
) -> MicroMixExperts:
    """Packed experts for the place of `module`. Raises ValueError if it holds others, naming what differs."""
    if not is_experts(module):
        raise ValueError(f"{type(module).__name__} must be experts as transformers has them, with their attributes")
    names = weight_names(module)
    if set(weights) != set(names):
        raise ValueError(f"its weights must be {' and '.join(names)}, got {', '.join(weights)}")
    shapes, rows = expert_shapes(module), {}
    for name in names:
        described = weights[name]
        given = (described["experts"], described["out_features"], described["in_features"])
        if given != shapes[name]:
            raise ValueError(f"{name} must be (E, N, C) = {shapes[name]}, got {given}")
        k4, k6, k8 = described["split"]
        rotated, channels = described.get("rotated", 0), padded_channels(given[2])
        if k4 + k6 + k8 != channels or rotated > channels:
            raise ValueError(f"{name}: split must sum to {channels}, rotated be at most that, got {described}")
        rows[name] = ExpertsWeight(given[1], given[2], (k4, k6, k8), rotated)
    return in_place_of(module, rows, config)


@contextlib.contextmanager
def own_names(model: Any) -> Iterator[None]:
    """Packed experts are saved by the model's own names: transformers would rename them as it does unpacked ones."""
    if not any(isinstance(module, MicroMixExperts) for module in model.modules()):
        yield
        return
    had, before = "_weight_conversions" in vars(model), getattr(model, "_weight_conversions", None)
    model._weight_conversions = []
    try:
        yield
    finally:
        if had:
            model._weight_conversions = before
        else:
            del model._weight_conversions


@contextlib.contextmanager
def packed_only(model: Any) -> Iterator[None]:
    """The model's config describes what is packed still: plain modules may have been put in places of packed ones."""
    before = model.config.quantization_config
    now = copy.copy(before)
    if isinstance(now, dict):
        now["linears"] = _still_packed(model, now["linears"])
    else:
        now.linears = _still_packed(model, now.linears)
    model.config.quantization_config = now
    try:
        yield
    finally:
        model.config.quantization_config = before


def _still_packed(model: Any, linears: dict[str, Any]) -> dict[str, Any]:
    """Without those whose place, in the model or in its base, has a module that is not packed."""
    modules, prefix = dict(model.named_modules()), f"{model.base_model_prefix}."

    def is_plain(fqn: str) -> bool:
        place = fqn.rpartition(".")[0] if "experts" in linears[fqn] else fqn
        found = modules.get(place) or modules.get(place.removeprefix(prefix)) or modules.get(prefix + place)
        return found is not None and not isinstance(found, MicroMixLinear | MicroMixExperts)

    return {fqn: described for fqn, described in linears.items() if not is_plain(fqn)}

"""The part of `quantize_` that is about torch.nn's attention: which become `MicroMixAttention`, and how."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from micromix_compile.linear.attention import IN_PROJ, OUT_PROJ, MicroMixAttention, why_not_attention
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.ops.pack import packed_weight

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import PackedWeight
    from micromix_compile.recipe.types import LinearRecipe, Recipe


def is_of_attention(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether `name` names a weight of an nn.MultiheadAttention."""
    return isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention)


def why_not_in_attention(name: str, modules: Mapping[str, nn.Module]) -> str | None:
    """Why a weight of an nn.MultiheadAttention can't be packed, or None if it can."""
    holder = name.rpartition(".")[0]
    attention = modules[holder]
    assert isinstance(attention, nn.MultiheadAttention), "it is of attention"
    if hasattr(modules[""], "save_pretrained"):
        return "a checkpoint of transformers could not be loaded with it: packed attention of torch.nn is not read back"
    if not holder:
        return "its attention is the model itself, which nothing can stand in for"
    return why_not_attention(attention)


def packed_attention(
    places: Mapping[str, LinearRecipe], modules: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, nn.Module]:
    """The packed attention, by the names of the modules whose places they take. places: both weights of each."""
    holders = dict.fromkeys(name.rpartition(".")[0] for name in places)
    return {holder: _pack(modules[holder], holder, places, recipe) for holder in holders}


def _pack(attention: nn.Module, holder: str, places: Mapping[str, LinearRecipe], recipe: Recipe) -> MicroMixAttention:
    assert isinstance(attention, nn.MultiheadAttention), "only that is packed"
    tensors = {
        IN_PROJ: (attention.in_proj_weight, attention.in_proj_bias),
        OUT_PROJ: (attention.out_proj.weight, attention.out_proj.bias),
    }
    made = []
    with torch.no_grad():
        for name, (weight, bias) in tensors.items():
            linear = places[f"{holder}.{name}".lstrip(".")]
            packed = packed_weight(weight.detach(), linear, recipe)
            made.append(packed_linear(weight, bias, packed, linear, recipe.config))
    return MicroMixAttention(attention, *made)


def packed_linear(
    weight: Tensor, bias: object, packed: PackedWeight, linear: LinearRecipe, config: MicroMixConfig,
    make: Callable[..., MicroMixLinear] = MicroMixLinear,
) -> MicroMixLinear:  # fmt: skip
    """A packed linear, made by `make`, in the place of one with this weight and, if it is a Parameter, this bias."""
    made = make(
        in_features=linear.in_features,
        out_features=linear.out_features,
        split=linear.split,
        rotated=linear.group.rotated,
        config=config,
        bias=nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, nn.Parameter) else None,
        device="meta",
        dtype=weight.dtype,
    )
    made.load_packed(packed, linear.group.channel_perm.to(weight.device))
    return made

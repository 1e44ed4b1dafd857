"""Which Parameters of a model can be a linear's weight, and what the others are."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.conv import _ConvNd

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence


def why_never_linear(
    parameter: nn.Parameter, names: Sequence[str], modules: Mapping[str, nn.Module]
) -> tuple[str | None, bool]:
    """(why the Parameter can be no linear of ours or None, whether a user would take it for one).

    names: what `modules`, by name, call it. Where nobody would, as with a class token, it is no linear left out.
    """
    owners = [modules.get(name) for name in names]
    if all(isinstance(owner, nn.Embedding) for owner in owners):
        return "it is an embedding", True
    if any(isinstance(owner, _ConvNd) for owner in owners):
        return "it is a convolution", False
    if parameter.dim() == 2:
        is_named = any("weight" in name.rpartition(".")[2] for name in names) or are_experts(names, modules)
        return None, is_named or any(owner is not None for owner in owners)
    if are_experts(names, modules):
        return f"expert weights {tuple(parameter.shape)}: not covered yet", True
    return f"its weight has {parameter.dim()} dimensions, not 2", sum(size > 1 for size in parameter.shape) > 2


def are_experts(names: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a name, or the class of the module that holds it, speaks of experts."""
    holders = [modules.get(holder) for name in names for holder in (name, name.rpartition(".")[0])]
    texts = (*names, *(type(holder).__name__ for holder in holders if holder is not None))
    return any("expert" in text.lower() for text in texts)


def left_alone(
    parameters: Mapping[nn.Parameter, Sequence[str]], modules: Mapping[str, nn.Module], linears: Collection[str]
) -> tuple[int, int]:
    """(Parameters, their bytes) of a model without its `linears`, but with what else these are: a tied embedding stays.

    parameters: all of the model, with their names.
    """
    count = size = 0
    for parameter, names in parameters.items():
        is_linear = any(name in linears for name in names)
        if not is_linear:
            count += parameter.numel()
        if not is_linear or any(isinstance(modules.get(name), nn.Embedding) for name in names):
            size += parameter.numel() * parameter.element_size()
    return count, size

"""Which Parameters of a model can be a linear's weight, and what the others are."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Final

from torch import fx, nn

from micromix_compile.linear.convolution import why_not_pointwise
from micromix_compile.lowering.torch_private.tensors import is_convolution
from micromix_compile.recipe.parts import as_matrix, gaps, split_name

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from micromix_compile.recipe.parts import Part

EMBEDDINGS: Final = (nn.Embedding, nn.EmbeddingBag)
ON_REQUEST: Final = "it is a convolution of kernel size 1, which is taken with convolutions=True"

logger = logging.getLogger("micromix_compile")

SHOWN: Final = 8
"""Weights that a message names of those that stay; `Recipe.refused` has all."""


def why_never_linear(
    parameter: nn.Parameter, names: Sequence[str], modules: Mapping[str, nn.Module], *, convolutions: bool
) -> tuple[str | None, bool]:
    """(why the Parameter can be no linear of ours or None, whether a user would take it for one).

    names: what `modules`, by name, call it. Where nobody would, as with a class token, it is no linear left out.
    convolutions: whether those of kernel size 1 are taken.
    """
    owners = [modules.get("" if name == "weight" else name) for name in names]  # the model may be the layer
    if all(isinstance(owner, EMBEDDINGS) for owner in owners):
        return "it is an embedding", True
    if are_experts(names, modules) and all("bias" in name.rpartition(".")[2] for name in names):
        return "it holds the biases of experts", False
    convolution = next(filter(is_convolution, owners), None)
    if convolution is not None:
        reason = why_not_pointwise(convolution)
        if not convolutions:
            return ("it is a convolution", False) if reason else (ON_REQUEST, True)
        if reason is not None:
            return reason, True
    if not parameter.numel():
        return f"its weight {tuple(parameter.shape)} is empty", True
    if parameter.is_meta:
        return "its weight is on the meta device, which holds no values: load it first", True
    if convolution is not None:
        return None, True
    if parameter.dim() == 2:
        is_named = any("weight" in name.rpartition(".")[2] for name in names) or are_experts(names, modules)
        return None, is_named or any(owner is not None for owner in owners)
    if parameter.dim() == 3 and all(size > 1 for size in parameter.shape):  # a matrix for each expert, if used so
        return None, are_experts(names, modules)
    if as_matrix(parameter.detach()).dim() == 2 and all(size > 1 for size in parameter.shape[:2]):
        return None if convolutions else ON_REQUEST, False  # of a convolution, if a graph uses it so
    return f"its weight has {parameter.dim()} dimensions, not 2", sum(size > 1 for size in parameter.shape) > 2


def are_experts(names: Sequence[str], modules: Mapping[str, nn.Module]) -> bool:
    """Whether a name, or the class of the module that holds it, speaks of experts."""
    holders = [modules.get(holder) for name in names for holder in (name, name.rpartition(".")[0])]
    texts = (*names, *(type(holder).__name__ for holder in holders if holder is not None))
    return any("expert" in text.lower() for text in texts)


def say_left_out(refusals: Mapping[str, str], linears: Collection[str], *, strict: bool) -> None:
    """Log what a graph uses of the recipe's `linears` in a way that leaves them as they are.

    Raises RuntimeError instead if `strict`.
    """
    covered = {split_name(name)[0] for name in linears}
    for name, reason in refusals.items():
        if split_name(name.partition(" (")[0])[0] in covered:
            message = f"{name} has a recipe and runs unquantized in a part of the model: {reason}"
            if strict:
                raise RuntimeError(f"strict=True: {message}")
            logger.warning(message)


def say_unknown(unknown: Mapping[str, str], refused: Collection[str], *, model_id: str, strict: bool) -> None:
    """Log linears of a graph, and why each is left as it is, but those that a recipe `refused`; a name may be a tail.

    Raises RuntimeError instead if `strict`.
    """
    expected = [name.partition(" (")[0] for name in refused]
    names = {name: name.partition(" (")[0] for name in unknown}
    listed = [f"{n}: {why}" for n, why in unknown.items() if not any(_is_tail(names[n], one) for one in expected)]
    if listed:
        message = f"{len(listed)} linears of {model_id} run unquantized ({first_of(listed)})"
        if strict:
            raise RuntimeError(f"strict=True: {message}")
        logger.warning(message)


def _is_tail(name: str, other: str) -> bool:
    """Whether one of two dotted names ends with the other."""
    return f".{name}".endswith(f".{other}") or f".{other}".endswith(f".{name}")


def first_of(listed: Sequence[str]) -> str:
    """What a message says of a list."""
    return "; ".join([*listed[:SHOWN], *(["..."] if len(listed) > SHOWN else [])])


def how_to_leave_training(model: nn.Module) -> str:
    """What to do about a model in training mode; that of torch.export cannot be switched."""
    if isinstance(model, fx.GraphModule):
        return "a graph that was exported or traced keeps its mode, so take the model that it was made from"
    return "call model.eval() first"


def left_alone(
    parameters: Mapping[nn.Parameter, Sequence[str]], modules: Mapping[str, nn.Module], linears: Collection[str]
) -> tuple[int, int]:
    """(Parameters, their bytes) of a model without its `linears`, but with what else these are: a tied embedding stays.

    parameters: all of the model, with their names.
    """
    parts: dict[str, list[Part]] = {}
    for whole, part in map(split_name, linears):
        if part is not None:
            parts.setdefault(whole, []).append(part)
    count = size = 0
    for parameter, names in parameters.items():
        left = parameter.numel()
        if any(name in linears for name in names):
            left = 0
        elif cut := [part for name in names for part in parts.get(name, ())]:
            across = parameter.shape[cut[0].dim]
            left = left // across * sum(gap.size for gap in gaps(cut, across))
        count += left
        stays = any(isinstance(modules.get(name), EMBEDDINGS) for name in names)
        size += (parameter.numel() if stays else left) * parameter.element_size()
    return count, size

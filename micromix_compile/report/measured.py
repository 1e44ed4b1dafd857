"""What is measured for a report beside the unquantized model: errors of linears, of the whole, and passes' counts."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.evaluation.sqnr import linear_sqnr
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.passes import CONVERT_PASSES, POST_GRAD_PASSES, counted, name_of
from micromix_compile.verbs.quantize import quantize_

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, nn

    from micromix_compile.evaluation.types import Evaluation
    from micromix_compile.recipe.types import Recipe


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """sqnr: of each linear's output in dB, see `linear_sqnr`. evaluation: of the compiled model, beside the unquantized
    one, whose perplexity is `unquantized`. passes: how many places each matched while it was compiled. refused: linears
    that could not be packed, and why. text: what it was measured on.
    """

    sqnr: Mapping[str, float]
    evaluation: Evaluation
    unquantized: float
    passes: Mapping[str, int]
    refused: Mapping[str, str]
    text: str


def measure_recipe(model: nn.Module, recipe: Recipe, windows: Tensor, text: str) -> Measured:
    """What a recipe does to its model, which stays as it is. windows: (W, T) int64.

    Raises ValueError if the recipe is for another model.
    """
    packed = quantize_(copy.deepcopy(model), recipe)
    options: dict[str, Any] = {"recipe": recipe}
    compiled = torch.compile(model, backend="micromix", options=options)
    return _measure(model, packed, compiled, windows, text)


def measure_packed(model: nn.Module, packed: nn.Module, windows: Tensor, text: str) -> Measured:
    """How a packed model differs from `model`, the one that it was made from. windows: (W, T) int64.

    Raises ValueError if it was made from another.
    """
    modules = dict(model.named_modules())
    for name, linear in packed.named_modules():
        if isinstance(linear, MicroMixLinear):
            weight = getattr(modules.get(name), "weight", None)
            shape = (linear.out_features, linear.in_features)
            if weight is None or tuple(weight.shape) not in (shape, shape[::-1]):
                raise ValueError(f"the model must have a linear {name} of {shape}, from which the checkpoint was made")
    return _measure(model, packed, torch.compile(packed, backend="micromix"), windows, text)


def _measure(model: nn.Module, packed: nn.Module, compiled: Any, windows: Tensor, text: str) -> Measured:
    sqnr = linear_sqnr(model, packed, windows)
    unquantized = evaluate(model, windows, label="unquantized").perplexity
    torch.compiler.reset()
    with counted() as counts:
        evaluation = evaluate(compiled, windows, model, label="compiling and evaluating")
    torch.compiler.reset()
    names = [name_of(one) for one in (*CONVERT_PASSES, *POST_GRAD_PASSES)]
    return Measured(
        sqnr=sqnr,
        evaluation=evaluation,
        unquantized=unquantized,
        passes={name: counts[name] for name in names},
        refused=getattr(packed, "micromix_refused", {}),
        text=text,
    )

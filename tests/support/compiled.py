"""Small models through `torch.compile(backend="micromix")`, and what observers must have seen of them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

    from micromix_compile.recipe.types import Recipe


def batches(count: int = 3, channels: int = 64) -> list[Tensor]:
    return [torch.randn(2, 5 + i, channels) for i in range(count)]


def compiled_with(model: Callable[..., Any], recipe: Recipe | str, **options: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options={"recipe": recipe, **options})


def close(actual: Tensor, expected: Tensor) -> bool:
    """Equal up to float32 accumulation order: the twin multiplies in another order, K is at most 128."""
    scale = float(expected.abs().max())
    return float((actual.float() - expected.float()).abs().max()) <= 1e-5 * scale


def hooked_abs_mean(model: nn.Module, inputs: list[Tensor], names: list[str]) -> dict[str, Tensor]:
    """The largest over samples of mean |x|, by forward hooks: an independent reading of what observers see."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Tensor]) -> None:
            mean = args[0].float().abs().mean(1).amax(0)
            seen[name] = torch.maximum(seen.get(name, mean), mean)

        return record

    handles = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for x in inputs:
            model(x)
    for handle in handles:
        handle.remove()
    return seen


def assert_statistics_equal_hooks(recipe: Recipe, model: nn.Module, inputs: list[Tensor]) -> None:
    expected = hooked_abs_mean(copy.deepcopy(model), inputs, list(recipe.linears))
    for fqn, linear in recipe.linears.items():
        assert linear.group.statistics.batches == len(inputs), fqn
        torch.testing.assert_close(linear.group.statistics.abs_mean, expected[fqn], msg=fqn)

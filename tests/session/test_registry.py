"""Which session a graph belongs to where several models, or a model and its wrapper, share weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

pytestmark = [pytest.mark.usefixtures("fresh_compiler")]

OPTIONS: dict[str, Any] = {
    "calibration_batches": 1, "policy": "mxfp6", "weight_rounding": "nearest", "scale_search": False, "strict": True
}  # fmt: skip


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


class Headed(nn.Module):
    """A head behind a trunk that it may share."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.trunk(x)))


def fast(model: Any) -> Callable[..., Tensor]:
    return torch.compile(model, backend="micromix", options=dict(OPTIONS))


def converted(*models: nn.Module) -> list[list[str]]:
    """The linears of the recipes by which models run that were compiled and called one after the other."""
    runs = [fast(model) for model in models]
    for run in runs:
        for length in (3, 4, 4):
            run(torch.randn(2, length, 64))
    return [list(micromix.recipe_of(model).linears) for model in models]


def test_models_that_share_a_weight_convert_apart() -> None:
    trunk = nn.Linear(64, 64)
    one, two = Headed(trunk).eval(), Headed(trunk).eval()
    assert converted(one, two) == [["trunk", "head"]] * 2
    one.train()
    fast(two)(torch.randn(2, 4, 64))


def test_a_wrapper_converts_beside_the_model_that_it_wraps() -> None:
    base = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval()
    assert converted(base, Headed(base).eval()) == [["0", "1"], ["trunk.0", "trunk.1", "head"]]


def test_a_model_that_another_one_calls_without_holding_it_converts_apart() -> None:
    class Caller(Headed):
        def __init__(self, other: Callable[..., Tensor]) -> None:
            super().__init__(nn.Linear(64, 64))
            self.others = [other]

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.others[0](x)

    called = Headed(nn.Linear(64, 64)).eval()
    run = fast(called)
    caller = Caller(torch.compiler.disable(lambda x: run(x))).eval()
    assert converted(caller) == [["trunk", "head"]]
    assert list(micromix.recipe_of(called).linears) == ["trunk", "head"]

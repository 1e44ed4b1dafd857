"""Names of weights: which a model's weights get, and what happens where one is refused."""

from __future__ import annotations

import dataclasses
import gc
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import make_net
from torch import nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.recipe.types import LinearRecipe
from micromix_compile.session.matching import model_id
from micromix_compile.session.names import Names
from micromix_compile.session.session import Session

if TYPE_CHECKING:
    from micromix_compile.session.state import LinearState


def accept(state: LinearState, parameter: nn.Parameter) -> None:
    """A weight as it is."""


def test_a_weight_that_is_refused_while_it_is_taken_in_stays_unknown() -> None:
    def refuse(state: LinearState, parameter: nn.Parameter) -> None:
        raise ValueError("another model's")

    names, model = Names(), nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="another model's"):
        names.take_in(model, refuse)
    assert not names.knows(model[0].weight)
    assert not list(names)


@pytest.mark.parametrize(
    ("origin", "name"),
    [
        ("/home/me/models/tiny", "Linear(tiny)"),
        ("models/tiny/", "Linear(tiny)"),
        ("org/tiny", "Linear(tiny)"),
        ("tiny", "Linear(tiny)"),
        ("/", "Linear"),
        (".", "Linear"),
        ("", "Linear"),
        (None, "Linear"),
    ],
)
def test_a_model_is_called_by_the_name_of_where_it_came_from_never_by_a_path(origin: str | None, name: str) -> None:
    model = nn.Linear(4, 4)
    model.config = SimpleNamespace(name_or_path=origin)
    assert model_id(model) == name


def test_weights_of_no_module_get_names_of_their_own() -> None:
    names, weights = Names(), [nn.Parameter(nn.Linear(4, 4).weight.detach()) for _ in range(3)]
    for weight in weights:
        names.adopt(weight, "w", accept)
    assert [names.state(weight).name for weight in weights] == ["w", "w#1", "w#2"]


def test_a_weight_that_replaced_another_takes_its_name_over() -> None:
    names, model = Names(), nn.Sequential(nn.Linear(4, 4))
    names.belong_to(model)
    names.take_in(model, accept)
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    gc.collect()
    names.adopt(model[0].weight, "whatever", accept)
    assert [state.name for state in names] == ["0"]


def test_names_go_without_a_trace() -> None:
    names, model = Names(), nn.Sequential(nn.Linear(4, 4))
    names.take_in(model, accept)
    assert vars(model[0].weight)
    del names
    assert not vars(model[0].weight)


def test_the_members_of_groups_are_looked_up_once_a_recipe() -> None:
    class Counting(dict[str, LinearRecipe]):
        walks = 0

        def values(self) -> Any:
            Counting.walks += 1
            return super().values()

    walks = []
    for layers in (1, 3):
        net = make_net(layers=layers)
        config = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
        recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)], config, progress=False)
        Counting.walks = 0
        Session(config, dataclasses.replace(recipe, linears=Counting(recipe.linears))).prepare(net)
        walks.append(Counting.walks)
    assert walks[0] == walks[1]

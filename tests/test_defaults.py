"""Defaults of torch that a user may have changed: nothing here depends on them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from support.models import make_net

import micromix_compile as micromix

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_compiler")


@pytest.fixture
def restored() -> Iterator[None]:
    """Give the following tests the defaults that this one found."""
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


def everything(net: torch.nn.Module, x: Tensor) -> tuple[micromix.Recipe, list[Tensor]]:
    """A recipe, and what the compiled, the sheltered and the packed model make of x."""
    recipe = micromix.calibrate(net, [x])
    with torch.no_grad():
        compiled = torch.compile(net, backend="micromix", options={"recipe": recipe})(x)
        sheltered = torch.compile(net, backend="micromix", options={"recipe": recipe, "policy": "mxfp6"})(x)
        micromix.quantize_(net, recipe)
        return recipe, [compiled, sheltered, net(x)]


@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize(
    "change",
    [
        lambda: torch.set_default_dtype(torch.bfloat16),
        lambda: torch.set_default_dtype(torch.float16),
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_device("meta"),
    ],
    ids=["bfloat16", "float16", "float64", "device"],
)
def test_another_default_dtype_or_device_changes_nothing(change: Callable[[], None]) -> None:
    """Where a device is left out "meta" shows it best: its tensors hold nothing."""
    nets, x = [], torch.randn(2, 9, 64)
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(make_net(layers=1))
    expected, results = everything(nets[0], x)
    torch._dynamo.reset()
    change()
    recipe, again = everything(nets[1], x)
    for fqn, linear in expected.linears.items():
        assert recipe.linears[fqn].split == linear.split
        group, same = recipe.linears[fqn].group, linear.group
        assert torch.equal(group.channel_perm, same.channel_perm)
        assert torch.equal(group.statistics.abs_mean, same.statistics.abs_mean)
        assert group.statistics.costs is not None
        assert same.statistics.costs is not None
        assert torch.equal(group.statistics.costs.activations, same.statistics.costs.activations)
        assert all(map(torch.equal, recipe.packed[fqn], expected.packed[fqn]))
    assert all(map(torch.equal, again, results))

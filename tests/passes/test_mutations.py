"""What may write to a tensor in a graph, on graphs made by hand; and weights that are no plain Parameters."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.auto_functionalize import auto_functionalized
from torch._higher_order_ops.triton_kernel_wrap import (
    triton_kernel_wrapper_functional,
    triton_kernel_wrapper_mutation,
)

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.passes.mutations import mutation_epochs
from micromix_compile.passes.pre_grad.products import is_transpose

functional = torch.nn.functional
NEAREST = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)


def users_function(x: Tensor) -> None:
    x.mul_(2)


@pytest.mark.parametrize(
    ("target", "args", "kwargs", "mutates"),
    [
        (triton_kernel_wrapper_mutation, (), {"kernel_idx": 0, "kwargs": {"x_ptr": "x"}}, True),
        (triton_kernel_wrapper_functional, (), {"kernel_idx": 0, "kwargs": {"x_ptr": "x"}}, True),
        (auto_functionalized, (torch.ops.aten.add_.Tensor,), {"x": "x"}, True),
        (users_function, ("x",), {}, True),
        (functional.relu, ("x", True), {}, True),
        (functional.relu, ("x", False), {}, False),
        (functional.dropout, ("x", 0.1, False, False), {}, False),
        (functional.silu, ("x",), {"inplace": True}, True),
        (torch.add, ("x", 1), {"out": "x"}, True),
        (torch.relu, ("x",), {}, False),
        (torch.relu_, ("x",), {}, True),
        (operator.iadd, ("x", 1), {}, True),
        (operator.add, ("x", 1), {}, False),
        (getattr, ("x", "T"), {}, False),
        (torch.ops.aten.add_.Tensor, ("x", 1), {}, True),
        (torch.ops.aten.add.Tensor, ("x", 1), {}, False),
        (torch.ops.aten.add, ("x", 1), {}, False),
        (torch.ops.aten.add_, ("x", 1), {}, True),
        ("mul_", ("x", 2), {}, True),
        ("mul", ("x", 2), {}, False),
    ],
)
def test_what_may_write_to_a_tensor_ends_an_epoch(target: Any, args: Any, kwargs: Any, mutates: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")

    def real(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: real(one) for key, one in value.items()}
        return x if value == "x" else value

    create = graph.call_method if isinstance(target, str) else graph.call_function
    create(target, tuple(map(real, args)), {key: real(value) for key, value in kwargs.items()})
    last = graph.call_function(torch.relu, (x,))
    assert mutation_epochs(graph)[last] == int(mutates)


def test_a_transpose_of_torch_2_15_is_one() -> None:
    graph = fx.Graph()
    node = graph.call_function(torch.ops.aten.numpy_T.default, (graph.placeholder("w"),))
    assert is_transpose(node)


def test_a_weight_that_its_graph_writes_to_stays_unquantized() -> None:
    class Growing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.grows, self.stays = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            self.grows.weight.view(-1).mul_(1.5)
            return self.stays(self.grows(x))

    torch._dynamo.reset()
    recipe = micromix.calibrate(Growing().eval(), [torch.randn(2, 64)], NEAREST)
    torch._dynamo.reset()
    assert list(recipe.linears) == ["stays"]
    assert recipe.refused["grows"] == "its weight is written to in the graph that uses it"


class Special(Tensor):
    """A subclass that computes as a tensor does."""


def test_a_weight_of_another_class_is_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    plain = micromix.calibrate(net, [torch.randn(2, 64)], NEAREST)
    net[0].weight = nn.Parameter(net[0].weight.detach().as_subclass(Special))
    reason = "its weight is a test_mutations.Special, not a plain Parameter"
    recipe = micromix.calibrate(net, [torch.randn(2, 64)], NEAREST)
    assert list(recipe.linears) == ["1"]
    assert recipe.refused["0"] == reason
    with pytest.raises(ValueError, match=f"0 can't be quantized: {reason}"):
        micromix.quantize_(net, plain)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True, "inside"])
def test_packed_compiled_packed_and_compiled_by_recipe_agree_under_autocast(autocast: Any, dtype: torch.dtype) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.out = (nn.Linear(64, 64) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast is True):
                both = self.q(x) * self.k(x)
            return self.out(both.to(dtype))

    net, x = Net().to(dtype).eval(), torch.randn(3, 64).to(dtype)
    torch._dynamo.reset()
    recipe = micromix.calibrate(net, [x], NEAREST)
    by_recipe = torch.compile(net, backend="micromix", options={"recipe": recipe})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bool(autocast)):
        from_recipe = by_recipe(x)
        packed = micromix.quantize_(net, recipe)
        eager, compiled = packed(x), torch.compile(packed, backend="micromix")(x)
    torch._dynamo.reset()
    assert eager.dtype == compiled.dtype == from_recipe.dtype
    assert torch.equal(compiled, eager)
    assert torch.equal(from_recipe, eager)

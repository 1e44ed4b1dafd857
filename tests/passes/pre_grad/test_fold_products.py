"""What folds, with what, and the numbers of it."""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import pytest
import torch
from support.experts import GroupedExperts
from support.graphs import context_with, session_with, trace
from support.models import make_net
from support.targets import FOLDING, served_by
from torch import Tensor, fx, nn

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering.torch_private.operators import arguments_of
from micromix_compile.numerics.layout import ACTIVATIONS
from micromix_compile.ops import prepared
from micromix_compile.passes import (
    PassContext,
    find_linears,
    fold_products,
    input_devices,
    rewrite_linears,
    share_activations,
)
from micromix_compile.targets.target import FOLDED, Target

pytestmark = pytest.mark.versions


def folded_graph(model: nn.Module, *inputs: Tensor, folds: bool = True, **options: Any) -> tuple[Any, ...]:
    recipe = micromix.calibrate(model, [inputs[0]], MicroMixConfig(**options))
    session = session_with(model=model, recipe=recipe)

    def fold(graph: fx.Graph, context: PassContext) -> int:
        context.target_of = lambda _: FOLDING if folds else Target(name="exact")
        return fold_products(graph, context)

    session.passes = (find_linears, rewrite_linears, share_activations, fold)  # type: ignore[attr-defined]
    return trace(model, *inputs, session=session)


class Gated(nn.Module):
    """Two linears of different widths that share their input, one that follows; `bias` says which have one."""

    def __init__(self, dtype: torch.dtype, bias: tuple[bool, bool]) -> None:
        super().__init__()
        self.gate = nn.Linear(64, 96, bias=bias[0], dtype=dtype)
        self.up = nn.Linear(64, 48, bias=bias[1], dtype=dtype)
        self.down = nn.Linear(48, 64, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.sigmoid(self.gate(x)[..., :48]) * self.up(x))


@pytest.mark.parametrize("folds", [True, False])
def test_products_with_experts_fold_each_by_itself(folds: bool) -> None:
    gm, _, calls = folded_graph(
        GroupedExperts().eval(), torch.randn(40, 64).bfloat16(), folds=folds, policy="mxfp6", weight_rounding="nearest"
    )
    kinds = (
        {"fold": "reorder_fold", "mm": "grouped_folded_mm"}
        if folds
        else {"fold": "reorder_quantize", "mm": "grouped_mx_mm"}
    )
    ours = {name: count for name, count in calls.items() if name.startswith("micromix.")}
    assert ours == {f"micromix.{kinds['fold']}.default": 2, f"micromix.{kinds['mm']}.default": 2}
    if folds:
        given = [
            arguments_of(node) for node in gm.graph.nodes if str(node.target).endswith("grouped_folded_mm.default")
        ]
        shapes = [
            {name: tuple(one[name].meta["example_value"].shape) for name in ("w_factor", "w_row_scale")}
            for one in given
        ]
        assert shapes == [
            {"w_factor": (3, 1, 96, 4), "w_row_scale": (3, 96)},
            {"w_factor": (3, 1, 64, 4), "w_row_scale": (3, 64)},
        ]


@pytest.mark.parametrize("bias", [False, True])
def test_products_of_one_activation_become_one_folded_product(bias: bool) -> None:
    model = Gated(torch.bfloat16, (bias, bias)).eval()
    gm, context, counts = folded_graph(model, torch.randn(2, 3, 64, dtype=torch.bfloat16))
    assert counts["micromix.reorder_quantize.default"] == counts["micromix.mixed_mx_mm.default"] == 0
    assert counts["micromix.reorder_fold.default"] == counts["micromix.folded_mm.default"] == 2
    joint = next(node for node in gm.graph.nodes if node.target is ops.folded_mm)
    assert [len(column) for column in joint.args[3:9]] == [2] * 5 + [2 * bias]
    assert [node.args[1] for node in joint.users] == [0, 1]
    assert len(context.folded) == 3
    appended = gm.graph.find_nodes(op="placeholder")[-2 * len(context.folded) :]
    assert [node.meta["example_value"].dtype for node in appended] == [torch.uint8, torch.float32] * 3


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("weights", ["same", "mxfp4"])
def test_a_folded_quantize_takes_rows_as_the_exact_one_does(activations: str, weights: str) -> None:
    model = Gated(torch.bfloat16, (False, False)).eval()
    x = torch.randn(2, 3, 64, dtype=torch.bfloat16)
    options = {"activations": activations, "weights": weights, "rotate": "all", "policy": "mxfp8-anchor"}
    exact, _, _ = folded_graph(model, x, folds=False, **options)
    folded, _, counts = folded_graph(model, x, **options)
    assert counts["micromix.reorder_fold.default"] == 2
    layouts = []
    for gm, op in ((exact, ops.reorder_quantize), (folded, ops.reorder_fold)):
        layouts.append([arguments_of(node) for node in gm.graph.nodes if node.target is op])
    for before, after in zip(*layouts, strict=True):
        names = before.keys() - {"x", "channel_perm"}
        assert {name: before[name] for name in names} == {name: after[name] for name in names}
        assert (before["activations"], before["rotated"]) == (activations, sum(before[k] for k in ("k4", "k6", "k8")))
        assert after["w_fp4"] == (weights == "mxfp4" and before["k6"] + before["k8"] > 0)


def test_a_packed_model_is_quantized_by_short_orders_once_for_each_activation() -> None:
    net = make_net(torch.bfloat16, layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 7, 64).bfloat16()]))

    def fold(graph: fx.Graph, context: PassContext) -> int:
        context.target_of = lambda _: FOLDING
        return fold_products(graph, context)

    session = session_with(share_activations, fold, model=packed)
    gm, context, counts = trace(packed, torch.randn(2, 7, 64).bfloat16(), session=session)
    orders = [node.args[1] for node in gm.graph.nodes if node.target is ops.reorder_fold]
    assert [order.meta["example_value"].dtype for order in orders] == [torch.int16] * 2
    made = [make for _, make in context.folded]
    assert made.count(prepared.short_order) == counts["micromix.reorder_fold.default"] == 2


def test_products_with_and_without_a_bias_stay_apart() -> None:
    model = Gated(torch.bfloat16, (True, False)).eval()
    _, _, counts = folded_graph(model, torch.randn(2, 3, 64, dtype=torch.bfloat16))
    assert counts["micromix.reorder_fold.default"] == 2
    assert counts["micromix.folded_mm.default"] == 3


@pytest.mark.parametrize("why", ["float32", "a device that does not"])
def test_nothing_folds_in(why: str) -> None:
    dtype = torch.float32 if why == "float32" else torch.bfloat16
    model = Gated(dtype, (False, False)).eval()
    _, context, counts = folded_graph(model, torch.randn(2, 3, 64, dtype=dtype), folds=why == "float32")
    assert counts["micromix.reorder_fold.default"] == 0
    assert counts["micromix.mixed_mx_mm.default"] == 3
    assert not context.folded


def test_a_quantize_with_another_reader_stays() -> None:
    graph = fx.Graph()
    x, perm = graph.placeholder("x"), graph.placeholder("perm")
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0))
    graph.output(graph.call_function(operator.getitem, (quantize, 3)))
    gm = fx.GraphModule({}, graph)
    context = context_with(target_of=lambda _: FOLDING)
    assert fold_products(gm.graph, context) == 0
    assert quantize in gm.graph.nodes


@pytest.mark.parametrize(
    ("weights", "activations", "rotate"),
    [("same", "same", "none"), ("mxfp4", "same", "none"), ("same", "fp8", "all"), ("mxfp4", "mxfp6", "all")],
)
def test_a_folded_model_on_a_cpu_is_the_exact_one_where_folding_is_exact(
    weights: str, activations: str, rotate: str
) -> None:
    """SiLU is Inductor's in both, which in torch 2.11 rounds otherwise than eager: an ulp moves codes of the next."""
    target = dataclasses.replace(FOLDING, passes=FOLDED - {"fuse_silu_mul"})
    net = make_net(torch.bfloat16)
    config = MicroMixConfig(weights=weights, activations=activations, rotate=rotate)
    recipe = micromix.calibrate(net, [torch.randn(2, 7, 64).bfloat16()], config)
    x = torch.randn(3, 5, 64).bfloat16()
    outputs = []
    for folds in (False, True):
        torch._dynamo.reset()
        fast = torch.compile(net, backend="micromix", options={"recipe": recipe, "exact": not folds})
        with torch.no_grad(), served_by(target):
            outputs.append(fast(x))
    difference = (outputs[0] - outputs[1]).float().abs()
    assert difference.mean() <= 2.0**-9 * outputs[0].float().abs().mean()


class Flat(nn.Module):
    """Two products of one activation whose users need them contiguous, and that leave the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
        self.k = nn.Linear(64, 48, bias=False, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.q(x).view(-1), self.k(x)


def test_joint_products_are_contiguous_as_single_ones_are() -> None:
    model, x = Flat().eval(), torch.randn(2, 3, 64).bfloat16()
    recipe = micromix.calibrate(model, [x], MicroMixConfig(skip=()))
    torch._dynamo.reset()
    with torch.no_grad(), served_by(FOLDING):
        flat, k = torch.compile(model, backend="micromix", options={"recipe": recipe})(x)
        want = micromix.quantize_(model, recipe)(x)
    assert k.is_contiguous()
    assert (flat - want[0]).abs().max() <= 2.0**-7 * want[0].abs().max()
    assert (k - want[1]).abs().max() <= 2.0**-7 * want[1].abs().max()


def product(graph: fx.Graph, device: str) -> fx.Node:
    """A linear of its own input whose tensors are on a device."""
    shapes = {"w4": (8, 16), "w6": (3, 8, 0), "w8": (8, 32), "scale": (8, 2)}
    x, perm = graph.placeholder(f"x_{device}"), graph.placeholder(f"perm_{device}")
    perm.meta["example_value"] = torch.empty(64, dtype=torch.int16, device=device)
    weights = [graph.placeholder(f"{name}_{device}") for name in shapes]
    for node, shape in zip(weights, shapes.values(), strict=True):
        node.meta["example_value"] = torch.empty(shape, dtype=torch.uint8, device=device)
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0))
    parts = [graph.call_function(operator.getitem, (quantize, j)) for j in range(4)]
    return graph.call_function(ops.mixed_mx_mm, (*parts, *weights, None, "e2m3", torch.bfloat16))


def test_each_linears_own_device_decides_whether_it_folds() -> None:
    """One device folds and the other doesn't, as a GPU beside a CPU; "meta" stands for the former."""
    graph = fx.Graph()
    products = [product(graph, device) for device in ("cpu", "meta")]
    positions = graph.placeholder("positions")
    positions.meta["example_value"] = torch.arange(3)
    graph.output((*products, positions))
    assert input_devices(products) == [torch.device("cpu"), torch.device("meta")]
    gm = fx.GraphModule({}, graph)
    context = context_with(target_of=lambda device: FOLDING if device.type == "meta" else Target(name="exact"))
    assert fold_products(gm.graph, context) == 1
    gm.graph.lint()
    joint = [node for node in gm.graph.nodes if node.target is ops.folded_mm]
    assert input_devices(joint) == [torch.device("meta")]
    exact = [node for node in gm.graph.nodes if node.target is ops.mixed_mx_mm]
    assert input_devices(exact) == [torch.device("cpu")]


@pytest.mark.parametrize("change", ["fp6", "moved weights", "bias dtype"])
def test_what_products_do_not_share_keeps_them_apart(change: str) -> None:
    graph = fx.Graph()
    x, perm = graph.placeholder("x"), graph.placeholder("perm")
    perm.meta["example_value"] = torch.empty(64, dtype=torch.int16)
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0))
    examples = {
        "w4": torch.empty(8, 16),
        "w6": torch.empty(3, 8, 0),
        "w8": torch.empty(8, 32),
        "scale": torch.empty(8, 2),
    }
    products = []
    for i, bias_dtype in enumerate((torch.bfloat16, torch.float32 if change == "bias dtype" else torch.bfloat16)):
        with graph.inserting_before(x):
            weights = [graph.placeholder(f"{name}_{i}") for name in examples]
            bias = graph.placeholder(f"bias_{i}")
        for node, example in zip(weights, examples.values(), strict=True):
            node.meta["example_value"] = example.to(torch.uint8)
        bias.meta["example_value"] = torch.empty(8, dtype=bias_dtype)
        if change == "moved weights" and i:
            weights[0] = graph.call_method("clone", (weights[0],))
            weights[0].meta["example_value"] = examples["w4"].to(torch.uint8)
        parts = [graph.call_function(operator.getitem, (quantize, j)) for j in range(4)]
        fp6 = "e3m2" if change == "fp6" and i else "e2m3"
        arguments = (*parts, *weights, bias, fp6, torch.bfloat16)
        products.append(graph.call_function(ops.mixed_mx_mm, arguments))
    graph.output(tuple(products))
    gm = fx.GraphModule({}, graph)

    context = context_with(target_of=lambda _: FOLDING)
    fold_products(gm.graph, context)
    gm.graph.lint()
    joint = [node for node in gm.graph.nodes if node.target is ops.folded_mm]
    assert len(joint) == (0 if change == "moved weights" else 2)
    assert all(len(node.args[3]) == 1 for node in joint)

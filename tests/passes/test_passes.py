"""Each pass on the smallest graph: what went, what came, with which arguments, and the graph that must not match."""

from __future__ import annotations

import operator
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.models import Block, make_net
from support.targets import FOLDING, served_by
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.config import DUMPED, MicroMixConfig
from micromix_compile.ops import prepared
from micromix_compile.passes import (
    CALIBRATE_PASSES,
    CONVERT_PASSES,
    POST_GRAD_PASSES,
    PassContext,
    find_linears,
    input_devices,
    insert_observers,
    run_passes,
)
from micromix_compile.passes.post_grad.fuse_residual import fuse_residual
from micromix_compile.passes.post_grad.fuse_rms_norm import fuse_rms_norm
from micromix_compile.passes.pre_grad.fold_products import fold_products
from micromix_compile.passes.pre_grad.rewrite_linears import rewrite_linears
from micromix_compile.passes.pre_grad.share_activations import share_activations
from micromix_compile.session.session import Session, open_graph
from micromix_compile.targets.target import Target

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.versions


def trace(
    model: Callable[..., Any], *inputs: Tensor, session: Session, dynamic: bool | None = None
) -> tuple[fx.GraphModule, PassContext, Counter[str]]:
    """The Dynamo graph of `model`, opened for passes while Dynamo's context is there; runs the given passes on it."""
    found: list[tuple[fx.GraphModule, PassContext]] = []

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        found.append(open_graph(session, gm, example_inputs))
        for graph_pass in session.passes:  # type: ignore[attr-defined]
            graph_pass(*found[-1])
        found[-1][0].graph.lint()
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    (gm, context) = found[0]
    return gm, context, Counter(str(node.target) for node in gm.graph.nodes if node.op == "call_function")


def session_with(*passes: Callable[..., int], model: nn.Module | None = None, recipe: Any = None) -> Session:
    config = recipe.config if recipe is not None else MicroMixConfig(skip=())
    session = Session(config, recipe)
    session.passes = passes  # type: ignore[attr-defined]
    if model is not None:
        session.prepare(model)
    return session


class Conv1D(nn.Module):
    """GPT-2's linear: the weight is (C, N)."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 32))
        self.bias = nn.Parameter(torch.randn(32))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.reshape(-1, 64), self.weight).reshape(*x.shape[:-1], 32)


def test_linears_are_found_with_name_operands_and_orientation() -> None:
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 64, bias=False), Conv1D()).eval()
    session = session_with(find_linears, model=model)
    _, context, _ = trace(model, torch.randn(3, 64), session=session)
    assert [session.name_of(site.parameter) for site in context.sites] == ["0", "1", "2"]
    assert [site.transposed for site in context.sites] == [False, False, True]
    assert [site.bias is not None for site in context.sites] == [True, False, True]
    assert [(site.in_features, site.out_features) for site in context.sites] == [(64, 32), (32, 64), (64, 32)]
    assert not context.refusals


@pytest.mark.parametrize("product", [torch.mm, torch.matmul, lambda x, w: x @ w, lambda x, w: torch.mm(x, mat2=w)])
def test_a_product_with_a_parameter_on_the_right_is_a_linear(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(64, 32))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert [(site.in_features, site.transposed) for site in context.sites] == [(64, True)]


@pytest.mark.parametrize(
    "product",
    [
        lambda x, w: x @ w.T,
        lambda x, w: torch.mm(x, w.t()),
        lambda x, w: torch.matmul(x, w.mT),
        lambda x, w: x @ w.transpose(-1, -2),
        lambda x, w: x @ torch.transpose(w, 0, 1),
        lambda x, w: torch.addmm(w[:, 0], x, w.permute(1, 0)),
    ],
)
def test_a_product_with_a_transposed_parameter_is_a_linear(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(32, 64))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert [(site.in_features, site.transposed) for site in context.sites] == [(64, False)]
    assert not context.refusals


@pytest.mark.parametrize("product", [lambda x, w: x @ w.transpose(0, 0), lambda x, w: x @ w.permute(0, 1)])
def test_what_leaves_a_matrix_as_it_is_is_no_transpose(product: Callable[..., Tensor]) -> None:
    weight = nn.Parameter(torch.randn(64, 64))
    _, context, _ = trace(lambda x: product(x, weight), torch.randn(3, 64), session=session_with(find_linears))
    assert not context.sites


def test_products_of_activations_are_no_linears() -> None:
    def attention(x: Tensor) -> Tensor:
        return torch.matmul(x, x.transpose(1, 2)) @ x

    _, context, _ = trace(attention, torch.randn(2, 4, 32), session=session_with(find_linears))
    assert not context.sites
    assert not context.refusals


@pytest.mark.parametrize(
    ("build", "dtype", "reason"),
    [
        (lambda: nn.Linear(8, 8, dtype=torch.float64), torch.float64, "torch.float64, not float32"),
        (lambda: nn.Linear(64, 8), torch.float32, "matches skip='*'"),
    ],
)
def test_a_refused_linear_comes_with_its_reason(
    build: Callable[[], nn.Linear], dtype: torch.dtype, reason: str
) -> None:
    linear = build()
    session = session_with(find_linears)
    session.config = MicroMixConfig(skip=("*",) if "skip" in reason else ())
    _, context, _ = trace(linear.eval(), torch.randn(2, linear.in_features, dtype=dtype), session=session)
    assert not context.sites
    assert reason in next(iter(context.refusals.values()))


def test_a_weight_computed_in_the_graph_is_refused() -> None:
    weight = nn.Parameter(torch.randn(2, 8, 64))

    def expert(x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, weight[1])

    _, context, _ = trace(expert, torch.randn(3, 64), session=session_with(find_linears))
    assert list(context.refusals.values()) == ["its weight is computed in the graph, not a Parameter"]


def test_an_addmm_with_factors_is_not_taken_for_a_linear() -> None:
    layer = Conv1D()
    _, context, _ = trace(
        lambda x: torch.addmm(layer.bias, x, layer.weight, beta=2.0),
        torch.randn(2, 64),
        session=session_with(find_linears),
    )
    assert not context.sites


def test_linears_that_share_an_input_share_an_observer() -> None:
    block = Block(64, 96).eval()
    session = session_with(find_linears, insert_observers, model=block)
    gm, context, _ = trace(block, torch.randn(2, 5, 64), session=session)
    observed = [node for node in gm.graph.nodes if node.target == context.owner.observe]
    assert [len(node.args[1]) for node in observed] == [2, 1]
    assert {node.args[0] for node in observed} == {context.sites[0].x, context.sites[2].x}


def test_rewriting_leaves_no_linear_and_shares_the_order_of_a_group() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    session = session_with(find_linears, rewrite_linears, model=block, recipe=recipe)
    gm, context, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.reorder_quantize.default"] == targets["micromix.mixed_mx_mm.default"] == 3
    assert not any("linear" in target for target in targets)
    quantizes = [node for node in gm.graph.nodes if node.target is ops.reorder_quantize]
    assert quantizes[0].args[1] is quantizes[1].args[1] is not quantizes[2].args[1]
    splits = [recipe.linears[name].split for name in ("gate", "up", "down")]
    assert [tuple(node.args[2:5]) for node in quantizes] == splits
    products = [node for node in gm.graph.nodes if node.target is ops.mixed_mx_mm]
    assert [node.args[8] is not None for node in products] == [True, False, False]
    assert len(context.inputs) == 3 * 4 + 2
    assert "stack_trace" in products[0].meta


def test_without_a_recipe_for_it_a_linear_stays() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    del recipe.linears["down"]  # type: ignore[attr-defined]
    session = session_with(find_linears, rewrite_linears, model=block, recipe=recipe)
    _, _, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.mixed_mx_mm.default"] == 2
    assert sum("linear" in target for target in targets) == 1


def test_equal_quantizes_of_one_activation_become_one() -> None:
    block = Block(64, 96).eval()
    recipe = micromix.calibrate(block, [torch.randn(2, 5, 64)])
    session = session_with(find_linears, rewrite_linears, share_activations, model=block, recipe=recipe)
    gm, _, targets = trace(block, torch.randn(2, 5, 64), session=session)
    assert targets["micromix.reorder_quantize.default"] == 2
    shared = next(node for node in gm.graph.nodes if node.target is ops.reorder_quantize)
    assert len({user.args[1] for user in shared.users}) == 4


def test_quantizes_in_different_orders_stay_apart() -> None:
    perm = torch.arange(64, dtype=torch.int32)
    other = perm.flip(0).contiguous()

    def two(x: Tensor) -> tuple[Tensor, Tensor]:
        first = torch.ops.micromix.reorder_quantize(x, perm, 64, 0, 0, "e2m3", "rceil")
        second = torch.ops.micromix.reorder_quantize(x, other, 64, 0, 0, "e2m3", "rceil")
        third = torch.ops.micromix.reorder_quantize(x, perm, 32, 0, 32, "e2m3", "rceil")
        return first[0], second[0] + third[0].sum()

    gm, context, _ = trace(two, torch.randn(3, 64), session=session_with())
    assert share_activations(gm, context) == 0


def normed_and_quantized(dtype: torch.dtype, *, keep_rows: bool, widen: bool = True) -> fx.GraphModule:
    """RMSNorm -> reorder_quantize as it looks after AOTAutograd: functional aten, casts as prims."""

    def convert(x: Tensor, *, dtype: torch.dtype, **_: object) -> Tensor:
        return torch.ops.prims.convert_element_type(x, dtype)

    def program(x: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
        h = x.to(torch.float32) if widen else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = weight * h.to(x.dtype)
        quantized = ops.reorder_quantize(y.reshape(-1, 64), perm, 32, 0, 32, "e2m3", "rceil")
        return (y, *quantized) if keep_rows else quantized

    inputs = (torch.randn(2, 3, 64).to(dtype), torch.rand(64).to(dtype), torch.arange(64, dtype=torch.int32))
    return make_fx(program, {torch.ops.aten._to_copy.default: convert}, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_rms_norm_before_a_quantize_joins_it(dtype: torch.dtype) -> None:
    gm = normed_and_quantized(dtype, keep_rows=False)
    assert fuse_rms_norm(gm.graph) == 1
    gm.graph.lint()
    targets = Counter(str(node.target) for node in gm.graph.nodes)
    assert targets["micromix.rms_norm_reorder_quantize.default"] == 1
    assert targets["micromix.reorder_quantize.default"] == targets["aten.rsqrt.default"] == 0


def test_a_norm_whose_rows_are_used_elsewhere_stays() -> None:
    assert fuse_rms_norm(normed_and_quantized(torch.float32, keep_rows=True).graph) == 0


def test_a_norm_computed_in_half_precision_stays() -> None:
    assert fuse_rms_norm(normed_and_quantized(torch.bfloat16, keep_rows=False, widen=False).graph) == 0


def residual_program(x: Tensor, y: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
    """Two sums of one stream, each behind a quantizer; the first has a reader before it, the second is a result."""
    layout = (perm, 32, 0, 32, "e2m3", "rceil", False)
    first = x + y
    before = first * 2
    folded = ops.rms_norm_reorder_fold(first.reshape(-1, 64), weight, 1e-6, *layout)
    second = first + before
    return (second, *folded, *ops.rms_norm_reorder_fold(second.reshape(-1, 64), weight, 1e-6, *layout))


@pytest.mark.parametrize("shape", [(2, 3, 64), (6, 64)])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_sum_before_a_norm_and_quantize_joins_them_with_equal_results(shape: tuple[int, ...], mode: str) -> None:
    inputs = (*torch.randn(2, *shape).bfloat16(), torch.rand(64).bfloat16(), torch.randperm(64))
    gm = make_fx(residual_program, tracing_mode=mode)(*inputs)
    want = gm(*inputs)
    with served_by(FOLDING):
        assert fuse_residual(gm.graph) == 2
    gm.graph.lint()
    gm.recompile()
    targets = Counter(str(node.target) for node in gm.graph.nodes)
    assert targets["micromix.add_rms_norm_reorder_fold.default"] == 2
    assert targets["micromix.rms_norm_reorder_fold.default"] == targets["aten.add.Tensor"] == 0
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), want, strict=True))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64)])
def test_a_sum_of_other_shapes_stays_and_leaves_sizes_free(shape: tuple[int, ...]) -> None:
    inputs = (torch.randn(5, 3, 64), torch.randn(shape), torch.rand(64), torch.randperm(64))

    def program(x: Tensor, y: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
        rows = (x + y).reshape(-1, 64)
        return ops.rms_norm_reorder_fold(rows, weight, 1e-6, perm, 32, 0, 32, "e2m3", "rceil", False)

    gm = make_fx(program, tracing_mode="symbolic")(*inputs)
    environment = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(environment.guards)
    with served_by(FOLDING):
        assert fuse_residual(gm.graph) == 0
    assert len(environment.guards) == guards


def test_graphs_are_dumped_before_and_after_the_named_pass(tmp_path: Path) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    session = session_with(model=net, recipe=recipe)

    def dumped(gm: fx.GraphModule, context: PassContext) -> int:
        context.dump, context.dump_dir = ("rewrite_linears",), str(tmp_path)
        matches = run_passes(gm, CONVERT_PASSES, context)
        assert matches.pop("open_attention") == 0
        assert matches == {"find_linears": 3, "rewrite_linears": 3, "share_activations": 1, "fold_products": 0}
        return 0

    session.passes = (dumped,)  # type: ignore[attr-defined]
    trace(net, torch.randn(2, 5, 64), session=session)
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0000.before.rewrite_linears.txt", "0001.after.rewrite_linears.txt"]
    assert "mixed_mx_mm" not in (tmp_path / names[0]).read_text()
    assert "mixed_mx_mm" in (tmp_path / names[1]).read_text()


def test_post_grad_graphs_are_dumped_too_whether_or_not_the_code_was_compiled_before(tmp_path: Path) -> None:
    net, x = make_net(torch.bfloat16, layers=1), torch.randn(2, 5, 64, dtype=torch.bfloat16)
    recipe = micromix.calibrate(net, [x])
    options = {"recipe": recipe, "dump": ["fuse_rms_norm", "rewrite_linears"], "dump_dir": str(tmp_path)}
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(net, backend="micromix", options=options)(x)
    moments = ("before.rewrite_linears", "after.rewrite_linears", "before.fuse_rms_norm", "after.fuse_rms_norm")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"{index:04d}.{moment}.txt" for index, moment in enumerate((*moments, *moments))]
    before, after = ((tmp_path / name).read_text() for name in names[2:4])
    assert "micromix.rms_norm_reorder_quantize" not in before
    assert "micromix.rms_norm_reorder_quantize" in after


def test_the_passes_that_can_be_dumped_are_those_there_are() -> None:
    names = [one.__name__ for one in (*CONVERT_PASSES, *CALIBRATE_PASSES, *POST_GRAD_PASSES)]
    assert set(DUMPED) == set(names)


# ---- fold_products


def folded_graph(model: nn.Module, *inputs: Tensor, folds: bool = True, **options: Any) -> tuple[Any, ...]:
    recipe = micromix.calibrate(model, [inputs[0]], MicroMixConfig(**options))
    session = session_with(model=model, recipe=recipe)

    def fold(gm: fx.GraphModule, context: PassContext) -> int:
        context.target_of = lambda _: FOLDING if folds else Target(name="exact")
        return fold_products(gm, context)

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


def test_a_packed_model_is_quantized_by_short_orders_once_for_each_activation() -> None:
    net = make_net(torch.bfloat16, layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 7, 64).bfloat16()]))

    def fold(gm: fx.GraphModule, context: PassContext) -> int:
        context.target_of = lambda _: FOLDING
        return fold_products(gm, context)

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
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil"))
    graph.output(graph.call_function(operator.getitem, (quantize, 3)))
    gm = fx.GraphModule({}, graph)
    context = PassContext(owner=None, example_inputs=(), target_of=lambda _: FOLDING)  # type: ignore[arg-type]
    assert fold_products(gm, context) == 0
    assert quantize in gm.graph.nodes


@pytest.mark.parametrize("weights", ["same", "mxfp4"])
def test_a_folded_model_on_a_cpu_is_the_exact_one_where_folding_is_exact(
    weights: str,
) -> None:
    net = make_net(torch.bfloat16)
    recipe = micromix.calibrate(net, [torch.randn(2, 7, 64).bfloat16()], MicroMixConfig(weights=weights))
    x = torch.randn(3, 5, 64).bfloat16()
    outputs = []
    for folds in (False, True):
        torch._dynamo.reset()
        fast = torch.compile(net, backend="micromix", options={"recipe": recipe, "exact": not folds})
        with torch.no_grad(), served_by(FOLDING):
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
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil"))
    parts = [graph.call_function(operator.getitem, (quantize, j)) for j in range(4)]
    return graph.call_function(ops.mixed_mx_mm, (*parts, *weights, None, "e2m3", torch.bfloat16))


class Inputs:
    """An owner that can add inputs, and no more."""

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        with graph.inserting_before(next(iter(graph.nodes))):
            node = graph.placeholder(name)
        node.meta["example_value"] = example
        return node


def test_each_linears_own_device_decides_whether_it_folds() -> None:
    """One device folds and the other doesn't, as a GPU beside a CPU; "meta" stands for the former."""
    graph = fx.Graph()
    products = [product(graph, device) for device in ("cpu", "meta")]
    positions = graph.placeholder("positions")
    positions.meta["example_value"] = torch.arange(3)
    graph.output((*products, positions))
    assert input_devices(products) == [torch.device("cpu"), torch.device("meta")]
    gm = fx.GraphModule({}, graph)
    context = PassContext(
        owner=Inputs(),
        example_inputs=(),
        target_of=lambda device: FOLDING if device.type == "meta" else Target(name="exact"),
    )  # type: ignore[arg-type]
    assert fold_products(gm, context) == 1
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
    quantize = graph.call_function(ops.reorder_quantize, (x, perm, 32, 0, 32, "e2m3", "rceil"))
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

    context = PassContext(owner=Inputs(), example_inputs=(), target_of=lambda _: FOLDING)  # type: ignore[arg-type]
    fold_products(gm, context)
    gm.graph.lint()
    joint = [node for node in gm.graph.nodes if node.target is ops.folded_mm]
    assert len(joint) == (0 if change == "moved weights" else 2)
    assert all(len(node.args[3]) == 1 for node in joint)

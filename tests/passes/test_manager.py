"""The runner of passes: order, counts, dumps, and passes from outside."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.graphs import context_with, session_with, trace
from support.models import make_net
from support.targets import FOLDING
from torch import fx

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.config import DUMPED, MicroMixConfig
from micromix_compile.passes import (
    CALIBRATE_PASSES,
    CONVERT_PASSES,
    POST_GRAD_PASSES,
    Pass,
    PassContext,
    counted,
    fuse_rms_norm,
    identities,
    run_passes,
    share_activations,
)
from micromix_compile.passes.manager import name_of
from micromix_compile.targets.target import FOLDED
from micromix_compile.verbs import quantized

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.versions


def test_graphs_are_dumped_before_and_after_the_named_pass(tmp_path: Path) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 5, 64)])
    session = session_with(model=net, recipe=recipe)

    def dumped(graph: fx.Graph, context: PassContext) -> int:
        context.dump, context.dump_dir = ("rewrite_linears",), str(tmp_path)
        matches = run_passes(graph, CONVERT_PASSES, context)
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


def test_passes_are_counted_while_somebody_asks_even_of_code_that_was_compiled_before() -> None:
    net, x = make_net(torch.bfloat16, layers=2), torch.randn(2, 5, 64, dtype=torch.bfloat16)
    compiled = torch.compile(net, backend="micromix", options={"recipe": micromix.calibrate(net, [x])})
    found = []
    for _ in range(2):
        torch._dynamo.reset()
        with counted() as counts, torch.no_grad():
            compiled(x)
        found.append({name: count for name, count in counts.items() if count})
    assert found == [{"find_linears": 6, "rewrite_linears": 6, "share_activations": 2, "fuse_rms_norm": 2}] * 2
    torch._dynamo.reset()
    with torch.no_grad():
        compiled(x)
    assert counts.total() == 16, "nobody counts any more"


def test_the_passes_that_can_be_dumped_are_those_there_are() -> None:
    names = [name_of(one) for one in (*CALIBRATE_PASSES, *CONVERT_PASSES, *POST_GRAD_PASSES)]
    assert list(DUMPED) == list(dict.fromkeys(names))


def count_products(graph: fx.Graph, context: PassContext) -> int:
    """A pass from outside, which finds without changing."""
    return sum(node.target in (ops.mixed_mx_mm, ops.folded_mm) for node in graph.nodes)


def count_quantizers(graph: fx.Graph, context: PassContext) -> int:
    """Another one."""
    return sum("quantize" in str(node.target) for node in graph.nodes)


@contextlib.contextmanager
def added(passes: list[Pass], graph_pass: Pass, *, after: Pass) -> Iterator[None]:
    passes.insert(passes.index(after) + 1, graph_pass)
    yield
    passes.remove(graph_pass)


def test_passes_from_outside_run_where_they_were_put_and_are_dumped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    net, x = make_net(layers=1), torch.randn(2, 5, 64)
    options = {"recipe": micromix.calibrate(net, [x]), "dump": ["all"], "dump_dir": str(tmp_path)}
    torch.compiler.reset()
    with (
        added(CONVERT_PASSES, count_products, after=share_activations),
        added(POST_GRAD_PASSES, count_quantizers, after=fuse_rms_norm),
        caplog.at_level(logging.DEBUG, "micromix_compile"),
        torch.no_grad(),
    ):
        torch.compile(net, backend="micromix", options=options)(x)
    before, after = (next(text for text in caplog.messages if text.startswith(kind)) for kind in ("pre-", "post-"))
    assert "share_activations 1, count_products 3, fold_products 0" in before
    counts = "fuse_rms_norm 1, count_quantizers 2, fuse_residual 0, fuse_silu_mul 0, sum_experts 0"
    assert after == f"post-grad passes: {counts}"
    assert {path.name.split(".")[2] for path in tmp_path.iterdir()} >= {"count_products", "count_quantizers"}


def test_compiled_code_is_cached_by_its_passes_in_order_and_by_the_files_of_those_from_outside() -> None:
    digest = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    ours = [["fuse_rms_norm", ""], ["fuse_residual", ""], ["fuse_silu_mul", ""], ["sum_experts", ""]]
    assert quantized._cache_settings(MicroMixConfig())["passes"] == ours
    assert quantized._cache_settings(MicroMixConfig(), [FOLDING])["targets"] == [["folding", *sorted(FOLDED)]]
    with added(POST_GRAD_PASSES, count_quantizers, after=fuse_rms_norm):
        passes = quantized._cache_settings(MicroMixConfig())["passes"]
    assert passes == [ours[0], ["count_quantizers", digest], *ours[1:]]


def unkeyed_passes() -> dict[str, Any]:
    """What nobody can tell versions of apart by a file."""
    scope: dict[str, Any] = {}
    exec("def typed_in(graph, context): return 0", scope)

    def closure(graph: fx.Graph, context: PassContext) -> int:
        return len(scope)

    return {"typed in": scope["typed_in"], "closure": closure, "partial": partial(count_quantizers)}


@pytest.mark.parametrize("kind", ["typed in", "closure", "partial"])
def test_a_post_grad_pass_that_no_file_tells_all_of_is_refused_by_name(kind: str) -> None:
    with pytest.raises(ValueError, match=r"the pass \w+ must be a function of a module in a file"):
        identities([unkeyed_passes()[kind]])


@pytest.mark.parametrize("functional", [False, True])
def test_a_graph_that_a_pass_breaks_is_an_error_in_either_phase(functional: bool) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_function(torch.relu, (x,)))

    def reads_too_early(graph: fx.Graph, context: PassContext) -> int:
        with graph.inserting_before(x):
            graph.output_node().args = (graph.call_function(torch.relu, (x,)),)
        return 1

    with pytest.raises(RuntimeError, match=r"before it has been defined|was used before"):
        run_passes(graph, [reads_too_early], context_with(), functional=functional)


@pytest.mark.parametrize("functional", [False, True])
def test_after_a_pass_a_module_runs_what_its_graph_says(functional: bool) -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x))

    def negate(graph: fx.Graph, context: PassContext) -> int:
        (relu,) = graph.find_nodes(op="call_function", target=torch.relu)
        relu.target = torch.neg
        return 1

    assert run_passes(gm.graph, [negate], context_with(), functional=functional) == {"negate": 1}
    assert float(gm(torch.tensor(2.0))) == -2.0


def test_dead_code_goes_after_a_post_grad_pass_only() -> None:
    """What nobody uses in a graph of Dynamo's may write to a tensor."""
    for functional, left in ((False, 1), (True, 0)):
        graph = fx.Graph()
        x = graph.placeholder("x")
        graph.call_method("relu", (x,))
        graph.output(x)
        run_passes(graph, [lambda *_: 1], context_with(), functional=functional)
        assert len(graph.find_nodes(op="call_method", target="relu")) == left

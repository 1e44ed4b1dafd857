"""Runs passes in order, counts what they matched, and dumps graphs on request."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from torch import Tensor, fx, nn

    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.target import Target

logger = logging.getLogger("micromix_compile")


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSite:
    """One linear layer found in a graph: node = x @ weight.T + bias, or x @ weight + bias if `transposed`.

    operand: what node reads of the weight: itself, or its transpose made in the graph.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    operand: fx.Node
    bias: fx.Node | None
    transposed: bool
    parameter: nn.Parameter

    @property
    def in_features(self) -> int:
        """Input channels C."""
        return self.parameter.shape[0 if self.transposed else 1]

    @property
    def out_features(self) -> int:
        """Output channels N."""
        return self.parameter.shape[1 if self.transposed else 0]


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """How one linear is to be rewritten.

    group: what its activation's order is looked up by; linears with equal groups share one channel_perm.
    tensors: examples of (channel_perm, w4, w6, w8, w_scale), for their shapes.
    """

    group: int
    split: Split
    fp6: str
    scale_rounding: str
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Owner(Protocol):
    """What the passes ask of whoever holds the model's state."""

    def name_of(self, parameter: nn.Parameter) -> str:
        """Fully qualified name of the linear that owns `parameter`."""

    def refusal(self, parameter: nn.Parameter) -> str | None:
        """Why the linear must stay as it is, or None."""

    def is_used_otherwise(self, parameter: nn.Parameter, *, transposed: bool) -> bool:
        """Whether another graph uses the weight the other way round."""

    def plan(self, parameter: nn.Parameter, *, transposed: bool) -> LinearPlan | None:
        """How to rewrite the linear, or None while it isn't calibrated."""

    def observe(
        self, x: Tensor, parameters: Sequence[nn.Parameter], transposed: Sequence[bool], source: Tensor | None
    ) -> None:
        """Take statistics of `x`, the common input of the linears with these weights, flattened from `source`."""

    def observe_output(self, y: Tensor, parameter: nn.Parameter) -> None:
        """Take statistics of `y`, the output of the linear with this weight."""

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        """Append a graph input that is looked up anew for every call."""


@dataclass(kw_only=True)
class PassContext:
    """What passes share while they work on one graph.

    example_inputs: the graph's inputs as the compiler got them; Parameters are real tensors.
    sites: filled by find_linears. refusals: name -> why a linear was left alone.
    unopened: filled by open_attention: name -> why the fused operation that reads the weight was left alone.
    inputs: filled by rewrite_linears: per appended input, the Parameter's placeholder and which tensor of its plan.
    target_of: who computes on a device.
    folded: filled by fold_products: for one or more appended inputs, in order, the inputs that they are made from, and
        the function that makes them, anew when the last changes.
    """

    owner: Owner
    example_inputs: Sequence[Any]
    dump: Sequence[str] = ()
    dump_dir: str = "."
    sites: list[LinearSite] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    unopened: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[fx.Node, int]] = field(default_factory=list)
    target_of: Callable[[torch.device], Target] = target_of
    folded: list[tuple[tuple[fx.Node, ...], Callable[..., tuple[Tensor, ...]]]] = field(default_factory=list)


Pass = Callable[["fx.GraphModule", PassContext], int]
"""A pass changes the graph in place and returns how many places it matched."""


def run_passes(gm: fx.GraphModule, passes: Sequence[Pass], context: PassContext) -> dict[str, int]:
    """Run `passes` in order on `gm`; returns the number of matches of each by name."""
    matches = {}
    for graph_pass in passes:
        name = graph_pass.__name__
        _dump(gm.graph, context.dump, context.dump_dir, f"before.{name}")
        matches[name] = graph_pass(gm, context)
        _clean_up(gm)
        _dump(gm.graph, context.dump, context.dump_dir, f"after.{name}")
    logger.debug("passes: %s", ", ".join(f"{name} {count}" for name, count in matches.items()))
    return matches


def _clean_up(gm: fx.GraphModule) -> None:
    # No dead code elimination: a Dynamo graph may call in-place methods whose result nobody uses.
    gm.graph.lint()
    gm.recompile()


def _dump(graph: fx.Graph, dump: Sequence[str], dump_dir: str, moment: str) -> None:
    """Write a graph to the next file of `dump_dir` if `dump` has its pass. moment: "before.PASS" or "after.PASS"."""
    if not {"all", moment.partition(".")[2]} & set(dump):
        return
    folder = Path(dump_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{len(list(folder.glob('*.txt'))):04d}.{moment}.txt"
    path.write_text(f"{graph}\n\n{graph.python_code('self').src}\n")
    logger.info("graph %s: %s", moment.replace(".", " "), path)


PostGradPass = Callable[["fx.Graph"], int]
"""A pass on Inductor's graph. It, too, returns how many places it matched."""


def dumping(passes: Sequence[PostGradPass], dump: Sequence[str], dump_dir: str) -> list[PostGradPass]:
    """Post-grad passes that log and dump as `run_passes` does, whenever Inductor runs them."""
    return [partial(_run_post_grad, graph_pass, tuple(dump), dump_dir) for graph_pass in passes]


def _run_post_grad(graph_pass: PostGradPass, dump: Sequence[str], dump_dir: str, graph: fx.Graph) -> int:
    name = graph_pass.__name__
    _dump(graph, dump, dump_dir, f"before.{name}")
    matches = graph_pass(graph)
    _dump(graph, dump, dump_dir, f"after.{name}")
    logger.debug("post-grad pass: %s %d", name, matches)
    return matches


def input_devices(nodes: Iterable[fx.Node]) -> list[torch.device]:
    """The distinct devices of the graph's inputs, such as packed weights, that `nodes` read."""
    inputs = (node for reader in nodes for node in reader.all_input_nodes if node.op == "placeholder")
    examples = (node.meta.get("example_value") for node in inputs)
    return list(dict.fromkeys(example.device for example in examples if isinstance(example, torch.Tensor)))


def copy_meta(source: fx.Node, target: fx.Node) -> fx.Node:
    """Give `target` where `source` comes from: its stack trace and module stack."""
    for key in ("stack_trace", "nn_module_stack", "source_fn_stack"):
        if key in source.meta:
            target.meta[key] = source.meta[key]
    return target

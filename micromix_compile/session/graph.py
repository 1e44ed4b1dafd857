"""One graph of a session: opened for passes, closed with guards, called with the weights that were appended to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import fx, nn

from micromix_compile.lowering.torch_private.dynamo import copy_graph_module, guard_attribute, parameter_name
from micromix_compile.passes import PassContext
from micromix_compile.passes.pre_grad.open_attention import say_unopened
from micromix_compile.session.distributed import check_real

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from micromix_compile.recipe.parts import Part
    from micromix_compile.session.session import Session
    from micromix_compile.session.state import LinearState


def open_graph(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, PassContext]:
    """A copy of a Dynamo graph that passes may change, and their context; every weight in it is known to `session`."""
    session.check_not_training()
    check_real(example_inputs)
    gm = copy_graph_module(gm)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter) and value.dim() >= 2 and not session.knows(value):
            session.adopt(value, parameter_name(node))
    config = session.config
    return gm, PassContext(
        owner=session, example_inputs=example_inputs, dump=config.dump, dump_dir=config.dump_dir,
        keeps_expanded=config.keep_expanded,
    )  # fmt: skip


def close_graph(session: Session, context: PassContext) -> None:
    """Guard what the graph was built on.

    Raises ValueError if it turns out that nothing can be quantized, or, if strict, if a fused operation hides linears;
    RuntimeError, if strict, for a linear that stays though nobody asked for it, or for experts with a recipe that run
    in a loop.
    """
    say_unopened(context.unopened, strict=session.config.strict)
    sites = [(site.parameter, site.part) for site in context.sites]
    session.note_refusals({**context.refusals, **context.unopened}, sites)
    session.check_experts()
    for site in context.sites:
        guard_attribute(site.weight, session.state_attribute, "key")
    if context.sites and session.state(context.sites[0].parameter).file is not None:
        guard_attribute(context.sites[0].weight, session.state_attribute, "recipe_digest")


@dataclass(frozen=True, kw_only=True, slots=True)
class AppendedInputs:
    """What a graph that passes have rewritten reads besides its own inputs, looked up for every call.

    packed: for each of the first appended inputs, the position of its weight, which part of that, and which tensor of
    the packed form it is.
    folded: for those that follow, one or several at a time: the positions of what they are made from, and what makes
    them.
    weights: positions of the weights, which parts of them, and whether these are used transposed: another layer's
    weights may be the first that this graph sees. keys: of all graph inputs on which what is appended
    depends.
    """

    packed: Sequence[tuple[int, Part | None, int]]
    folded: Sequence[tuple[Sequence[int], Callable[..., tuple[Tensor, ...]]]]
    weights: Sequence[tuple[int, Part | None, bool]]
    keys: Sequence[int]

    @classmethod
    def of(cls, gm: fx.GraphModule, context: PassContext) -> AppendedInputs:
        """Those of a graph after its passes."""
        placeholders = gm.graph.find_nodes(op="placeholder")
        own = len(context.example_inputs)
        place = {node: i for i, node in enumerate(placeholders)}
        packed = [(place[weight], part, index) for weight, part, index in context.inputs]
        folded = [([place[node] for node in nodes], make) for nodes, make in context.folded]
        transposed = {(place[site.weight], site.part): site.transposed for site in context.sites}
        weights = [(i, part, transposed[i, part]) for i, part in dict.fromkeys((i, part) for i, part, _ in packed)]
        makers = {places[-1] for places, _ in folded if places[-1] < own}
        return cls(packed=packed, folded=folded, weights=weights, keys=sorted({*(i for i, *_ in weights), *makers}))

    def values(self, session: Session, args: Sequence[Any]) -> tuple[list[LinearState], list[Any]]:
        """(states of the weights among a call's `args`, what is appended to these)."""
        packed = {
            (i, part): session.packed(args[i], part, transposed=transposed) for i, part, transposed in self.weights
        }
        more = self.made(args, [packed[i, part][index] for i, part, index in self.packed])
        return [session.state(args[i], part) for i, part, _ in self.weights], more

    def made(self, args: Sequence[Any], packed: Sequence[Any] = ()) -> list[Any]:
        """What is appended to a call's `args`: what was packed of weights, and what is made of that and of these."""
        given = [*args, *packed]
        for places, make in self.folded:
            given += make(*[given[i] for i in places])
        return given[len(args) :]

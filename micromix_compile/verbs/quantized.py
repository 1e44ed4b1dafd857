"""A graph whose linears run in mixed MX formats: rewritten, compiled by Inductor, called with packed weights."""

from __future__ import annotations

import logging
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.linear.gradient import wants_gradients
from micromix_compile.lowering import inductor
from micromix_compile.lowering.torch_private import regions
from micromix_compile.ops.prepared import Kept
from micromix_compile.passes import (
    CONVERT_PASSES,
    POST_GRAD_PASSES,
    for_inductor,
    identities,
    input_devices,
    is_counting,
    run_passes,
)
from micromix_compile.session.graph import AppendedInputs, close_graph, open_graph
from micromix_compile.targets.target import target_of
from micromix_compile.verbs.ahead import AheadGraph

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.passes import PassContext
    from micromix_compile.session.session import Session
    from micromix_compile.targets.target import Target

logger = logging.getLogger("micromix_compile")
_said: set[str] = set()

PRODUCTS = (
    *(ops.mixed_mx_mm, torch.ops.micromix.mixed_mx_mm, ops.folded_mm),
    *(ops.grouped_mx_mm, torch.ops.micromix.grouped_mx_mm, ops.grouped_folded_mm),
)


def compile_quantized(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Rewrite the graph's linears and compile it with Inductor; packed weights are looked up for every call."""
    gm, context = open_graph(session, gm, example_inputs)
    context.target_of = cache(partial(target_of, exact=session.config.exact))
    run_passes(gm.graph, CONVERT_PASSES, context)
    close_graph(session, context)
    targets = _targets(session, gm, context)
    gradients = session.is_packed and not context.inputs and wants_gradients(example_inputs)
    appended = AppendedInputs.of(gm, context)
    examples = [node.meta["example_value"] for node in gm.graph.find_nodes(op="placeholder")[len(example_inputs) :]]
    with torch.set_grad_enabled(gradients):
        compiled = inductor.compile_graph(
            gm,
            [*example_inputs, *examples],
            options=options,
            post_grad_passes=for_inductor(POST_GRAD_PASSES, context),
            settings=_cache_settings(session.config, targets),
        )
    if regions.compiles_ahead():
        return AheadGraph(compiled, appended, gradients=gradients)
    return _QuantizedGraph(session, compiled, appended, gradients=gradients).run


class _QuantizedGraph:
    """Compiled code, called with a graph's own inputs."""

    def __init__(
        self, session: Session, compiled: Callable[..., Any], appended: AppendedInputs, *, gradients: bool
    ) -> None:
        self._session = session
        self._compiled = compiled
        self._keys = appended.keys
        self._reads_weights = bool(appended.weights)
        self._gradients = gradients
        self._kept = Kept(lambda args: appended.values(session, args), guarded=True)

    def run(self, *args: Any) -> Any:
        """What the graph returns. Raises ValueError if the model is in training mode."""
        self._session.check_not_training()
        states, more = self._kept.of([args[i] for i in self._keys], args)
        self._session.coverage.count(states)
        if self._reads_weights and torch.is_grad_enabled():
            _say_once("micromix runs without gradients: its outputs don't require grad")
        with torch.set_grad_enabled(self._gradients):
            return self._compiled(*args, *more)


def _cache_settings(config: MicroMixConfig, targets: Sequence[Target] = ()) -> dict[str, Any]:
    """What compiled code depends on beside the graph and this package."""
    named = [[target.name, *sorted(target.passes)] for target in targets]
    watched = bool(config.dump) or is_counting()
    return {**config.to_dict(), "passes": identities(POST_GRAD_PASSES), "targets": named, "watched": watched}


def _targets(session: Session, gm: fx.GraphModule, context: PassContext) -> list[Target]:
    """Who computes the products of a graph. The log says where they are slow; strict, that raises RuntimeError."""
    products = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    targets = [context.target_of(device) for device in input_devices(products)]
    _check_targets(session.config, targets)
    return targets


def _check_targets(config: MicroMixConfig, targets: Sequence[Target]) -> None:
    """Say who computes; warn where that is plain PyTorch. Raises RuntimeError instead of the latter if strict."""
    for target in targets:
        if target.emulated is None:
            _say_once(f"the linears run on {target.name}: their products take {target.takes} operands", logging.DEBUG)
            continue
        message = f"the linears run as plain PyTorch operations on {target.name}: {target.emulated}"
        if config.strict:
            raise RuntimeError(f"strict=True: {message}")
        _say_once(message)


def _say_once(message: str, level: int = logging.WARNING) -> None:
    if message not in _said:
        _said.add(message)
        logger.log(level, message)

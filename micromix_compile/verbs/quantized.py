"""A graph whose linears run in mixed MX formats: rewritten, compiled by Inductor, called with packed weights."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from micromix_compile import ops
from micromix_compile.linear.gradient import wants_gradients
from micromix_compile.lowering import inductor
from micromix_compile.ops.folded import runs_folded
from micromix_compile.ops.prepared import Kept
from micromix_compile.passes import (
    CONVERT_PASSES,
    POST_GRAD_PASSES,
    for_inductor,
    input_devices,
    outside_sources,
    run_passes,
)
from micromix_compile.session.graph import AppendedInputs, close_graph, open_graph
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.passes import PassContext
    from micromix_compile.session.session import Session

logger = logging.getLogger("micromix_compile")
_said: set[str] = set()

_folds = runs_folded
"""Whether products with such a weight are to be folded."""

PRODUCTS = (ops.mixed_mx_mm, torch.ops.micromix.mixed_mx_mm, ops.folded_mm)


def compile_quantized(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Rewrite the graph's linears and compile it with Inductor; packed weights are looked up for every call."""
    gm, context = open_graph(session, gm, example_inputs)
    context.folds = None if session.config.exact else _folds
    run_passes(gm.graph, CONVERT_PASSES, context)
    close_graph(session, context)
    _check_products(session, gm, context)
    gradients = session.is_packed and not context.inputs and wants_gradients(example_inputs)
    appended = gm.graph.find_nodes(op="placeholder")[len(example_inputs) :]
    with torch.set_grad_enabled(gradients):
        compiled = inductor.compile_graph(
            gm,
            [*example_inputs, *(node.meta["example_value"] for node in appended)],
            options=options,
            post_grad_passes=for_inductor(POST_GRAD_PASSES, context),
            settings=_cache_settings(session.config),
        )
    return _QuantizedGraph(session, compiled, AppendedInputs.of(gm, context), gradients=gradients).run


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
        self._kept = Kept(lambda args: appended.values(session, args))

    def run(self, *args: Any) -> Any:
        """What the graph returns. Raises ValueError if the model is in training mode."""
        self._session.check_not_training()
        states, more = self._kept.of([args[i] for i in self._keys], args)
        self._session.coverage.count(states)
        if self._reads_weights and torch.is_grad_enabled():
            _say_once("micromix runs without gradients: its outputs don't require grad")
        with torch.set_grad_enabled(self._gradients):
            return self._compiled(*args, *more)


def _cache_settings(config: MicroMixConfig) -> dict[str, Any]:
    """What compiled code depends on beside the graph and this package."""
    outside = outside_sources(POST_GRAD_PASSES)
    return {**config.to_dict(), **({"passes": outside} if outside else {})}


def _check_products(session: Session, gm: fx.GraphModule, context: PassContext) -> None:
    """Say where products are slow, or that there is none. Raises RuntimeError for slow ones if strict."""
    products = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    if products:
        _check_target(session.config, input_devices(products))
    elif context.sites and not session.is_packed:
        logger.warning("no linear of this graph has a recipe (%s, ...)", session.name_of(context.sites[0].parameter))


def _check_target(config: MicroMixConfig, devices: Sequence[torch.device]) -> None:
    """Say where linears on `devices` run as plain PyTorch. Raises RuntimeError instead if strict."""
    for target in map(target_of, devices):
        if target.emulated is None:
            continue
        message = f"the linears run as plain PyTorch operations on {target.name}: {target.emulated}"
        if config.strict:
            raise RuntimeError(f"strict=True: {message}")
        _say_once(message)


def _say_once(message: str) -> None:
    if message not in _said:
        _said.add(message)
        logger.warning(message)

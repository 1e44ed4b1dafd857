"""A graph that calibrates: run eagerly as it is, with observers in it, until its model converts itself."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from micromix_compile.lowering.torch_private.dynamo import is_resumed, source_name
from micromix_compile.lowering.torch_private.regions import running_region
from micromix_compile.passes import CALIBRATE_PASSES, run_passes
from micromix_compile.progress import CallProgress
from micromix_compile.session.graph import close_graph, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import fx

    from micromix_compile.session.session import Session

logger = logging.getLogger("micromix_compile")


def compile_observed(session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """The graph with observers in it; who calls it says when its statistics are enough, and what the token mask is."""
    gm, _ = _with_observers(session, gm, example_inputs)
    return _ObservedGraph(session, gm).run


def compile_self_converting(
    session: Session,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    on_converted: Callable[[Session], None],
) -> Callable[..., Any]:
    """The same of a model that reads the token mask from its graphs and converts itself once it has seen enough.

    on_converted: called then.
    """
    gm, observed = _with_observers(session, gm, example_inputs)
    names = [source_name(node) for node in gm.graph.find_nodes(op="placeholder")]
    masks = [i for i, name in enumerate(names) if "attention_mask" in name and _is_token_mask(example_inputs[i])]
    starts_pass = _starts_pass(session, names)
    graph = _ObservedGraph(session, gm)
    progress = CallProgress("micromix calibrates", show=True)

    def run(*args: Any) -> Any:
        if masks or starts_pass:
            session.observation.token_mask = args[masks[0]] if masks else None
        result = graph.run(*args)
        if observed:
            with session.observation.lock:
                if session.recipe is None and _convert_when_done(session, progress):
                    on_converted(session)
        return result

    return run


def _with_observers(session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> tuple[fx.GraphModule, int]:
    """A copy of the graph, and how many observers it has."""
    gm, context = open_graph(session, gm, example_inputs)
    observed = run_passes(gm.graph, CALIBRATE_PASSES, context)["insert_observers"]
    close_graph(session, context)
    return gm, observed


class _ObservedGraph:
    """A graph with observers, called with its own inputs."""

    def __init__(self, session: Session, gm: fx.GraphModule) -> None:
        self._session = session
        self._forward = gm.forward

    def run(self, *args: Any) -> Any:
        """What the graph returns. Raises ValueError if the model is in training mode."""
        self._session.check_not_training()
        with torch.set_grad_enabled(self._session.observation.takes_gradients):
            return self._forward(*args)


def _starts_pass(session: Session, names: Sequence[str]) -> bool:
    """Whether a graph with these inputs is the beginning of the model's forward pass, not its rest after a break."""
    if any("input_ids" in name or "inputs_embeds" in name for name in names):
        return True
    running = running_region().running
    return bool(running) and session.is_model(running[0]) and not is_resumed(names)


def _is_token_mask(value: object) -> bool:
    return isinstance(value, Tensor) and value.dim() == 2 and not value.is_floating_point()


def _convert_when_done(session: Session, progress: CallProgress) -> bool:
    """Convert once every linear has seen enough, or one has gone a batch further: some may never be reached.

    Returns whether it did.
    """
    observation = session.observation
    progress.update(observation.batches, session.config.calibration_batches)
    if not observation.is_enough():
        return False
    progress.stop()
    left = observation.missing()
    recipe = session.convert()
    logger.warning(
        "calibrated on %d batches; %s now runs quantized: %d linears, %s%s",
        observation.batches,
        session.model_id,
        len(recipe.linears),
        recipe.bits_text,
        f"; {len(left)} were not reached and stay as they are ({left[0]}, ...)" if left else "",
    )
    return True

"""Calibration: the compiled graph runs eagerly with observers in it, then the statistics become a recipe."""

from __future__ import annotations

import contextlib
import logging
import threading
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from micromix_compile.calibration.memory import OBSERVING, SENSITIVITY, naming_out_of_memory
from micromix_compile.calibration.sensitivity import lacks_gradient, pull_back
from micromix_compile.calibration.token_layout import token_mask_of
from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering.torch_private import recompile_limit
from micromix_compile.lowering.torch_private.dynamo import cause_of, is_resumed, source_name
from micromix_compile.lowering.torch_private.regions import original_module, running_region, uncompiled
from micromix_compile.passes import CALIBRATE_PASSES, run_passes
from micromix_compile.progress import CallProgress, track
from micromix_compile.session.session import Session, close_graph, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import fx

    from micromix_compile.lowering.torch_private.recompile_limit import CompileId
    from micromix_compile.recipe.types import Recipe

logger = logging.getLogger("micromix_compile")

SENSITIVITY_TOKENS: Final = 4096
"""Tokens of the first batches that are also run backward."""


def calibrate(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    config: MicroMixConfig | None = None,
    *,
    progress: bool = True,
) -> Recipe:
    """Run `batches` through `model` and decide the order and split of every linear's input channels.

    The policy "budget" also runs the first batches backward; rounded weights keep K * K numbers a group meanwhile.

    batches: mappings of keyword arguments (input_ids, attention_mask, ...), or single tensors passed as they are.
        Tokens where a 2-dimensional attention_mask is 0 are not counted.
    Returns a `Recipe`. The model is not changed. Raises ValueError if the model is in training mode, if no batch or no
    linear was reached, if an activation holds a NaN (naming the linear and the batch), or if all is packed already;
    TypeError for other batches; torch.OutOfMemoryError that names the step and what takes less memory.
    """
    return next(calibrate_each(model, batches, [config or MicroMixConfig()], progress=progress))


def calibrate_each(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    configs: Sequence[MicroMixConfig],
    *,
    progress: bool = True,
) -> Iterator[Recipe]:
    """One recipe per config from a single calibration, made when it is asked for. Otherwise like `calibrate`.

    The first config's seed and scale_rounding hold for the measurement of sensitivities.
    """
    if isinstance(batches, Tensor) or hasattr(batches, "keys"):
        raise TypeError(f"batches must be several tensors or mappings, put one {type(batches).__name__} into a list")
    model = original_module(model)
    session = Session(configs[0], also=configs[1:])
    session.prepare(model)
    if session.is_packed and not session.has_candidates:
        raise ValueError(f"{session.model_id} holds packed linears: calibrate the model that they were made from")
    first = _FirstTokens(SENSITIVITY_TOKENS)
    session.takes_costs = False
    try:
        with observing(model, partial(compile_observed, session)) as observed:
            with naming_out_of_memory(*OBSERVING), torch.no_grad():
                for batch in track(batches, "calibrating", show=progress):
                    first.add(batch)
                    observe_batch(session, observed, batch)
            if session.needs_costs:
                with naming_out_of_memory(*SENSITIVITY):
                    _measure_costs(session, model, observed, first.batches, progress)
        yield from session.recipes(progress=progress)
    finally:
        session.release()


_turns: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
"""One observation of a model at a time: to measure costs, Parameters stop asking for gradients meanwhile."""


@contextlib.contextmanager
def observing(
    model: nn.Module, compile_graph: Callable[[fx.GraphModule, Sequence[Any]], Callable[..., Any]]
) -> Iterator[Callable[..., Any]]:
    """`model` as a function whose graphs `compile_graph` compiles; what was compiled of it before is left alone.

    However often it is called, neither this nor any other use of torch.compile comes nearer to Dynamo's limits. Other
    threads wait.
    """

    def backend(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, example_inputs)

    recompile_limit.count_apart(backend, _Unlimited())
    with _turns.setdefault(model, threading.RLock()), uncompiled(model):
        try:
            yield torch.compile(model, backend=backend)
        finally:
            recompile_limit.forget(backend)


class _Unlimited:
    """What is compiled to be run eagerly costs little, and does not last."""

    def check(self) -> None:
        """The model was looked at before."""

    def counted(self, backend: Any) -> frozenset[CompileId]:
        """None."""
        return frozenset()

    def gave_up(self, backend: Any, function: str, limit: str) -> None:
        """Nothing exceeds a limit where nothing counts, but one of zero."""
        raise RuntimeError(f"calibration can't run {function}: {limit}")


def observe_batch(session: Session, observed: Callable[..., Any], batch: Mapping[str, Any] | Tensor) -> Any:
    """The output of one batch through the observed model."""
    positional, named = _arguments(batch)
    session.token_mask = token_mask_of(positional, named)
    try:
        return observed(*positional, **named)
    except Exception as error:
        cause = cause_of(error)
        if cause is error:
            raise
        raise cause from None


class _FirstTokens:
    """Keeps the first batches, as many as hold `tokens` tokens."""

    def __init__(self, tokens: int) -> None:
        self.batches: list[Mapping[str, Any] | Tensor] = []
        self._left = tokens

    def add(self, batch: Mapping[str, Any] | Tensor) -> None:
        if self._left > 0:
            self.batches.append(batch)
            positional, named = _arguments(batch)
            sizes = [value.shape[:2].numel() for value in (*positional, *named.values()) if isinstance(value, Tensor)]
            self._left -= max(sizes, default=1)


def _measure_costs(
    session: Session,
    model: nn.Module,
    observed: Callable[..., Any],
    batches: Sequence[Mapping[str, Any] | Tensor],
    progress: bool,
) -> None:
    """What each channel costs in each format, from gradients where the model has them, else without."""
    session.takes_statistics, session.takes_costs, session.takes_gradients = False, True, True
    generator = torch.Generator().manual_seed(session.config.seed)
    try:
        with torch.enable_grad(), _frozen(model):
            for batch in track(batches, "measuring sensitivity", show=progress):
                output = observe_batch(session, observed, batch)
                if not pull_back(output, session.token_mask, generator):
                    raise RuntimeError("its output has no gradient")
                for probe in session.probes():
                    probe.release()
        return
    except RuntimeError as error:
        if not lacks_gradient(error):
            raise
        logger.warning(
            "%s has no usable gradient (%s): each linear's own output decides where bits go, which is less accurate",
            session.model_id,
            error,
        )
    finally:
        for probe in session.probes():
            probe.release()
        session.takes_gradients = False
    session.forget_costs()
    with torch.no_grad():
        for batch in batches:
            observe_batch(session, observed, batch)


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient: only activations do."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


def _arguments(batch: Mapping[str, Any] | Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if hasattr(batch, "keys"):  # a dict, or what a tokenizer returns
        return (), dict(batch)
    raise TypeError(f"a batch must be a tensor or a mapping of keyword arguments, got {type(batch).__name__}")


def compile_observed(
    session: Session,
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    on_converted: Callable[[Session], None] | None = None,
) -> Callable[..., Any]:
    """The graph as it is, run eagerly, with observers in it.

    on_converted: called when the session converts, which it does by itself where this is given, once it has seen
    enough; it then reads the attention mask from the graph.
    """
    gm, context = open_graph(session, gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    observed = run_passes(gm.graph, CALIBRATE_PASSES, context)["insert_observers"]
    close_graph(session, context)
    names = [source_name(node) for node in placeholders]
    masks = [i for i, name in enumerate(names) if "attention_mask" in name and _is_token_mask(example_inputs[i])]
    starts_pass = _starts_pass(session, names)
    progress = CallProgress("micromix calibrates", show=on_converted is not None)

    def run(*args: Any) -> Any:
        session.check_not_training()
        if on_converted is not None and (masks or starts_pass):
            session.token_mask = args[masks[0]] if masks else None
        with torch.set_grad_enabled(session.takes_gradients):
            result = gm.forward(*args)
        if on_converted is not None and observed:
            with session.lock:
                if session.recipe is None and _convert_when_done(session, progress):
                    on_converted(session)
        return result

    return run


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
    progress.update(session.observed_batches, session.config.calibration_batches)
    if not session.has_seen_enough():
        return False
    progress.stop()
    left = session.unobserved()
    recipe = session.convert()
    logger.warning(
        "calibrated on %d batches; %s now runs quantized: %d linears, %s%s",
        session.observed_batches,
        session.model_id,
        len(recipe.linears),
        recipe.bits_text,
        f"; {len(left)} were not reached and stay as they are ({left[0]}, ...)" if left else "",
    )
    return True

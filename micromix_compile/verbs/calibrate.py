"""Calibration: the compiled graph runs eagerly with observers in it, then the statistics become a recipe."""

from __future__ import annotations

import contextlib
import copy
import logging
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from micromix_compile.calibration.memory import OBSERVING, SENSITIVITY, naming_out_of_memory
from micromix_compile.calibration.sensitivity import lacks_gradient, pull_back
from micromix_compile.calibration.token_layout import token_mask_of
from micromix_compile.config import MicroMixConfig, check_config
from micromix_compile.lowering.torch_private import recompile_limit
from micromix_compile.lowering.torch_private.dynamo import cause_of
from micromix_compile.lowering.torch_private.regions import original_module, uncompiled
from micromix_compile.progress import track
from micromix_compile.session.session import Session
from micromix_compile.verbs.observed import compile_observed

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

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

    The policy "budget" also runs the first batches backward, and weights whose rounding is "guided" run all; rounded
    weights keep K * K numbers a group meanwhile.

    batches: mappings of keyword arguments (input_ids, attention_mask, ...), or single tensors passed as they are.
        Tokens where a 2-dimensional attention_mask is 0 are not counted.
    Returns a `Recipe`. The model is not changed. Raises ValueError if the model is in training mode, if no batch or no
    linear was reached, if an activation holds a NaN (naming the linear and the batch), or if all is packed already;
    TypeError for other models, batches and configs; torch.OutOfMemoryError that names the step and what takes less
    memory.
    """
    return next(calibrate_each(model, batches, [MicroMixConfig() if config is None else config], progress=progress))


def calibrate_each(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    configs: Sequence[MicroMixConfig],
    *,
    progress: bool = True,
) -> Iterator[Recipe]:
    """One recipe per config from a single calibration, made when it is asked for. Otherwise like `calibrate`.

    The first config's seed and scale_rounding hold for the measurement of sensitivities; `convolutions` must be the
    same in all.
    """
    _check_batches(batches)
    _check_configs(configs)
    with contextlib.closing(_recipes(model, batches, configs, progress)) as recipes:
        while True:
            with torch.inference_mode(False):  # whose tensors have no gradients, and can't be changed outside
                recipe = next(recipes, None)
            if recipe is None:
                return
            yield recipe


def _recipes(
    model: nn.Module, batches: Iterable[Mapping[str, Any] | Tensor], configs: Sequence[MicroMixConfig], progress: bool
) -> Generator[Recipe]:
    """What `calibrate_each` does, outside of inference mode."""
    model = original_module(model)
    session = Session(configs[0], also=configs[1:])
    session.prepare(model)
    if session.is_packed and not session.has_candidates:
        raise ValueError(f"{session.model_id} holds packed linears: calibrate the model that they were made from")
    observation = session.observation
    tokens = SENSITIVITY_TOKENS if observation.needs_costs else 0
    kept = _KeptBatches(tokens, all_of_them=observation.needs_guidance)
    observation.takes_costs, observation.takes_moments = False, observation.needs_plain_moments
    try:
        with observing(model, partial(compile_observed, session)) as observed:
            with naming_out_of_memory(*OBSERVING), torch.no_grad():
                for batch in track(batches, "calibrating", show=progress):
                    kept.add(batch)
                    observe_batch(session, observed, batch)
            if observation.needs_costs or observation.needs_guidance:
                with naming_out_of_memory(*SENSITIVITY):
                    _measure_sensitivity(session, model, observed, kept, progress)
        yield from session.recipes(progress=progress)
    finally:
        observation.release()


def _check_batches(batches: object) -> None:
    if isinstance(batches, Tensor) or hasattr(batches, "keys"):
        raise TypeError(f"batches must be several tensors or mappings, put one {type(batches).__name__} into a list")
    if isinstance(batches, str) or not (isinstance(batches, Iterable) or hasattr(batches, "__getitem__")):
        raise TypeError(f"batches must be several tensors or mappings, got {type(batches).__name__}")


def _check_configs(configs: object) -> None:
    if not isinstance(configs, Sequence) or not configs:
        raise TypeError(f"configs must be a list of at least one MicroMixConfig, got {configs!r}")
    for config in configs:
        check_config(config)
    if len({config.convolutions for config in configs}) > 1:
        raise ValueError("configs must have one value of convolutions for all, got True and False: calibrate for each")


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
    session.observation.token_mask = token_mask_of(positional, named)
    try:
        return observed(*positional, **named)
    except Exception as error:
        cause = cause_of(error)
        if cause is error:
            raise
        raise cause from None


class _KeptBatches:
    """Keeps copies of batches that are to be run again: `all_of_them`, or the first, as many as hold `tokens` tokens.

    Who made a batch may fill it anew, and the model may change it. first: how many the first are.
    """

    def __init__(self, tokens: int, *, all_of_them: bool) -> None:
        self.batches: list[Mapping[str, Any] | Tensor] = []
        self.first = 0
        self._left = tokens
        self._all = all_of_them

    def add(self, batch: Mapping[str, Any] | Tensor) -> None:
        is_first = self._left > 0
        positional, named = _arguments(batch)
        if is_first or self._all:
            self.batches.append(_copied(positional[0] if positional else named))
        if is_first:
            self.first += 1
            sizes = [value.shape[:2].numel() for value in (*positional, *named.values()) if isinstance(value, Tensor)]
            self._left -= max(sizes, default=1)


def _copied(batch: Any) -> Any:
    """The same values, which nobody else changes, and whose gradients reach nobody."""
    try:
        return copy.deepcopy(batch, {id(tensor): tensor.detach().clone() for tensor in _tensors(batch)})
    except Exception as error:
        raise TypeError(f"a batch that is run twice must be one that copy.deepcopy copies: {error}") from error


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those that stand in mappings, lists and tuples; deepcopy alone refuses some, and copies their gradients."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for one in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(one)


def _measure_sensitivity(
    session: Session, model: nn.Module, observed: Callable[..., Any], kept: _KeptBatches, progress: bool
) -> None:
    """What each channel costs in each format, and each token's weight, from gradients if the model has them.

    Without them costs are measured at each linear's own output, and all tokens weigh the same.
    """
    observation = session.observation
    observation.takes_statistics, observation.takes_moments = False, observation.needs_guidance
    try:
        with torch.enable_grad(), _frozen(model):
            _run_backward(session, observed, kept, progress)
        observation.is_guided = observation.needs_guidance
        return
    except RuntimeError as error:
        if not lacks_gradient(error):
            raise
        logger.warning(
            "%s has no usable gradient (%s): each linear's own output decides what matters, which is less accurate",
            session.model_id,
            error,
        )
    observation.forget_gradients()
    observation.takes_moments = observation.needs_guidance and not observation.needs_plain_moments
    with torch.no_grad():
        for batch in _each(session, kept, "measuring without gradients", progress):
            observe_batch(session, observed, batch)


def _each(session: Session, kept: _KeptBatches, title: str, progress: bool) -> Iterator[Mapping[str, Any] | Tensor]:
    """The kept batches; costs are taken of the first only."""
    observation = session.observation
    for index, batch in enumerate(track(kept.batches, title, show=progress)):
        observation.takes_costs = observation.needs_costs and index < kept.first
        if observation.takes_costs or observation.takes_moments:
            yield batch


def _run_backward(session: Session, observed: Callable[..., Any], kept: _KeptBatches, progress: bool) -> None:
    """Raises RuntimeError for a model without gradients."""
    observation = session.observation
    observation.takes_gradients = True
    generator = torch.Generator().manual_seed(session.config.seed)
    try:
        for batch in _each(session, kept, "measuring sensitivity", progress):
            output = observe_batch(session, observed, batch)
            if not pull_back(output, observation.token_mask, generator):
                raise RuntimeError("its output has no gradient")
            observation.release_batch()
    finally:
        observation.release_batch()
        observation.takes_gradients = False


_frozen_by: Counter[nn.Parameter] = Counter()
"""How many calibrations keep a Parameter from asking for gradients: models in several threads may share it."""

_freezing = threading.Lock()


@contextlib.contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """No parameter of `model` asks for a gradient, until the last calibration ends that needs it so: only activations
    do."""
    with _freezing:
        wanted = [parameter for parameter in model.parameters() if parameter.requires_grad or parameter in _frozen_by]
        _frozen_by.update(wanted)
        for parameter in wanted:
            parameter.requires_grad_(False)
    try:
        yield
    finally:
        with _freezing:
            _frozen_by.subtract(wanted)
            for parameter in wanted:
                if not _frozen_by[parameter]:
                    del _frozen_by[parameter]
                    parameter.requires_grad_(True)


def _arguments(batch: Mapping[str, Any] | Tensor) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    if isinstance(batch, Tensor):
        return (batch,), {}
    if hasattr(batch, "keys"):  # a dict, or what a tokenizer returns
        return (), dict(batch)
    raise TypeError(f"a batch must be a tensor or a mapping of keyword arguments, got {type(batch).__name__}")

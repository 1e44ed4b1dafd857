"""torch.compile(model, backend="micromix"): from a Dynamo graph to code whose linears run in mixed MX formats."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch
from torch import nn

from micromix_compile import folded_ops, ops
from micromix_compile.assignment import assign
from micromix_compile.calibration import compile_observed
from micromix_compile.config import MicroMixConfig
from micromix_compile.folded_ops import Kept
from micromix_compile.lowering import inductor, torch_compat
from micromix_compile.passes import CONVERT_PASSES, POST_GRAD_PASSES, dumping, input_devices, run_passes
from micromix_compile.recipe import Recipe
from micromix_compile.session import LinearState, Session, close_graph, open_graph
from micromix_compile.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

logger = logging.getLogger("micromix_compile")
_said: set[str] = set()


_folds = folded_ops.runs_folded
"""Whether products with such a weight are to be folded."""

PRODUCTS = (ops.mixed_mx_mm, torch.ops.micromix.mixed_mx_mm, folded_ops.folded_mm)

SessionKey = tuple[tuple[str, ...], MicroMixConfig, object]

PACKED_OPTIONS = frozenset({"strict", "exact", "dump", "dump_dir", "calibration_batches", "calibration_tokens"})
"""Those of ours that a model that is packed already may get: the others ask for another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What torch.compile was given, sorted: fields of `MicroMixConfig`, the recipe, Inductor's."""

    ours: Mapping[str, Any]
    recipe: Recipe | str | None
    inductor: Mapping[str, Any]

    @property
    def key(self) -> SessionKey:
        """Equal for calls that belong to one session. What is left out may mean a default or the recipe's choice."""
        source = id(self.recipe) if isinstance(self.recipe, Recipe) else self.recipe
        return tuple(sorted(self.ours)), MicroMixConfig(**self.ours), source

    def make_session(self) -> Session:
        """A session that quantizes by the recipe, or calibrates first if there is none."""
        if self.recipe is None:
            return Session(MicroMixConfig(**self.ours))
        recipe = self.recipe if isinstance(self.recipe, Recipe) else Recipe.load(self.recipe)
        config = MicroMixConfig.from_mapping({**recipe.config.to_dict(), **self.ours})
        assigned = assign(recipe, config) if config != recipe.config else recipe
        return Session(assigned.config, assigned, source=self.recipe)


def parse_options(mode: str | None, options: Mapping[str, Any] | None) -> Options:
    """Sort the options of torch.compile.

    Ours are the fields of `MicroMixConfig`, "recipe" (a Recipe or the path of one) and "mode"; the others must be
    Inductor's. With a recipe, our others solve its splits again. Raises ValueError or TypeError.
    """
    given = dict(options or {})
    mode = given.pop("mode", mode)
    recipe = given.pop("recipe", None)
    if not isinstance(recipe, Recipe | str | os.PathLike | None):
        raise TypeError(f"recipe must be a Recipe or the path of one, got {type(recipe).__name__}")
    ours = {name: given.pop(name) for name in MicroMixConfig.option_names() if name in given}
    refused = sorted((set(given) - torch_compat.inductor_options()) | (set(given) & {inductor.POST_GRAD_HOOK}))
    if refused:
        raise ValueError(
            f"unknown option {refused[0]!r}; the options of this backend are recipe, mode, "
            f"{', '.join(MicroMixConfig.option_names())}; those of Inductor pass through, but {inductor.POST_GRAD_HOOK}"
        )
    MicroMixConfig(**ours)  # refuses values
    from_mode = torch_compat.mode_options(mode) if mode and mode != "default" else {}
    path = os.fspath(recipe) if isinstance(recipe, str | os.PathLike) else recipe
    return Options(ours=ours, recipe=path, inductor={**from_mode, **given})


_model_sessions: WeakKeyDictionary[nn.Module, WeakValueDictionary[SessionKey, Session]] = WeakKeyDictionary()
_function_sessions: WeakKeyDictionary[Session, SessionKey] = WeakKeyDictionary()
"""Sessions live as long as a graph that was compiled under them, and take their packed weights with them."""


def micromix(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """The backend, as torch.compile calls it for every graph.

    With a recipe in the options the linears are quantized at once. Without one the first calls calibrate, eagerly, and
    then the model converts itself. Raises ValueError or TypeError for options, models and recipes that don't fit.
    """
    parsed = parse_options(mode, options)
    modules = torch_compat.enclosing_modules()
    session = _session_of_model(modules, parsed) if modules else _session_of_weights(example_inputs, parsed)
    if session.recipe is None and not session.is_packed:
        return compile_observed(session, gm, example_inputs, convert_by_itself=True)
    return compile_quantized(session, gm, example_inputs, parsed.inductor)


def _session_of_model(modules: Sequence[nn.Module], parsed: Options) -> Session:
    """The session of the model whose forward pass is being compiled: `modules`, innermost first, are running."""
    for module in modules:
        if parsed.key in _model_sessions.get(module, {}):
            return _model_sessions[module][parsed.key]
    model = torch_compat.original_module(modules[-1])
    session = parsed.make_session()
    session.prepare(model)
    idle = sorted(set(parsed.ours) - PACKED_OPTIONS) + ["recipe"] * (parsed.recipe is not None)
    if session.takes_no_options and idle:
        raise ValueError(f"{session.model_id} holds packed linears, on which the option {idle[0]} has no effect")
    return _model_sessions.setdefault(model, WeakValueDictionary()).setdefault(parsed.key, session)


def _session_of_weights(example_inputs: Sequence[Any], parsed: Options) -> Session:
    """The session of a function that was compiled outside any module: the one that knows its weights, or a new one."""
    weights = [value for value in example_inputs if isinstance(value, nn.Parameter)]
    for session, key in list(_function_sessions.items()):
        if key == parsed.key and any(session.knows(weight) for weight in weights):
            return session
    session = parsed.make_session()
    _function_sessions[session] = parsed.key
    return session


def compile_quantized(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Rewrite the graph's linears and compile it with Inductor; packed weights are looked up for every call."""
    gm, context = open_graph(session, gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    context.folds = None if session.config.exact else _folds
    run_passes(gm, CONVERT_PASSES, context)
    close_graph(session, context)
    appended = gm.graph.find_nodes(op="placeholder")[len(placeholders) :]
    products = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    if products:
        _check_target(session.config, input_devices(products))
    elif context.sites and not session.is_packed:
        logger.warning("no linear of this graph has a recipe (%s, ...)", session.name_of(context.sites[0].parameter))
    compiled = inductor.compile_graph(
        gm,
        [*example_inputs, *(node.meta["example_value"] for node in appended)],
        options=options,
        post_grad_passes=dumping(POST_GRAD_PASSES, context.dump, context.dump_dir),
        settings=session.config.to_dict(),
    )
    position = {node: i for i, node in enumerate(placeholders)}
    inputs = [(position[weight], index) for weight, index in context.inputs]
    weights = sorted({i for i, _ in inputs})
    place = {node: i for i, node in enumerate([*placeholders, *appended])}
    folded = [([place[node] for node in nodes], make) for nodes, make in context.folded]
    makers = {places[-1] for places, _ in folded if places[-1] < len(placeholders)}
    keys = sorted({*weights, *makers})

    def append(args: tuple[Any, ...]) -> tuple[list[LinearState], list[Any]]:
        packed = {i: session.packed(args[i]) for i in weights}
        given = [*args, *(packed[i][index] for i, index in inputs)]
        for places, make in folded:
            given += make(*[given[i] for i in places])
        return [session.state(args[i]) for i in weights], given[len(args) :]

    kept = Kept(append)

    def run(*args: Any) -> Any:
        session.check_not_training()
        states, more = kept.of([args[i] for i in keys], args)
        session.count_call(states)
        if weights and torch.is_grad_enabled():
            _say_once("micromix runs without gradients: its outputs don't require grad")
        with torch.no_grad():
            return compiled(*args, *more)

    return run


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

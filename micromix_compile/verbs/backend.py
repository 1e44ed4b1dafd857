"""torch.compile(model, backend="micromix"): from a Dynamo graph to code whose linears run in mixed MX formats."""

from __future__ import annotations

import dataclasses
import logging
import os
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from micromix_compile import ops
from micromix_compile.calibration.assignment import assign
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.gradient import wants_gradients
from micromix_compile.lowering import inductor
from micromix_compile.lowering.torch_private import recompile_limit, torch_compat
from micromix_compile.ops.prepared import Kept
from micromix_compile.passes import CONVERT_PASSES, POST_GRAD_PASSES, dumping, input_devices, run_passes
from micromix_compile.recipe.types import Recipe
from micromix_compile.session.distributed import check_not_distributed
from micromix_compile.session.heirloom import inherited_recipe, leave_heirloom
from micromix_compile.session.registry import SessionKey, find_session, model_of, remember, watched_file
from micromix_compile.session.session import LinearState, RecipeFile, Session, close_graph, open_graph
from micromix_compile.targets.target import target_of
from micromix_compile.verbs.calibrate import compile_observed

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import fx
    from torch._guards import CompileId

    from micromix_compile.lowering.torch_private.torch_compat import Region
    from micromix_compile.targets.target import Target

logger = logging.getLogger("micromix_compile")
_said: set[str] = set()

PRODUCTS = (ops.mixed_mx_mm, torch.ops.micromix.mixed_mx_mm, ops.folded_mm)

PACKED_OPTIONS = frozenset({"strict", "exact", "dump", "dump_dir", "calibration_batches", "calibration_tokens"})
"""Those of ours that a model that is packed already may get: the others ask for another one."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """What torch.compile was given, sorted: fields of `MicroMixConfig`, the recipe, Inductor's."""

    ours: Mapping[str, Any]
    recipe: Recipe | RecipeFile | None
    inductor: Mapping[str, Any]

    @property
    def key(self) -> SessionKey:
        """Equal for calls that belong to one session. What is left out may mean a default or the recipe's choice."""
        recipe = self.recipe
        source = (str(recipe.path), recipe.digest) if isinstance(recipe, RecipeFile) else recipe and id(recipe)
        return tuple(sorted(self.ours)), MicroMixConfig(**self.ours), source

    def make_session(self, inherited: Recipe | None = None) -> Session:
        """A session that quantizes by the recipe, or calibrates first if there is none.

        inherited: a recipe that was made under these options, which takes the place of calibrating.
        """
        if self.recipe is None:
            return Session(inherited.config if inherited else MicroMixConfig(**self.ours), inherited)
        recipe = Recipe.load(self.recipe.path) if isinstance(self.recipe, RecipeFile) else self.recipe
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
    if isinstance(recipe, str | os.PathLike):
        recipe = watched_file(Path(recipe).absolute())
    return Options(ours=ours, recipe=recipe, inductor={**from_mode, **given})


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
    Weights that change later are packed anew, unless the change leaves no trace: see `refresh`.
    """
    parsed = parse_options(mode, options)
    session = _session_of(gm, example_inputs, parsed)
    session.versions.add(recompile_limit.current_compile_id())
    if session.recipe is None and not session.is_packed:
        return compile_observed(session, gm, example_inputs, on_converted=partial(_leave_heirloom, key=parsed.key))
    return compile_quantized(session, gm, example_inputs, parsed.inductor)


def _session_of(gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Session:
    """The session that a graph belongs to, made if there is none yet."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {n: v for n, v in zip(placeholders, example_inputs, strict=True) if isinstance(v, nn.Parameter)}
    region = torch_compat.running_region()
    if region.compiled is None:
        reached = torch_compat.source_modules(weights)
        region = dataclasses.replace(region, compiled=reached[0] if len(reached) == 1 else None)
    session = find_session(parsed.key, list(weights.values()), region)
    if session is None:
        session = _new_session(parsed, region)
        remember(parsed.key, session)
    return session


def _new_session(parsed: Options, region: Region) -> Session:
    model = model_of(region)
    if model is None:
        return parsed.make_session()
    check_not_distributed(model, region.around)
    session = parsed.make_session(inherited_recipe(model, parsed.key))
    session.prepare(model)
    idle = sorted(set(parsed.ours) - PACKED_OPTIONS) + ["recipe"] * (parsed.recipe is not None)
    if session.takes_no_options and idle:
        raise ValueError(f"{session.model_id} holds packed linears, on which the option {idle[0]} has no effect")
    return session


def _leave_heirloom(session: Session, *, key: SessionKey) -> None:
    if session.model is not None:
        leave_heirloom(session.model, key, session)


class _PerSession:
    """Versions count towards the recompile limit beside those of their session only."""

    def check(self) -> None:
        """Refuse what Dynamo may compile nothing of: transforms of torch.func, models spread over processes."""
        region, transform = torch_compat.running_region(), torch_compat.running_transform()
        if transform is not None:
            model = "a function" if region.compiled is None else type(region.compiled).__name__
            raise ValueError(
                f"{model} would run unquantized: torch.compile compiles nothing under torch.func.{transform}; map the "
                f"model that quantize_ packs, or compile the function that calls torch.func.{transform}"
            )
        if region.compiled is not None:
            check_not_distributed(region.compiled, region.around)

    def counted(self, backend: Any) -> frozenset[CompileId] | None:
        """Those of the session of what is running; None where a function has no module to know it by."""
        region = torch_compat.running_region()
        if region.compiled is None:
            return None
        session = find_session(_options_of(backend).key, [], region)
        return frozenset() if session is None else frozenset(session.versions)

    def gave_up(self, backend: Any, function: str, limit: str) -> None:
        """Say that what runs next is not quantized, or refuse to run it."""
        region, parsed = torch_compat.running_region(), _options_of(backend)
        model = "a function" if region.compiled is None else type(region.compiled).__name__
        message = (
            f"torch.compile gave up on {model} at {limit} (in {function}): its linears run UNQUANTIZED for inputs that "
            f"no compiled version fits; compile with dynamic=True, or raise the limit"
        )
        session = find_session(parsed.key, [], region)
        if (MicroMixConfig(**parsed.ours) if session is None else session.config).strict:
            raise RuntimeError(f"strict=True: {message}")
        logger.warning(message)


def _options_of(backend: Any) -> Options:
    given = getattr(backend, "kwargs", {})
    return parse_options(given.get("mode"), given.get("options"))


recompile_limit.count_apart(micromix, _PerSession())


def compile_quantized(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any]
) -> Callable[..., Any]:
    """Rewrite the graph's linears and compile it with Inductor; packed weights are looked up for every call."""
    gm, context = open_graph(session, gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    context.target_of = cache(partial(target_of, exact=session.config.exact))
    run_passes(gm, CONVERT_PASSES, context)
    close_graph(session, context)
    appended = gm.graph.find_nodes(op="placeholder")[len(placeholders) :]
    products = [node for node in gm.graph.nodes if node.target in PRODUCTS]
    if products:
        _check_targets(session.config, map(context.target_of, input_devices(products)))
    elif context.sites and not session.is_packed:
        logger.warning("no linear of this graph has a recipe (%s, ...)", session.name_of(context.sites[0].parameter))
    gradients = session.is_packed and not context.inputs and wants_gradients(example_inputs)
    with torch.set_grad_enabled(gradients):
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

    kept = Kept(append, guarded=True)

    def run(*args: Any) -> Any:
        session.check_not_training()
        states, more = kept.of([args[i] for i in keys], args)
        session.count_call(states)
        if weights and torch.is_grad_enabled():
            _say_once("micromix runs without gradients: its outputs don't require grad")
        with torch.set_grad_enabled(gradients):
            return compiled(*args, *more)

    return run


def _check_targets(config: MicroMixConfig, targets: Iterable[Target]) -> None:
    """Log who computes, and warn where that is plain PyTorch. Raises RuntimeError instead of the latter if strict."""
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

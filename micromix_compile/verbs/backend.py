"""torch.compile(model, backend="micromix"): from a Dynamo graph to code whose linears run in mixed MX formats."""

from __future__ import annotations

import dataclasses
import logging
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import nn

from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering.torch_private import recompile_limit
from micromix_compile.lowering.torch_private.regions import (
    compiles_ahead,
    running_region,
    running_transform,
    source_modules,
)
from micromix_compile.session.distributed import check_not_distributed
from micromix_compile.session.heirloom import forget_inherited, inherited_recipe, leave_heirloom
from micromix_compile.session.registry import SessionKey, find_session, model_of, remember
from micromix_compile.verbs.ahead import check_ahead
from micromix_compile.verbs.observed import compile_self_converting
from micromix_compile.verbs.options import Options, parse_options
from micromix_compile.verbs.quantized import compile_quantized

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import fx

    from micromix_compile.lowering.torch_private.recompile_limit import CompileId
    from micromix_compile.lowering.torch_private.regions import Region
    from micromix_compile.session.session import Session

logger = logging.getLogger("micromix_compile")

PACKED_OPTIONS = frozenset(
    {"strict", "exact", "keep_expanded", "dump", "dump_dir", "calibration_batches", "calibration_tokens"}
)
"""Those of ours that a model that is packed already may get: the others ask for another one."""


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
    if compiles_ahead():
        check_ahead(session)
    else:
        session.versions.add(recompile_limit.current_compile_id())
    if session.recipe is None and not session.is_packed:
        leave = partial(_leave_heirloom, key=parsed.key)
        return compile_self_converting(session, gm, example_inputs, on_converted=leave)
    return compile_quantized(session, gm, example_inputs, parsed.inductor)


def _session_of(gm: fx.GraphModule, example_inputs: Sequence[Any], parsed: Options) -> Session:
    """The session that a graph belongs to, made if there is none yet."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    weights = {n: v for n, v in zip(placeholders, example_inputs, strict=True) if isinstance(v, nn.Parameter)}
    region = running_region()
    if region.compiled is None:
        reached = source_modules(weights)
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
    forget_inherited(model, parsed.key)
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
        region, transform = running_region(), running_transform()
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
        region = running_region()
        if region.compiled is None:
            return None
        session = find_session(_options_of(backend).key, [], region)
        return frozenset() if session is None else frozenset(session.versions)

    def gave_up(self, backend: Any, function: str, limit: str) -> None:
        """Say that what runs next is not quantized, or refuse to run it."""
        region, parsed = running_region(), _options_of(backend)
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

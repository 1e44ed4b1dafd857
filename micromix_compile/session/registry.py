"""Which session a graph belongs to: what was compiled, under which options, by which recipe.

A session is found by the module that torch.compile was given, or by the weights that a function without one reads; the
call stack beyond that module only names layers that were compiled one by one. Sessions live as long as a graph that was
compiled under them, and take their packed weights with them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering.torch_private.regions import original_module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import nn

    from micromix_compile.lowering.torch_private.regions import Region
    from micromix_compile.recipe.types import Recipe
    from micromix_compile.session.session import Session

SessionKey = tuple[tuple[str, ...], MicroMixConfig, object]

_sessions: dict[SessionKey, WeakSet[Session]] = {}


def sessions(key: SessionKey | None = None) -> Iterator[Session]:
    """Those that are alive, of one key or of all."""
    for one in list(_sessions) if key is None else [key]:
        yield from list(_sessions.get(one, ()))


def find_session(key: SessionKey, weights: Sequence[nn.Parameter], region: Region) -> Session | None:
    """The session under `key` of the module that a region compiles, of the model it is a layer of, or of another module
    that holds it; for a function without a module the one that knows a weight of the graph.

    Weights alone say nothing of a module: several models may share them.
    """
    known, compiled = list(sessions(key)), region.compiled
    if compiled is None:
        return next((session for session in known if any(map(session.knows, weights))), None)
    own = next((session for session in known if session.is_model(compiled)), None)
    if own is not None or not known:
        return own
    holding = [session for session in known if session.holds(compiled)]
    for module in (model_of(region), *region.around):
        for session in holding:
            if module is not None and session.is_model(module):
                return session
    return next(iter(holding), None)


def remember(key: SessionKey, session: Session) -> None:
    """Let graphs to come find `session`."""
    for stale in [one for one, alive in _sessions.items() if not alive]:
        del _sessions[stale]
    _sessions.setdefault(key, WeakSet()).add(session)


def model_of(region: Region) -> nn.Module | None:
    """The model that a region belongs to: what was compiled or, if that is one of several equal layers, what they are
    layers of, the outermost module around them that is not in training mode. None for a function without a module.
    """
    compiled = region.compiled
    if compiled is None:
        return None
    return next((m for m in reversed(region.around) if not m.training and _is_layer_of(compiled, m)), compiled)


def _is_layer_of(layer: nn.Module, model: nn.Module) -> bool:
    """Whether `model` holds `layer` in a list, or the like, with others of its type."""
    for container in model.modules():
        children = [original_module(child) for child in container.children()]
        if any(child is layer for child in children) and sum(type(child) is type(layer) for child in children) > 1:
            return True
    return False


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe by which torch.compile runs `model`, also where it has calibrated and converted itself.

    Raises ValueError if no graph of `model` was quantized yet, or if several recipes are in use.
    """
    original = original_module(model)
    found = {id(s.recipe): s.recipe for s in sessions() if s.is_model(original) and s.recipe is not None}
    if len(found) != 1:
        state = "has no quantized graph yet: call it first" if not found else f"runs by {len(found)} recipes"
        raise ValueError(f"{type(original).__name__} {state}; recipe_of wants a model that runs by one recipe")
    return next(iter(found.values()))

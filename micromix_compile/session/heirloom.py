"""What a model that converted itself hands on: its recipe to its deep copies, a word to those who save it."""

from __future__ import annotations

import logging
from collections import OrderedDict
from typing import TYPE_CHECKING, Any, Final
from weakref import ref

from micromix_compile.linear.replacing import OnlySpeaks
from micromix_compile.session.distributed import is_packed
from micromix_compile.session.matching import match_linears, model_id, parameter_names

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import nn

    from micromix_compile.recipe.types import Recipe
    from micromix_compile.session.session import Session

logger = logging.getLogger("micromix_compile")

ATTRIBUTE: Final = "_micromix_heirloom"


class Heirloom:
    """On a model: the sessions that converted it. On its deep copy: their recipes, until the copy is compiled."""

    def __init__(self) -> None:
        self._converted: dict[Hashable, ref[Session]] = {}
        self._inherited: dict[Hashable, Recipe] = {}

    def add(self, key: Hashable, session: Session) -> None:
        """Note that the model runs by the recipe of `session`."""
        self._converted[key] = ref(session)

    def inherited(self, key: Hashable) -> Recipe | None:
        """The recipe that the original ran by when it was copied."""
        return self._inherited.get(key)

    def forget(self, key: Hashable) -> None:
        """Let go of that recipe: a session keeps it now, or the weights are others."""
        self._inherited.pop(key, None)

    def __deepcopy__(self, memo: dict[int, Any]) -> Heirloom:
        copy = Heirloom()
        alive = {key: session() for key, session in self._converted.items()}
        copy._inherited = self._inherited | {
            key: session.recipe for key, session in alive.items() if session is not None and session.recipe is not None
        }
        return copy

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A saved model does not take this with it, but something that `torch.load` may read with weights only."""
        return OrderedDict, ()


def leave_heirloom(model: nn.Module, key: Hashable, session: Session) -> None:
    """Called when `session` has converted `model`."""
    heirloom = vars(model).get(ATTRIBUTE)
    if not isinstance(heirloom, Heirloom):
        heirloom = vars(model)[ATTRIBUTE] = Heirloom()
        model.register_state_dict_pre_hook(_SavesPlainWeights())
    heirloom.add(key, session)


def inherited_recipe(model: nn.Module, key: Hashable) -> Recipe | None:
    """The recipe that `model`, a copy of one that converted itself under the same options, is to run by.

    None, and the log says why, if its weights are others by now.
    """
    heirloom = vars(model).get(ATTRIBUTE)
    recipe = heirloom.inherited(key) if isinstance(heirloom, Heirloom) else None
    if recipe is None or is_packed(model):
        return recipe
    try:
        match_linears(recipe, parameter_names(model), model_id=model_id(model))
    except ValueError as error:
        logger.warning("%s, a copy of a model that converted itself, calibrates anew: %s", model_id(model), error)
        return None
    return recipe


def forget_inherited(model: nn.Module, key: Hashable) -> None:
    """Called when a session of `model` has taken over the recipe, or does without."""
    heirloom = vars(model).get(ATTRIBUTE)
    if isinstance(heirloom, Heirloom):
        heirloom.forget(key)


class _SavesPlainWeights(OnlySpeaks):
    """Says once, when a converted model's state is asked for, that it holds the model's own weights."""

    def __init__(self) -> None:
        self._said = False

    def __call__(self, model: nn.Module, prefix: str, keep_vars: bool) -> None:
        if not self._said and not is_packed(model):
            self._said = True
            logger.warning(
                "the state of %s holds its own weights, not the packed ones by which torch.compile runs it; "
                "micromix.quantize_(model, micromix.recipe_of(model)) packs them for saving",
                type(model).__name__,
            )

    def __reduce__(self) -> tuple[type, tuple[slice]]:
        """A saved model gets `slice` for this hook, which takes three arguments, too, and does nothing."""
        return type, (slice(None),)

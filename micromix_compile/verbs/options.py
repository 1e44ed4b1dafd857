"""The options of torch.compile, sorted: ours, the recipe, Inductor's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from micromix_compile.calibration.assignment import assign
from micromix_compile.config import MicroMixConfig
from micromix_compile.lowering import inductor
from micromix_compile.lowering.torch_private.inductor import inductor_options, mode_options
from micromix_compile.recipe.types import Recipe
from micromix_compile.recipe.watched import RecipeFile, watched_file
from micromix_compile.session.session import Session

if TYPE_CHECKING:
    from micromix_compile.session.registry import SessionKey


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
    if not isinstance(options, Mapping | None):
        raise TypeError(f'options must be a mapping, such as {{"recipe": recipe}}, got {type(options).__name__}')
    given = dict(options or {})
    mode = given.pop("mode", mode)
    recipe = given.pop("recipe", None)
    if not isinstance(recipe, Recipe | str | os.PathLike | None):
        raise TypeError(f"recipe must be a Recipe or the path of one, got {type(recipe).__name__}")
    ours = {name: given.pop(name) for name in MicroMixConfig.option_names() if name in given}
    refused = sorted((set(given) - inductor_options()) | (set(given) & {inductor.POST_GRAD_HOOK}))
    if refused:
        raise ValueError(
            f"unknown option {refused[0]!r}; the options of this backend are recipe, mode, "
            f"{', '.join(MicroMixConfig.option_names())}; those of Inductor pass through, but {inductor.POST_GRAD_HOOK}"
        )
    MicroMixConfig(**ours)  # refuses values
    from_mode = mode_options(mode) if mode and mode != "default" else {}
    if isinstance(recipe, str | os.PathLike):
        recipe = watched_file(Path(recipe).absolute())
    return Options(ours=ours, recipe=recipe, inductor={**from_mode, **given})

"""From what was observed to recipes: groups of linears, orders, splits, rounded weights."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from typing import TYPE_CHECKING, Final

from micromix_compile.calibration.assignment import assign, channel_order, decided, without
from micromix_compile.calibration.experts import expert_name
from micromix_compile.calibration.memory import ROUNDING, naming_out_of_memory
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import round_experts, round_weights
from micromix_compile.progress import track
from micromix_compile.recipe.fingerprint import Checksums, weight_sample
from micromix_compile.recipe.types import FEW_TOKENS, GroupRecipe, LinearRecipe, Recipe
from micromix_compile.session.candidates import first_of, left_alone
from micromix_compile.session.matching import all_parameter_names, named_modules
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from micromix_compile.calibration.observer import ChannelObserver
    from micromix_compile.numerics.layout import PackedWeight
    from micromix_compile.session.names import Names
    from micromix_compile.session.observing import Observation
    from micromix_compile.session.state import LinearState
    from micromix_compile.targets.target import Target

logger = logging.getLogger("micromix_compile")

UNDECIDED: Final = MicroMixConfig(policy="mxfp8", uniform_order="model", activations="same", rotate="none")
"""The config of a recipe that is observed and not yet split: a policy that needs no statistics."""

Groups = dict["ChannelObserver", list["LinearState"]]
"""The linears that read one activation, by who observed it."""


def recipes(names: Names, observation: Observation, *, progress: bool) -> Iterator[Recipe]:
    """What was observed, decided for each config in turn.

    Raises ValueError if no linear was reached, or if one escaped and a config is strict.
    """
    groups = _groups(names)
    observed = _observed(names, groups, with_checksums=observation.rounds_weights)
    _say_escaped(names, observed, observation.configs)
    target = _target(groups)
    for left, config in zip(reversed(range(len(observation.configs))), observation.configs, strict=True):
        wanted = _wanted(names, observed, config)
        recipe = assign(wanted, decided(observation.feasible(config), target.activations))
        if config.activations == "auto":
            _say_activations(recipe, target)
        _say_starved(recipe)
        if config.rounds_weights:
            with naming_out_of_memory(*ROUNDING), _whole_or_forgotten(observation):
                packed = _round(recipe, _of_recipe(recipe, groups), keep_moments=left > 0, progress=progress)
            recipe = dataclasses.replace(recipe, packed=packed)
        yield recipe
        if left:
            observed = _known_anew(observed, groups)


@contextlib.contextmanager
def _whole_or_forgotten(observation: Observation) -> Iterator[None]:
    """Where rounding fails half-way, moments are gone that another attempt would need: calibration starts again."""
    try:
        yield
    except BaseException:
        observation.release()
        raise


def _target(groups: Groups) -> Target:
    """Of the first weight."""
    first = next(matrix for members in groups.values() for matrix in _matrices(members).values())
    return target_of(first.device)


def _say_activations(recipe: Recipe, target: Target) -> None:
    chosen = recipe.config.activations
    if chosen == target.activations:
        speed = "faster" if chosen == "same" else "no faster"
        reason = f"{target.name} multiplies MXFP4 {speed} than FP8"
    else:
        reason = f"the policy {recipe.config.policy!r} rounds them as weights are"
    logger.info("activations of %s: %s, because %s", recipe.model_id, chosen, reason)


def _groups(names: Names) -> Groups:
    groups: Groups = {}
    for state in names:
        if state.observer is not None and state.was_observed and state.parameter() is not None:
            groups.setdefault(state.observer, []).append(state)
    return groups


def _of_recipe(recipe: Recipe, groups: Groups) -> Groups:
    """Those of its linears."""
    kept = {one: [state for state in members if state.name in recipe.linears] for one, members in groups.items()}
    return {observer: members for observer, members in kept.items() if members}


def _observed(names: Names, groups: Groups, *, with_checksums: bool) -> Recipe:
    """All that was observed as a recipe that decides nothing yet."""
    linears = _linears(names, groups, with_checksums=with_checksums)
    refused = _refused(names, linears)
    if not linears:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
        raise ValueError(f"calibration of {names.model_id} reached no linear layer ({reasons or 'it has none'})")
    return Recipe(
        config=dataclasses.replace(UNDECIDED, convolutions=names.convolutions),
        model_id=names.model_id,
        linears=linears,
        refused=refused,
        left_alone=_left_alone(names, linears),
    )


def _wanted(names: Names, observed: Recipe, config: MicroMixConfig) -> Recipe:
    """What was observed without the linears that this config skips, and others don't."""
    skips = {state.name: config.why_skipped(state.names) for state in names if state.name in observed.linears}
    wanted = without(observed, {name: why for name, why in skips.items() if why is not None})
    return dataclasses.replace(wanted, left_alone=_left_alone(names, wanted.linears))


def _linears(names: Names, groups: Groups, *, with_checksums: bool) -> dict[str, LinearRecipe]:
    """By name, in the model's order."""
    made: dict[str, LinearRecipe] = {}
    for observer, members in groups.items():
        group = _group_recipe(observer, members)
        made |= {state.name: _linear_recipe(state, group, with_checksums=with_checksums) for state in members}
    return {state.name: made[state.name] for state in names if state.name in made}


def _group_recipe(observer: ChannelObserver, members: Sequence[LinearState]) -> GroupRecipe:
    """One group, its order and split still open."""
    probe = observer.probe
    costs = None if probe is None else probe.costs(_each_matrix(members), observer.order())
    statistics = observer.statistics(costs)
    perm = channel_order(statistics, UNDECIDED)
    return GroupRecipe(name=observer.name, channel_perm=perm, split=(0, 0, perm.numel()), statistics=statistics)


def _linear_recipe(state: LinearState, group: GroupRecipe, *, with_checksums: bool) -> LinearRecipe:
    weight, matrix = state.weight(), state.matrix()
    assert weight is not None, "dead weights are in no group"
    assert matrix is not None, "it is the living weight's"
    return LinearRecipe(
        fqn=state.name,
        in_features=matrix.shape[-1],
        out_features=matrix.shape[-2],
        group=group,
        weight_sample=weight_sample(weight),
        weight_checksums=Checksums.of(matrix.flatten(0, -2)) if with_checksums else None,
        expert_tokens=None if state.experts is None else tuple(state.experts.tokens),
        runs=1.0 if state.experts is None else state.experts.runs,
    )


def _known_anew(observed: Recipe, groups: Groups) -> Recipe:
    """The same of the weights as they are now: whoever got a recipe may have changed them before asking for another."""
    linears = dict(observed.linears)
    for state in (state for members in groups.values() for state in members):
        if state.parameter() is not None:
            known = linears[state.name]
            with_checksums = known.weight_checksums is not None
            linears[state.name] = _linear_recipe(state, known.group, with_checksums=with_checksums)
    return dataclasses.replace(observed, linears=linears)


def _refused(names: Names, linears: Mapping[str, LinearRecipe]) -> dict[str, str]:
    """Name -> why it is no linear of the recipe. What is between parts that are linears goes by a name like theirs."""
    left = [s for s in names if s.name not in linears and (s.looks_linear or s.may_be_experts)]
    own = {name: names.why_not(state) for state in left for name in state.uncut_names()}
    return {**{name: reason for name, reason in names.refusals.items() if name not in linears}, **own}


def _left_alone(names: Names, linears: Mapping[str, LinearRecipe]) -> tuple[int, int] | None:
    model = names.model
    return None if model is None else left_alone(all_parameter_names(model), named_modules(model), linears)


def _round(recipe: Recipe, groups: Groups, *, keep_moments: bool, progress: bool) -> dict[str, PackedWeight]:
    """Round all weights, group by group; frees the second moments on the way unless they are still needed."""
    packed: dict[str, PackedWeight] = {}
    decided = recipe.groups
    for observer, members in track(groups.items(), "rounding weights", show=progress):
        rounding, group = recipe.config.weight_rounding, decided[observer.name]
        plain = _matrices([state for state in members if state.experts is None])
        packed |= round_weights(plain, group, observer.moment_for(rounding), recipe.config) if plain else {}
        for state, experts in ((state, state.experts) for state in members if state.experts is not None):
            starved = recipe.linears[state.name].starved
            weight = _matrices([state])[state.name]
            moments = experts.moments_for(rounding, state.name)
            packed[state.name] = round_experts(weight, group, moments, starved, recipe.config)
            if not keep_moments:
                experts.forget_moments()
        if not keep_moments:
            observer.forget_moments()
    return packed


def _say_escaped(names: Names, recipe: Recipe, configs: Sequence[MicroMixConfig]) -> None:
    """Name what looks like a linear and stays though nobody asked for it. ValueError instead if one is strict."""
    wished = {name for state in names if state.refusal for name in state.names}
    bare = {name: name.partition(" (")[0] for name in recipe.refused}
    wished |= {name for name in bare.values() if all(config.why_skipped([name]) for config in configs)}
    escaped = {name: why for name, why in recipe.refused.items() if bare[name] not in wished}
    if not escaped:
        return
    listed = [f"{name}: {why}" for name, why in escaped.items()]
    message = f"{len(escaped)} weights of {names.model_id} stay unquantized ({first_of(listed)})"
    if any(config.strict for config in configs):
        raise ValueError(f"strict=True: {message}; name them in skip if that is meant")
    logger.warning(message)


def _say_starved(recipe: Recipe) -> None:
    """Name the experts whose weights are rounded to nearest, for too few tokens reached them."""
    for name, starved in recipe.starved.items():
        logger.warning(
            "%d of %d experts of %s saw fewer than %d calibration tokens and are rounded to nearest: %s; take more or "
            "other batches",
            len(starved),
            recipe.linears[name].experts,
            name,
            FEW_TOKENS,
            ", ".join(map(str, starved)),
        )


def _matrices(members: Sequence[LinearState]) -> dict[str, Tensor]:
    """(N, C), or (E, N, C) of experts, by name, of the weights that are still alive."""
    return {state.name: matrix for state in members if (matrix := state.matrix()) is not None}


def _each_matrix(members: Sequence[LinearState]) -> dict[str, Tensor]:
    """(N, C) by name, and by expert."""
    each: dict[str, Tensor] = {}
    for name, matrix in _matrices(members).items():
        experts = {expert_name(name, expert): one for expert, one in enumerate(matrix)}
        each |= {name: matrix} if matrix.dim() == 2 else experts
    return each

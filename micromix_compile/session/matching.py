"""Which weight of a model is which linear of a recipe."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING

from micromix_compile.calibration.assignment import without
from micromix_compile.passes.pre_grad.find_linears import why_no_plain_weight
from micromix_compile.recipe.fingerprint import same_sample, weight_sample
from micromix_compile.recipe.parts import as_matrix, split_name
from micromix_compile.session.candidates import ON_REQUEST, why_never_linear

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor, nn

    from micromix_compile.recipe.parts import Part
    from micromix_compile.recipe.types import LinearRecipe, Recipe


def parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """Module names by Parameter identity, for every weight of a linear, a convolution of kernel size 1 or experts.

    A tied weight has several names. Those of experts have three dimensions.
    """
    named = all_parameter_names(model).items()
    return {parameter: names for parameter, names in named if as_matrix(parameter.detach()).dim() in (2, 3)}


def all_parameter_names(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """The same for every Parameter."""
    names: dict[nn.Parameter, list[str]] = {}  # tensors hash and compare by identity here
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(_clean(name).removesuffix(".weight"))
    return names


def named_modules(model: nn.Module) -> dict[str, nn.Module]:
    """All modules by the names that `parameter_names` uses: torch.compile's wrappers are looked through."""
    return {_clean(name): module for name, module in model.named_modules(remove_duplicate=False)}


def _clean(name: str) -> str:
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def model_id(model: nn.Module) -> str:
    """What a recipe calls a model: its class, and the name that its weights came under, no path, if that is known."""
    origin = Path(getattr(getattr(model, "config", None), "name_or_path", None) or "").name
    return f"{type(model).__name__}({origin})" if origin else type(model).__name__


def without_unwanted(recipe: Recipe, model: nn.Module) -> Recipe:
    """The recipe without what its config leaves out of `model`: a tied weight of which `skip` has another name, and
    convolutions that are not asked for. Raises ValueError if nothing is left.
    """
    modules, unwanted = named_modules(model), {}
    alike: dict[str, list[str]] = {}
    for fqn in recipe.linears:
        alike.setdefault(_last(split_name(fqn)[0]), []).append(fqn)
    for parameter, names in all_parameter_names(model).items():
        never, _ = why_never_linear(parameter, names, modules, convolutions=recipe.config.convolutions)
        for fqn in {fqn: None for name in names for fqn in alike.get(_last(name), ())}:
            whole, part = split_name(fqn)
            skipped = recipe.config.why_skipped([f"{name}{part or ''}" for name in names])
            why = skipped or (ON_REQUEST if never == ON_REQUEST else None)
            if why is not None and (whole in names or _is_tail_of(recipe.linears[fqn], parameter, names)):
                unwanted[fqn] = why
    return without(recipe, unwanted)


def _last(name: str) -> str:
    return name.rpartition(".")[2]


def _is_tail_of(linear: LinearRecipe, parameter: nn.Parameter, names: Sequence[str]) -> bool:
    """Whether a weight is the linear's, or what that is cut from, though one's name is but the tail of the other's."""
    whole, part = split_name(linear.fqn)
    if not _is_one_of(whole, names) or parameter.is_meta or why_no_plain_weight(parameter):
        return False
    if part is not None and not part.fits(parameter):
        return False
    weight = as_matrix(parameter.detach()) if part is None else part.of(parameter.detach())
    return weight.numel() > 0 and _same_weight(linear, weight, weight_sample(weight))


def _is_one_of(name: str, names: Sequence[str]) -> bool:
    """Whether a dotted name is one of these, or one is the tail of the other."""
    return any(f".{own}".endswith(f".{name}") or f".{name}".endswith(f".{own}") for own in names)


def match_linears(
    recipe: Recipe, names: Mapping[nn.Parameter, Sequence[str]], *, model_id: str
) -> list[tuple[Sequence[str], LinearRecipe]]:
    """The names that the recipe's linears have among the named weights, recognized by name and a sample of values.

    A name may be the tail of the other (a layer compiled alone, a model inside a wrapper). Raises ValueError naming
    both models if a name fits but the weight doesn't, or if a linear of the recipe is nowhere.
    """
    matched: list[tuple[Sequence[str], LinearRecipe]] = []
    for parameter, own in names.items():
        linear = find_linear(recipe, as_matrix(parameter), own, model_id=model_id)
        if linear is not None:
            matched.append((own, linear))
    for parameter, part, linear in match_parts(recipe, names, model_id=model_id):
        matched.append(([f"{name}{part}" for name in names[parameter]], linear))
    found = {linear.fqn for _, linear in matched}
    missing = [fqn for fqn in recipe.linears if fqn not in found]
    if missing:
        raise ValueError(
            f"the recipe was made for {recipe.model_id}, and this model is {model_id}: it has no {missing[0]}"
        )
    return matched


def match_parts(
    recipe: Recipe, names: Mapping[nn.Parameter, Sequence[str]], *, model_id: str
) -> list[tuple[nn.Parameter, Part, LinearRecipe]]:
    """The recipe's linears that are parts of the named weights. Raises ValueError as `find_linear` does."""
    matched = []
    for whole, part in map(split_name, recipe.linears):
        for parameter, own in names.items() if part is not None else ():
            if part is None or not _is_one_of(whole, own) or not part.fits(parameter):
                continue
            weight, called = part.of(parameter.detach()), [f"{name}{part}" for name in own]
            linear = find_linear(recipe, weight, called, model_id=model_id)
            if linear is not None:
                matched.append((parameter, part, linear))
    return matched


def find_linear(recipe: Recipe, parameter: Tensor, names: Sequence[str], *, model_id: str) -> LinearRecipe | None:
    """The recipe's linear for one weight, None if it has none.

    Raises ValueError if the weight is another model's, or if it can't be told from others of the recipe.
    """
    for name in names:
        linear = recipe.linears.get(name)
        if linear is not None:
            if parameter.is_meta:
                raise ValueError(f"{name} of {model_id} is on the meta device, which holds no values: load it first")
            check_same_weight(recipe, linear, parameter, model_id)
            return linear
    tails = {
        fqn: max(_common_tail(fqn, name) for name in names)
        for fqn in recipe.linears
        if any(fqn.endswith(f".{name}") or name.endswith(f".{fqn}") for name in names)
    }
    sample = weight_sample(parameter) if tails else None
    fitting = [fqn for fqn in tails if sample is not None and _same_weight(recipe.linears[fqn], parameter, sample)]
    nearest = [fqn for fqn in fitting if tails[fqn] == max(tails[other] for other in fitting)]
    if len(nearest) > 1:
        raise ValueError(
            f"{names[-1]} of {model_id} fits several linears of the recipe ({', '.join(nearest)}), whose weights are "
            f"equal: compile the module that holds it under its full name"
        )
    return recipe.linears[nearest[0]] if nearest else None


def _common_tail(fqn: str, name: str) -> int:
    """How many parts of two dotted names are equal, from their ends."""
    pairs = zip(reversed(fqn.split(".")), reversed(name.split(".")), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _same_weight(linear: LinearRecipe, parameter: Tensor, sample: Tensor) -> bool:
    return fits(linear, parameter) and same_sample(linear.weight_sample, sample)


def fits(linear: LinearRecipe, parameter: Tensor) -> bool:
    """Whether the weight has the shape of the recipe's, or of its transpose, or of those of all experts."""
    leading = linear.shape[:-2]
    return parameter.shape[:-2] == leading and sorted(parameter.shape[-2:]) == sorted(linear.shape[-2:])


def check_same_weight(recipe: Recipe, linear: LinearRecipe, parameter: Tensor, model_id: str) -> None:
    """Raise ValueError, which names both models, unless the weight is the one that the linear was calibrated with."""
    both = f"the recipe was made for {recipe.model_id}, and this model is {model_id}"
    if special := why_no_plain_weight(parameter):
        raise ValueError(f"{linear.fqn} can't be quantized: {special}")
    if not fits(linear, parameter):
        raise ValueError(f"{both}: {linear.fqn} is {linear.shape} there and {tuple(parameter.shape)} here")
    if not same_sample(linear.weight_sample, weight_sample(parameter)):
        raise ValueError(f"{both}: {linear.fqn} has other weights here; if they were replaced, calibrate again")

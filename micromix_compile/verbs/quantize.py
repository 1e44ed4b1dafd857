"""`quantize_`: a model whose linears are packed."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn

from micromix_compile.integrations.checkpoint import QUANT_METHOD, SCHEMA_VERSION
from micromix_compile.linear.attention import IN_PROJ, OUT_PROJ, MicroMixAttention
from micromix_compile.linear.convolution import POINTWISE, packed_class, why_not_pointwise
from micromix_compile.linear.experts import MicroMixExperts, weight_names
from micromix_compile.linear.packed import ChannelOrder, MicroMixLinear
from micromix_compile.linear.replacing import (
    is_linear_module,
    leave_fast_paths,
    replace,
    take_over,
    why_not_replaced,
)
from micromix_compile.lowering.torch_private.regions import original_module
from micromix_compile.ops.pack import packed_weight
from micromix_compile.recipe.parts import as_matrix, split_name
from micromix_compile.recipe.types import check_recipe
from micromix_compile.session.candidates import EMBEDDINGS, how_to_leave_training
from micromix_compile.session.distributed import check_not_distributed, is_packed
from micromix_compile.session.matching import match_linears, model_id, named_modules, parameter_names, without_unwanted
from micromix_compile.verbs.quantize_attention import (
    is_of_attention,
    packed_attention,
    packed_linear,
    why_not_in_attention,
)
from micromix_compile.verbs.quantize_experts import packed_experts, why_not_in_experts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import PackedWeight
    from micromix_compile.recipe.types import LinearRecipe, Recipe

logger = logging.getLogger("micromix_compile")

ONE_FOR_ALL: Final = ("fp6", "weights", "activations", "scale_rounding")
"""Options of a packed checkpoint that tell how all of its linears are read and run."""


@torch.inference_mode(False)  # whose tensors backward could not read, nor load_state_dict change
def quantize_(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the recipe's linears by packed ones in place; the original weights are freed. Returns `model`.

    A linear becomes a `MicroMixLinear`, a convolution of kernel size 1 a `MicroMixConvolution`; the experts of a layer
    that transformers keeps in one module a `MicroMixExperts`, and an nn.MultiheadAttention a `MicroMixAttention`, if
    the recipe has both their weights.

    Weights that something else still uses (tied embeddings) stay alive through that user. Hooks of a replaced linear
    move to the packed one. A linear that would lose something stays as it is: one with an overridden forward, a
    parametrization, a class of its own or more than a weight and a bias. The log says so, and `model.micromix_refused`,
    a dict of names and reasons, lists them. A Hugging Face model can be saved with save_pretrained afterwards.

    Raises ValueError if the recipe was made for another model, naming both, if its config leaves all of its linears
    out, if one is packed already, if others are with which it can't be in one checkpoint, or if one has to stay and the
    config is strict; TypeError for what is no model or no recipe. The model is as it was then: nothing is replaced
    before everything is packed, for which there must be memory.
    """
    check_recipe(recipe)
    wrapped: nn.Module = model
    model = original_module(wrapped)
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: {how_to_leave_training(model)}")
    check_not_distributed(model)
    modules = named_modules(model)
    check_not_packed(recipe, modules, model_id(model))
    before = described_before(model, recipe.config)
    recipe = without_unwanted(recipe, model)
    matched = match_linears(recipe, parameter_names(model), model_id=model_id(model))
    places, refused = places_of(matched, modules)
    say_refused(refused, strict=recipe.config.strict)
    experts = {name: linear for name, linear in places.items() if linear.experts is not None}
    attention = {name: linear for name, linear in places.items() if is_of_attention(name, modules)}
    linears = {name: linear for name, linear in places.items() if name not in {*experts, *attention}}
    packed = packed_experts(experts, modules, recipe) | packed_attention(attention, modules, recipe)
    replace(modules, {**_packed_modules(linears, modules, recipe), **packed})
    described = {name: description(linear) for name, linear in places.items()}
    share_orders(model, {name: linear.group.name for name, linear in places.items()})
    describe(model, recipe.config, before | described)
    model.micromix_refused = refused  # type: ignore[assignment]
    logger.info("quantized %d linears: %s", len(described), recipe.bits_text)
    return wrapped


def check_not_packed(recipe: Recipe, modules: Mapping[str, nn.Module], model: str) -> None:
    """Raise ValueError if a linear of the recipe is packed already."""
    for fqn in recipe.linears:
        for module in (modules.get(fqn), modules.get(fqn.rpartition(".")[0])):
            if isinstance(module, MicroMixLinear | MicroMixExperts | MicroMixAttention):
                raise ValueError(f"{model} is packed already: {fqn} is a {type(module).__name__}")


def places_of(
    matched: Sequence[tuple[Sequence[str], LinearRecipe]], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, LinearRecipe], dict[str, str]]:
    """By name: the linears to replace, and why others stay. An embedding that is tied to a linear stays as a matter
    of course."""
    places: dict[str, LinearRecipe] = {}
    refused: dict[str, str] = {}
    for names, linear in matched:
        for name in names:
            reason = _why_not(name, linear, modules)
            if reason is None:
                places[name] = linear
            elif not isinstance(modules.get(name), EMBEDDINGS):
                refused[name] = reason
    for name, linear in places.items():
        holder = name.rpartition(".")[0]
        kind, together = "experts", weight_names(modules[holder]) if linear.experts is not None else ()
        if isinstance(modules[holder], nn.MultiheadAttention):
            kind, together = "attention", (IN_PROJ, OUT_PROJ)
        others = [other for other in together if f"{holder}.{other}".lstrip(".") not in places]
        if others:
            refused[name] = f"{others[0]}, the other weight of the same {kind}, stays as it is"
    return {name: linear for name, linear in places.items() if name not in refused}, refused


def _why_not(name: str, linear: LinearRecipe, modules: Mapping[str, nn.Module]) -> str | None:
    """Why what `name` names, a module or a Parameter, can't be replaced, or None if it can."""
    whole, part = split_name(name)
    if part is not None and name not in modules:
        return f"it is a part of {whole}, and no module of its own: a model that is compiled with the recipe has it"
    if linear.experts is not None:
        return why_not_in_experts(name, modules)
    if isinstance(modules.get(name.rpartition(".")[0]), nn.MultiheadAttention):
        return why_not_in_attention(name, modules)
    return why_not_replaced(name, modules, takes=lambda one: is_linear_module(one) or why_not_pointwise(one) is None)


def say_refused(refused: Mapping[str, str], *, strict: bool) -> None:
    """Raise ValueError if `strict`, and something is refused."""
    if refused and strict:
        raise ValueError(f"strict=True: {'; '.join(f'{name} stays as it is: {why}' for name, why in refused.items())}")
    for name, reason in refused.items():
        logger.warning("%s stays as it is: %s", name, reason)


def _packed_modules(
    places: Mapping[str, LinearRecipe], modules: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, nn.Module]:
    """The packed linear for each name. Modules keep apart, as their biases do; a tied weight is packed once."""
    made: dict[nn.Module, MicroMixLinear] = {}
    packed: dict[tuple[int, bool], PackedWeight] = {}
    with torch.no_grad():
        for name, linear in places.items():
            module = modules[name]
            weight = module.weight
            assert isinstance(weight, nn.Parameter), "a linear module has a weight"
            matrix, as_it_is = as_matrix(weight.detach()), isinstance(module, (nn.Linear, *POINTWISE))
            key = id(weight), as_it_is
            if key not in packed:
                packed[key] = packed_weight(matrix if as_it_is else matrix.T, linear, recipe)
            if module not in made:
                made[module] = packed_linear(
                    weight, module.bias, packed[key], linear, recipe.config, packed_class(module)
                )
                take_over(made[module], module)
    return {name: made[modules[name]] for name in places}


def description(linear: LinearRecipe) -> dict[str, Any]:
    """What a packed checkpoint says of a linear."""
    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    shape |= {} if linear.experts is None else {"experts": linear.experts}
    layout: dict[str, Any] = {"split": list(linear.split), "rotated": linear.group.rotated}
    if linear.group.shards:
        layout["shards"] = [list(split) for split in linear.group.shards]
    return {**shape, **layout, "group": linear.group.name}


def share_orders(model: nn.Module, groups: Mapping[str, str]) -> None:
    """Let the packed linears of a group, name -> group, hold one order: sharing is how one quantize serves them all.

    Also has fused paths of torch.nn around them left.
    """
    leave_fast_paths(model, MicroMixLinear)
    first: dict[str, ChannelOrder] = {}
    for name, group in groups.items():
        holder, attribute = order_of(model, name)
        setattr(holder, attribute, first.setdefault(group, getattr(holder, attribute)))


def order_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Where the order of a packed linear, or of a packed weight of experts, is: (module, attribute)."""
    parent, _, child = name.rpartition(".")
    holder = model.get_submodule(parent)
    if isinstance(holder, MicroMixExperts):
        return holder, f"{child}_order"
    if isinstance(holder, MicroMixAttention) and child == IN_PROJ:
        return holder.in_proj, "order"
    module = model.get_submodule(name)
    assert isinstance(module, MicroMixLinear), f"{name} is packed"
    return module, "order"


def described_before(model: nn.Module, config: MicroMixConfig) -> dict[str, dict[str, Any]]:
    """What an earlier call left in a Hugging Face model's config of linears that are packed.

    Raises ValueError if a loader could not read these and more under `config` from one checkpoint.
    """
    quantization = getattr(getattr(model, "config", None), "quantization_config", None)
    if quantization is None or not is_packed(model):
        return {}
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    ours = config.to_file()
    for name in ONE_FOR_ALL:
        if ours[name] != fields["config"][name]:
            raise ValueError(
                f"{model_id(model)} holds linears packed with {name}={fields['config'][name]!r}, and one checkpoint "
                f"has one for all: got a recipe with {ours[name]!r}"
            )
    return dict(fields["linears"])


def describe(model: nn.Module, config: MicroMixConfig, linears: dict[str, dict[str, Any]]) -> None:
    """Leave what a loader needs in a Hugging Face model's config."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        fields = {"quant_method": QUANT_METHOD, "schema_version": SCHEMA_VERSION, "config": config.to_file()}
        model.config.quantization_config = {**fields, "linears": linears}  # type: ignore[union-attr]
        for module in model.modules():  # as `from_pretrained` does: some models call their linears only then
            if hasattr(module, "save_pretrained"):
                module.config._is_quantized = True  # type: ignore[union-attr]

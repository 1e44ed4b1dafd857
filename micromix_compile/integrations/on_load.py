"""Quantize while loading: no more than one weight of the original is in memory at a time.

    config = micromix.MicroMixQuantConfig("model.recipe.safetensors")
    model = AutoModelForCausalLM.from_pretrained(path, quantization_config=config)

gives the model that `quantize_(from_pretrained(path), recipe)` gives.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Final, Self

import torch
from torch import Tensor, nn
from transformers.core_model_loading import ConversionOps
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from micromix_compile.integrations.checkpoint import QUANT_METHOD, SCHEMA_VERSION
from micromix_compile.integrations.hf import (
    MicroMixQuantizationConfig,
    MicroMixQuantizer,
    PackedQuantizer,
    names_here,
    put_empty,
    take_loaded,
)
from micromix_compile.linear.convolution import POINTWISE
from micromix_compile.linear.experts import PARTS, is_transposed
from micromix_compile.ops.pack import packed_weight
from micromix_compile.recipe.parts import as_matrix, split_name
from micromix_compile.recipe.types import Recipe
from micromix_compile.session.matching import check_same_weight, model_id, named_modules
from micromix_compile.verbs.quantize import description, places_of, say_refused, share_orders

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.recipe.types import LinearRecipe

ON_LOAD: Final = "micromix-on-load"
"""The quant_method while a model is loaded. Afterwards it is that of a packed checkpoint."""


@register_quantization_config(ON_LOAD)
class MicroMixQuantConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """`quantization_config` of `from_pretrained`, for a checkpoint that is not quantized.

    recipe: a `Recipe`, or the path of one. Raises TypeError for anything else, and what `Recipe.load` raises.
    """

    def __init__(self, recipe: Recipe | str | os.PathLike[str]) -> None:
        if not isinstance(recipe, Recipe | str | os.PathLike):
            raise TypeError(f"recipe must be a Recipe or the path of one, got {type(recipe).__name__}")
        self.quant_method = ON_LOAD
        self.recipe = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: transformers copies a model's config, and a recipe may hold all weights, rounded."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """For messages."""
        return {"quant_method": ON_LOAD, "recipe": self.recipe.model_id}


@register_quantizer(ON_LOAD)
class MicroMixOnLoad(PackedQuantizer):
    """Has each weight of the recipe packed when transformers has read it.

    Raises ValueError if the recipe is for another model, as `quantize_` does, and for several processes.
    """

    requires_calibration = False
    quantization_config: MicroMixQuantConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> None:
        _check_one_process(model)
        recipe, modules = self.quantization_config.recipe, named_modules(model)
        found = names_here(model, dict(recipe.linears))
        _check_there(model, found, recipe)
        places, refused = places_of([([name], linear) for name, linear in found.items()], modules)
        say_refused(refused, strict=recipe.config.strict)
        self.places: dict[str, LinearRecipe] = places
        self._refused = refused
        self.transposed = {name for name in places if _is_transposed(name, modules)}
        self._descriptions = {name: description(linear) for name, linear in places.items()}
        self._layouts = put_empty(model, self._descriptions, recipe.config)
        self._expect_originals(model, modules)
        self.errors: list[ValueError] = []

    def _expect_originals(self, model: Any, modules: Mapping[str, nn.Module]) -> None:
        """Of each weight what the checkpoint has of it: transformers converts what it reads to that dtype."""
        for name, linear in self.places.items():
            owner, weight = (name, "weight") if linear.experts is None else name.rpartition(".")[::2]
            original: Tensor = getattr(modules[owner], weight)
            model.get_submodule(owner)._buffers[weight] = original.detach()

    def param_needs_quantization(self, model: Any, param_name: str, **_: Any) -> bool:
        """Whether it is a weight of the recipe."""
        return param_name.removesuffix(".weight") in self.places

    def get_quantize_ops(self) -> ConversionOps:
        """What packs one."""
        return _Pack(self)

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if self.errors:
            raise self.errors[0]
        take_loaded(model, self._layouts)
        share_orders(model, {name: linear.group.name for name, linear in self.places.items()})
        fields = {"schema_version": SCHEMA_VERSION, "config": self.quantization_config.recipe.config.to_file()}
        packed = MicroMixQuantizationConfig(**fields, linears=self._descriptions)
        model.config.quantization_config, model.quantization_method = packed, QUANT_METHOD
        model.hf_quantizer = MicroMixQuantizer(packed)
        model.micromix_refused = self._refused
        return model


class _Pack(ConversionOps):  # type: ignore[misc]
    """Packs one weight, and hands on its parts by the names that packed modules have for them."""

    def __init__(self, quantizer: MicroMixOnLoad) -> None:
        self._quantizer = quantizer

    @torch.no_grad()
    def convert(self, input_dict: dict[str, Any], *, full_layer_name: str, model: Any, **_: Any) -> dict[str, Tensor]:
        """input_dict: the weight, alone, perhaps in a list.

        If the recipe is for another one, nothing: transformers would report an error without its reason, so that it is
        raised when all is loaded.
        """
        (given,) = input_dict.values()
        weight = given[0] if isinstance(given, list) else given
        recipe, name = self._quantizer.quantization_config.recipe, full_layer_name.removesuffix(".weight")
        linear = self._quantizer.places[name]
        try:
            check_same_weight(recipe, linear, as_matrix(weight), model_id(model))
        except ValueError as error:
            self._quantizer.errors.append(error)
            return {}
        matrix = as_matrix(weight)
        packed = packed_weight(matrix.mT if name in self._quantizer.transposed else matrix, linear, recipe)
        own = PARTS if linear.experts is not None else (".weight_q4", ".weight_q6", ".weight_q8", ".weight")
        order = f"{name}{'.' if linear.experts is None else '_'}order.channel_perm"
        parts = {name + part: tensor for part, tensor in zip(own, packed, strict=True)}
        return {**parts, order: linear.group.channel_perm.to(weight.device)}


def _is_transposed(name: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a weight is (C, N), as GPT-2's is, or (E, C, N)."""
    module: Any = modules.get(name)
    if module is None:
        return is_transposed(modules[name.rpartition(".")[0]])
    return not isinstance(module, (nn.Linear, *POINTWISE))


def _check_one_process(model: Any) -> None:
    wanted = getattr(model.config, "distributed_config", None)
    for name in ("tp_size", "pp_size", "fsdp_size"):
        if (getattr(wanted, name, None) or 1) > 1:
            raise ValueError(
                f"{name} must be 1 to quantize while loading, got {getattr(wanted, name)}: save the packed model, and "
                f"load that on several processes"
            )


def _check_there(model: Any, found: dict[str, LinearRecipe], recipe: Recipe) -> None:
    """Raise ValueError for a linear that the model has not, or whose weight it takes from another module."""
    here = {*dict(model.named_modules()), *dict(model.named_parameters())}
    tied = getattr(model, "all_tied_weights_keys", {})
    for name, linear in found.items():
        if not {name, split_name(name)[0]} & here:
            both = f"the recipe was made for {recipe.model_id}, and this model is {model_id(model)}"
            raise ValueError(f"{both}: it has no {linear.fqn}")
        if source := tied.get(f"{name}.weight"):
            raise ValueError(f"{name} shares its weight with {source}: load the model, then quantize_ it")

"""Packed checkpoints in Hugging Face's format: `save_pretrained` seals them, `from_pretrained` verifies and reads them.

    micromix.quantize_(model, recipe)
    model.save_pretrained(path)

    import micromix_compile
    model = AutoModelForCausalLM.from_pretrained(path)     # packed weights; BF16 ones are never held

`quantize_` leaves a description of every packed linear in `model.config.quantization_config`; the tensors are ordinary
safetensors. `transformers_hook` imports this module where transformers is used.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from micromix_compile.config import MicroMixConfig
from micromix_compile.integrations import checkpoint, own_parts, tensor_parallel
from micromix_compile.integrations.checkpoint import QUANT_METHOD, READ_VERSIONS, SCHEMA_VERSION
from micromix_compile.integrations.dequantizing import dequantize_
from micromix_compile.integrations.hf_experts import empty_experts, holders_of, own_names, packed_only
from micromix_compile.linear.convolution import packed_class
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding
from micromix_compile.recipe.orders import SHARDS, SPLIT, check_order, shards_of
from micromix_compile.recipe.parts import as_matrix
from micromix_compile.recipe.schema import MAPPING, NAME, Each, FieldError, Rule, check, integer, shown
from micromix_compile.verbs.quantize import order_of, share_orders

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from micromix_compile.numerics.shards import Cut

logger = logging.getLogger("micromix_compile")

Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Dtype and shape of each buffer of a packed linear."""

_LINEARS: Final = Each(
    {
        "in_features": integer(1),
        "out_features": integer(1),
        "experts": integer(1, optional=True),
        "split": SPLIT,
        "shards": SHARDS,
        "rotated": Rule(
            "a multiple of 32",
            lambda rotated: isinstance(rotated, int) and rotated >= 0 and rotated % BLOCK_SIZE == 0,
            optional=True,
        ),
        "group": NAME,
        "scale_rounding": Rule(
            f"one of {', '.join(ScaleRounding)}", lambda value: value in tuple(ScaleRounding), optional=True
        ),
    }
)


@register_quantization_config(QUANT_METHOD)
class MicroMixQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of a packed checkpoint. Raises ValueError if a field is missing or wrong, naming it."""

    def __init__(self, **fields: Any) -> None:
        version = fields.get("schema_version")
        if version not in READ_VERSIONS:
            known = " or ".join(map(str, READ_VERSIONS))
            raise ValueError(f"quantization_config.schema_version must be {known}, got {version!r}")
        for name, wanted in (("config", MAPPING), ("linears", _LINEARS)):
            check(fields.get(name), wanted, f"quantization_config.{name}")
        for fqn, linear in fields["linears"].items():
            shards_of(linear, tuple(linear["split"]), f"quantization_config.linears[{fqn!r}]")
        self.quant_method = QUANT_METHOD
        self.schema_version = version
        self.config = MicroMixConfig.from_file(fields["config"]).to_file()
        self.linears = fields["linears"]


class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks of a model whose linears are packed, however they came to be."""

    def is_serializable(self, **_: Any) -> bool:
        """Packed models are saved by save_pretrained."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Adapters around packed linears train; these themselves have no gradient."""
        return True

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Any dtype of activations works; what the checkpoint says is kept."""
        return dtype


@register_quantizer(QUANT_METHOD)
class MicroMixQuantizer(PackedQuantizer):
    """Puts empty packed linears into a model before its weights are read, and looks after them once they are.

    Raises ValueError if the checkpoint is not whole, see `checkpoint.verify`.
    """

    requires_calibration = True
    quantization_config: MicroMixQuantizationConfig
    _parts: Mapping[str, Cut] = {}
    _conversions: tuple[Any, ...] = ()

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **_: Any
    ) -> None:
        if checkpoint_files:
            checkpoint.verify(checkpoint_files)
        else:
            logger.warning("the tensors of a packed model come from no file: damage to them can't be seen")
        config = MicroMixConfig.from_file(self.quantization_config.config)
        linears = self.quantization_config.linears = names_here(model, self.quantization_config.linears)
        scale = "weight_scale" if self.quantization_config.schema_version == 1 else "weight"
        dealing = tensor_parallel.dealing_of(model, linears)
        if dealing is not None:
            modules, w_fp4 = dict(model.named_modules()), config.weights == "mxfp4"
            self._parts = tensor_parallel.parts_of(modules, linears, dealing, w_fp4=w_fp4)
        if self._parts:
            stored = own_parts.stored_parts(linears, self._parts, config, scale)
            self._conversions = (own_parts.converter(stored, model.base_model_prefix),)  # type: ignore[arg-type]
        self._layouts = put_empty(model, linears, config, scale=scale, parts=self._parts)

    def update_parallel_plan(self, model: nn.Module, plan: dict[str, str]) -> None:
        """What transformers deals out itself."""
        tensor_parallel.forget_rules(model, plan, self.quantization_config.linears)

    def get_weight_conversions(self) -> list[Any]:
        """What transformers does to the tensors that it reads."""
        return list(self._conversions)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        packed = take_loaded(model, self._layouts)
        linears = self.quantization_config.linears
        _check_orders(model, linears)
        self.quantization_config.schema_version = SCHEMA_VERSION  # in which it is saved
        tensor_parallel.check_version(getattr(model, "_tp_size", None) or 1, linears)
        groups = {fqn: described["group"] for fqn, described in linears.items()}
        cut = tensor_parallel.keep_own_orders(model, self._parts)
        share_orders(model, {fqn: f"{group} cut: {fqn in cut}" for fqn, group in groups.items()})
        for module in packed:
            module.compact()  # type: ignore[operator]
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | str | None = None) -> nn.Module:
        """What `model.dequantize()` leaves the work to."""
        return dequantize_(model, dtype)

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element: packed tensors are stored as they are."""
        return float(param.element_size())


def put_empty(
    model: nn.Module, linears: dict[str, Any], config: MicroMixConfig, *, scale: str = "weight",
    parts: Mapping[str, Cut] | None = None,
) -> dict[str, Layout]:  # fmt: skip
    """Put empty packed modules, as `linears` describes them, in the places of those of a model on the meta device.

    scale: under which name scales come. parts: what this process keeps of the weights of which it does not keep all.
    Returns the layout of each by its name, for `take_loaded`.
    """
    layouts: dict[str, Layout] = {}
    for holder, weights in holders_of(linears).items():
        experts = _put_empty(model, holder, empty_experts, weights, config)
        tensor_parallel.keep_own_experts(experts, holder, parts or {})
        layouts[holder] = _layout(experts)
    for fqn in (fqn for fqn, described in linears.items() if "experts" not in described):
        packed = _put_empty(model, fqn, _empty_linear, linears[fqn], config)
        tensor_parallel.keep_own_part(packed, fqn, parts or {})
        layouts[fqn] = _layout(packed)
        _await_tensors(packed, scale=scale)
        getattr(model, "all_tied_weights_keys", {}).pop(f"{fqn}.weight", None)
    return layouts


def take_loaded(model: nn.Module, layouts: dict[str, Layout]) -> list[nn.Module]:
    """The packed modules of `put_empty`, filled. Raises ValueError, which names the tensor, if one is not."""
    packed = [model.get_submodule(fqn) for fqn in layouts]
    for (fqn, layout), module in zip(layouts.items(), packed, strict=True):
        if isinstance(module, MicroMixLinear):
            _take_tensors(module)
        _check_loaded(fqn, module, layout)
    return packed


def _put_empty(model: nn.Module, fqn: str, make: Callable[..., Any], described: Any, config: MicroMixConfig) -> Any:
    """What `make` makes of a module and of what is said of it, put in the module's place."""
    parent, _, child = fqn.rpartition(".")
    try:
        packed = make(model.get_submodule(fqn), described, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"quantization_config.linears[{fqn!r}] does not fit this model: {error!r}") from error
    setattr(model.get_submodule(parent), child, packed)
    return packed


def _empty_linear(module: nn.Module, described: dict[str, Any], config: MicroMixConfig) -> MicroMixLinear:
    """A packed linear for the place of `module`. Raises ValueError if its sizes are others."""
    bias = getattr(module, "bias", None)
    n, channels = described["out_features"], described["in_features"]
    weight = getattr(module, "weight", None)
    if weight is None or tuple(as_matrix(weight).shape) not in ((n, channels), (channels, n)):  # GPT-2's is (C, N)
        raise ValueError(f"its weight must be {(n, channels)}, got {None if weight is None else tuple(weight.shape)}")
    k4, k6, k8 = described["split"]
    if k4 + k6 + k8 != channels + -channels % BLOCK_SIZE:
        raise ValueError(f"split must sum to in_features in whole blocks, got {described['split']} for {channels}")
    rotated = described.get("rotated", 0)
    if rotated > k4 + k6 + k8:
        raise ValueError(f"rotated must be at most its {k4 + k6 + k8} channels, got {rotated}")
    if "scale_rounding" in described:
        config = dataclasses.replace(config, scale_rounding=described["scale_rounding"])
    return packed_class(module)(
        in_features=channels,
        out_features=n,
        split=(k4, k6, k8),
        rotated=rotated,
        config=config,
        bias=None if bias is None else nn.Parameter(bias.detach(), requires_grad=False),
        device="meta",
        dtype=weight.dtype,
    )


def _layout(module: nn.Module) -> Layout:
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in module.named_buffers()}


def _check_loaded(fqn: str, module: nn.Module, layout: Layout) -> None:
    """Raise ValueError unless all of a packed module came from the checkpoint, in its shapes; names the tensor.

    transformers fills with anything what it does not find, and some of its versions take any shape.
    """
    for name, tensor in module.named_buffers():
        if not getattr(tensor, "_is_hf_initialized", False):
            raise ValueError(f"the checkpoint has no {fqn}.{name} that fits: it is not whole, copy it anew")
        if (tensor.dtype, tuple(tensor.shape)) != layout[name]:
            wanted = f"{layout[name][0]} {layout[name][1]}"
            raise ValueError(f"{fqn}.{name} must be {wanted}, got {tensor.dtype} {tuple(tensor.shape)}")


def _check_orders(model: nn.Module, linears: dict[str, Any]) -> None:
    """Raise ValueError unless the order of each packed weight is one of its channels, and that of its group."""
    first: dict[str, Tensor] = {}
    for fqn, described in linears.items():
        holder, attribute = order_of(model, fqn)
        perm, group = getattr(holder, attribute).channel_perm, described["group"]
        name = f"{fqn}{attribute.removeprefix(fqn.rpartition('.')[2])}" if "experts" in described else f"{fqn}.order"
        try:
            shards = shards_of(described, tuple(described["split"]), name)
            check_order(perm.cpu(), described["in_features"], f"{name}.channel_perm", shards)
        except FieldError as error:
            raise ValueError(f"the checkpoint is not whole: {error}") from error
        if not torch.equal(perm, first.setdefault(group, perm)):
            raise ValueError(f"{name}.channel_perm must be the order of its group {group}: copy the checkpoint")


def _await_tensors(packed: MicroMixLinear, *, scale: str) -> None:
    """Until all is loaded: the scales are a buffer of the name under which they are stored.

    transformers asks for `weight` of a module before it sets one, and models that give their linears initial values ask
    for it too. Where a model is spread over devices, accelerate asks for it afterwards, and wants what was loaded.
    """
    buffers = packed._buffers
    stored = buffers.pop("weight_scale")
    assert stored is not None, "a packed linear has scales"
    buffers[scale] = stored
    stand_in: Any = torch.empty_like(stored)
    stand_in._is_hf_initialized = packed._is_hf_initialized = True
    packed.stand_in = stand_in


def _take_tensors(packed: MicroMixLinear) -> None:
    """The end of `_await_tensors`."""
    del packed.stand_in
    buffers = packed._buffers
    if "weight" in buffers:
        buffers["weight_scale"] = buffers.pop("weight")


def names_here(model: nn.Module, linears: dict[str, Any]) -> dict[str, Any]:
    """Linears by their names in `model`, which may be the base of what was packed, or have another head.

    A head that it does not have is left out; any other name that fits nowhere stays.
    """
    prefix = f"{model.base_model_prefix}."
    here = {*dict(model.named_modules()), *dict(model.named_parameters())}
    has_heads = any(fqn.startswith(prefix) for fqn in linears)
    found = {}
    for fqn, described in linears.items():
        names = [name for name in (fqn, fqn.removeprefix(prefix), prefix + fqn) if name in here]
        if names or not has_heads or fqn.startswith(prefix):
            found[names[0] if names else fqn] = described
    return found


def _sealing(save: Any) -> Any:
    """`PreTrainedModel.save_pretrained`, and a seal on what it wrote for a packed model.

    Only afterwards are the names and the bytes known that are in the files: transformers renames and shards.
    """
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs)
        given.apply_defaults()
        packed = checkpoint.is_ours(
            {"quantization_config": _as_dict(getattr(self.config, "quantization_config", None))}
        )
        if not packed or getattr(self, "_hf_peft_config_loaded", False):  # adapters alone
            return save(self, *args, **kwargs)
        tensor_parallel.check_whole(self)
        if given.arguments.get("push_to_hub"):
            raise ValueError("push_to_hub of save_pretrained must be False for a packed model: call model.push_to_hub")
        with own_names(self), packed_only(self):
            result = save(self, *args, **kwargs)
        if given.arguments.get("is_main_process", True):
            checkpoint.seal(given.arguments["save_directory"])
        return result

    return save_pretrained


def _without_packed(get_keys: Any) -> Any:
    """`PreTrainedModel.get_expanded_tied_weights_keys`, but a packed head is tied to nothing."""

    @functools.wraps(get_keys)
    def get_expanded_tied_weights_keys(self: Any, *args: Any, **kwargs: Any) -> dict[str, str]:
        keys: dict[str, str] = get_keys(self, *args, **kwargs)
        packed = {name for name, module in self.named_modules() if keys and isinstance(module, MicroMixLinear)}
        return {target: source for target, source in keys.items() if target.rpartition(".")[0] not in packed}

    return get_expanded_tied_weights_keys


def _checking(get_config_dict: Any) -> Any:
    """`PreTrainedConfig.get_config_dict`, which reads config.json for all others, and refuses a damaged one of ours.

    Before anything is made of its fields: a model of them might fail in any way.
    """

    def checked(cls: Any, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        path = Path(str(pretrained_model_name_or_path), kwargs.get("subfolder") or "", "config.json")
        if path.is_file():
            _check_config(path)
        return get_config_dict(cls, pretrained_model_name_or_path, **kwargs)

    wrapped: Any = functools.update_wrapper(checked, get_config_dict)
    return classmethod(wrapped)


def _check_config(path: Path) -> None:
    """Raise ValueError, which names the path, for a config.json of ours that is damaged or was edited."""
    try:
        config = checkpoint.read_config(path)
    except ValueError:
        return  # transformers says so
    if not isinstance(config.get("quantization_config", {}), dict | None):
        raise ValueError(f"{path}: quantization_config must be a mapping, got {shown(config['quantization_config'])}")
    if not checkpoint.is_ours(config):
        return
    checkpoint.verify_config(path)
    for index in checkpoint.index_files(path.parent):
        checkpoint.read_index(index)  # before transformers reads it
    try:
        MicroMixQuantizationConfig(**config["quantization_config"])
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _as_dict(config: Any) -> Any:
    return config.to_dict() if isinstance(config, QuantizationConfigMixin) else config


PreTrainedModel.save_pretrained = _sealing(PreTrainedModel.save_pretrained)
PreTrainedModel.get_expanded_tied_weights_keys = _without_packed(PreTrainedModel.get_expanded_tied_weights_keys)
PreTrainedConfig.get_config_dict = _checking(PreTrainedConfig.get_config_dict.__func__)

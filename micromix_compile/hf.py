"""Packed checkpoints in Hugging Face's format: importing this module lets `from_pretrained` read them.

    micromix.quantize_(model, recipe)
    model.save_pretrained(path)

    import micromix_compile.hf
    model = AutoModelForCausalLM.from_pretrained(path)     # packed weights; BF16 ones are never held

`quantize_` leaves a description of every packed linear in `model.config.quantization_config`; the tensors are ordinary
safetensors.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from micromix_compile.config import MicroMixConfig
from micromix_compile.quantize import QUANT_METHOD, SCHEMA_VERSION, MicroMixLinear, share_orders

if TYPE_CHECKING:
    from torch import Tensor


@register_quantization_config(QUANT_METHOD)
class MicroMixQuantizationConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """quantization_config of a packed checkpoint. Raises ValueError if a field is missing or wrong, naming it."""

    def __init__(self, **fields: Any) -> None:
        version = fields.get("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"quantization_config.schema_version must be {SCHEMA_VERSION}, got {version!r}")
        for name in ("config", "linears"):
            if not isinstance(fields.get(name), dict):
                raise ValueError(f"quantization_config.{name} must be a mapping, got {fields.get(name)!r}")
        self.quant_method = QUANT_METHOD
        self.schema_version = version
        self.config = MicroMixConfig.from_mapping(fields["config"]).to_dict()
        self.linears = fields["linears"]


@register_quantizer(QUANT_METHOD)
class MicroMixQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts empty packed linears into a model before its weights are read, and shares their orders after."""

    requires_calibration = True
    quantization_config: MicroMixQuantizationConfig

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        config = MicroMixConfig.from_mapping(self.quantization_config.config)
        self.quantization_config.linears = _names_here(model, self.quantization_config.linears)
        for fqn, described in self.quantization_config.linears.items():
            parent, _, child = fqn.rpartition(".")
            try:
                original: Any = model.get_submodule(fqn)
                bias = getattr(original, "bias", None)
                k4, k6, k8 = described["split"]
                packed = MicroMixLinear(
                    in_features=described["in_features"],
                    out_features=described["out_features"],
                    split=(k4, k6, k8),
                    config=config,
                    bias=None if bias is None else nn.Parameter(bias.detach(), requires_grad=False),
                    device="meta",
                    dtype=original.weight.dtype,
                )
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                raise ValueError(f"quantization_config.linears[{fqn!r}] does not fit this model: {error!r}") from error
            setattr(model.get_submodule(parent), child, packed)
            _stand_in_for_weight(packed)
            getattr(model, "all_tied_weights_keys", {}).pop(f"{fqn}.weight", None)

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        share_orders(model, {fqn: d["group"] for fqn, d in self.quantization_config.linears.items()})
        for module in model.modules():
            if isinstance(module, MicroMixLinear):
                vars(module).pop("weight", None)
                module.compact()
        return model

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        """Bytes per element: packed tensors are stored as they are."""
        return float(param.element_size())

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


def _stand_in_for_weight(packed: MicroMixLinear) -> None:
    """Until all is loaded: a model that gives its linears initial values asks for their weights."""
    weight: Any = torch.empty(packed.out_features, packed.in_features, device="meta")
    weight._is_hf_initialized = packed._is_hf_initialized = True
    vars(packed)["weight"] = weight


def _names_here(model: nn.Module, linears: dict[str, Any]) -> dict[str, Any]:
    """Linears by their names in `model`, which may be the base of what was packed, or have another head.

    A head that it does not have is left out; any other name that fits nowhere stays.
    """
    prefix = f"{model.base_model_prefix}."
    modules = dict(model.named_modules())
    has_heads = any(fqn.startswith(prefix) for fqn in linears)
    found = {}
    for fqn, described in linears.items():
        names = [name for name in (fqn, fqn.removeprefix(prefix), prefix + fqn) if name in modules]
        if names or not has_heads or fqn.startswith(prefix):
            found[names[0] if names else fqn] = described
    return found

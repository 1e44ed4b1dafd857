"""The quantization config that vLLM makes of a packed checkpoint's, and which of vLLM's layers are packed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from micromix_compile.config import MicroMixConfig
from micromix_compile.integrations import checkpoint
from micromix_compile.integrations.checkpoint import QUANT_METHOD
from micromix_compile.integrations.hf import MicroMixQuantizationConfig
from micromix_compile.integrations.vllm.experts_method import PackedExpertsMethod
from micromix_compile.integrations.vllm.linear_method import PackedLinearMethod

if TYPE_CHECKING:
    from torch import nn
    from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
    from vllm.model_executor.models.utils import WeightsMapper

logger = logging.getLogger("micromix_compile")


class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """vLLM's view of a checkpoint's quantization_config. Raises ValueError as `MicroMixQuantizationConfig` does.

    linears: what the checkpoint says of each packed linear, by the name it has in vLLM's model before vLLM merges it.
    """

    def __init__(self, fields: dict[str, Any]) -> None:
        super().__init__()
        checked = MicroMixQuantizationConfig(**fields)
        self.config = MicroMixConfig.from_file(checked.config)
        self.linears: dict[str, dict[str, Any]] = checked.linears

    def get_name(self) -> str:
        """The quant_method of config.json."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those that the operations take."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Compute capability 8.0, the least that has bfloat16 MMA."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """From the quantization_config of config.json."""
        return cls(config)

    def maybe_update_config(self, model_name: str, *_: Any, **__: Any) -> None:
        """Called once, before anything is loaded. Raises ValueError if the checkpoint is not whole."""
        directory = Path(model_name)
        if directory.is_dir():
            checkpoint.verify(checkpoint.weight_files(directory))
        else:
            logger.warning("%s is no local directory: damage to its tensors can't be seen", model_name)

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Name the linears as vLLM's model does."""
        self.linears = hf_to_vllm_mapper.apply_dict(self.linears)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """What a layer of this name is computed with; None leaves it to vLLM.

        Raises ValueError for a layer that is packed and no linear, or packed in part.
        """
        if isinstance(layer, RoutedExperts):
            return self._experts_method(layer, prefix)
        parts = self._parts(prefix)
        packed = [name for name in parts if name in self.linears]
        if not packed:
            return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
        if not isinstance(layer, LinearBase):
            raise ValueError(
                f"{prefix} is packed, and vLLM has a {type(layer).__name__} there, of which only linears can be: "
                f"calibrate with a pattern in skip that matches it"
            )
        if len(packed) < len(parts):
            missing = next(name for name in parts if name not in self.linears)
            raise ValueError(
                f"{prefix}: vLLM makes one linear of {', '.join(parts)}, of which {missing} is not packed and "
                f"{packed[0]} is: all or none must be"
            )
        return PackedLinearMethod({name: self.linears[name] for name in parts}, self.config)

    def _experts_method(self, layer: RoutedExperts, prefix: str) -> QuantizeMethodBase | None:
        start = f"{prefix}."
        weights = {name.removeprefix(start): one for name, one in self.linears.items() if name.startswith(start)}
        return PackedExpertsMethod(layer, prefix, weights, self.config) if weights else None

    def _parts(self, prefix: str) -> list[str]:
        """The checkpoint's names of the linears that vLLM's layer of this name is made of."""
        parent, _, child = prefix.rpartition(".")
        if prefix in self.linears:
            return [prefix]
        start = f"{parent}." if parent else ""
        return [start + name for name in self.packed_modules_mapping.get(child, [child])]

"""Small checkpoints as compressed-tensors makes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from transformers import AutoModelForCausalLM, LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

MODELOPT: Final = Path(__file__).parent / "modelopt"
UP: Final = "model.layers.0.mlp.up_proj"
IDS: Final = torch.arange(16).reshape(2, 8)
SCHEMES: Final = {
    "mxfp4": {"MXFP4": ["Linear"]},
    "mxfp6": {"MXFP6A8": ["Linear"]},
    "mxfp8": {"MXFP8": ["Linear"]},
    "mixed": {"MXFP4": ["re:.*mlp.*"], "MXFP8": ["re:.*self_attn.*"]},
    "weight-only": {"MXFP4A16": ["Linear"]},
    "other activations": {"MXFP4XFP8": ["Linear"]},
    "integers": {"W8A8": ["Linear"]},
}
"""Their presets and what each is for."""


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1, "vocab_size": 64, "attention_bias": True, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def write_quantized(directory: Path, kind: str, *, max_shard_size: str = "1GB", **changes: Any) -> None:
    """Quantize a Llama by one of `SCHEMES` and save it, all but the scales' search by compressed-tensors."""
    model = llama(**changes)
    groups = {f"group_{i}": preset_name_to_scheme(*preset) for i, preset in enumerate(SCHEMES[kind].items())}
    apply_quantization_config(model, QuantizationConfig(config_groups=groups, ignore=["lm_head"]), show_progress=False)
    for module in model.modules():
        scheme = getattr(module, "quantization_scheme", None)
        if scheme is not None:
            blocks = module.weight.data.unflatten(-1, (-1, scheme.weights.group_size or module.in_features))
            scales, _ = calculate_qparams(blocks.amin(-1), blocks.amax(-1), scheme.weights)
            module.weight_scale.data.copy_(scales)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(directory, max_shard_size=max_shard_size)
    compressor.update_config(str(directory))


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    edit(config)
    path.write_text(json.dumps(config), "utf-8")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found

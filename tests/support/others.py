"""Small checkpoints as compressed-tensors makes them, and one as gpt-oss is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

from support.experts import model_of_experts

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
    "mxfp4a8": {"MXFP4": ["Linear"]},
    "mixed": {"MXFP4": ["re:.*mlp.*"], "MXFP8": ["re:.*self_attn.*"]},
    "weight-only": {"MXFP4A16": ["Linear"]},
    "other activations": {"MXFP4XFP8": ["Linear"]},
    "integers": {"W8A8": ["Linear"]},
}
"""Their presets and what each is for."""
WIDE: Final = {"mxfp4a8": "MXFP8"}
"""Of those whose activations are another preset's, that preset."""


def llama(**changes: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**{**sizes, "num_hidden_layers": 1, "vocab_size": 64, "attention_bias": True, **changes})
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def write_quantized(directory: Path, kind: str, *, max_shard_size: str = "1GB", **changes: Any) -> None:
    """Quantize a Llama by one of `SCHEMES` and save it, all but the scales' search by compressed-tensors."""
    model = llama(**changes)
    groups = {f"group_{i}": preset_name_to_scheme(*preset) for i, preset in enumerate(SCHEMES[kind].items())}
    if kind in WIDE:
        groups["group_0"].input_activations = preset_name_to_scheme(WIDE[kind], []).input_activations
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


def write_gpt_oss(directory: Path) -> dict[str, Tensor]:
    """Random MXFP4 weights of experts, all codes and many scales among them. Returns these tensors by name."""
    model = model_of_experts("gpt_oss", torch.bfloat16)
    model.save_pretrained(directory)
    path, quantized = directory / "model.safetensors", {}
    tensors = load_file(path)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, channels, n = tensors.pop(name).shape
        quantized[f"{name}_blocks"] = torch.randint(0, 256, (experts, n, channels // 32, 16), dtype=torch.uint8)
        quantized[f"{name}_scales"] = torch.randint(100, 125, (experts, n, channels // 32), dtype=torch.uint8)
    save_file({**tensors, **quantized}, path, metadata={"format": "pt"})
    stays = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    said = {"quant_method": "mxfp4", "modules_to_not_convert": stays}
    edit_config(directory, lambda config: config.update(quantization_config=said))
    return quantized


def edit_config(directory: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text("utf-8"))
    edit(config)
    path.write_text(json.dumps(config), "utf-8")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found

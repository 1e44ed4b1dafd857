"""Checkpoints as others write them for the fuzzer, and what they hold as read without our code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig

import micromix_compile as micromix

if TYPE_CHECKING:
    from pathlib import Path

Array = np.ndarray[Any, Any]

INDEX = "model.safetensors.index.json"
LINEARS = {
    "mxfp4-pack-quantized": (4, ("q_proj", "k_proj", "v_proj")),
    "mxfp6-pack-quantized": (6, ("o_proj",)),
    "mxfp8-quantized": (8, ("gate_proj", "up_proj", "down_proj")),
}
"""Of compressed-tensors: bits of a format, and which linears have it here."""


def _small_floats(exponent_bits: int, mantissa_bits: int) -> Array:
    """The value of each code, by OCP's definition; NaN codes of E4M3 are no matter here."""
    codes = np.arange(2 ** (1 + exponent_bits + mantissa_bits))
    mantissa, bias = codes % 2**mantissa_bits / 2**mantissa_bits, 2 ** (exponent_bits - 1) - 1
    exponent = codes // 2**mantissa_bits % 2**exponent_bits
    sizes = np.where(exponent > 0, (1 + mantissa) * 2.0 ** (exponent - bias), mantissa * 2.0 ** (1 - bias))
    return np.where(codes >= len(codes) // 2, -sizes, sizes)


VALUES = {4: _small_floats(2, 1), 6: _small_floats(2, 3), 8: _small_floats(4, 3)}
"""By bits: E2M1, E2M3 and E4M3."""


def make_compressed(model: torch.nn.Module, directory: Path, *, files: int = 1) -> Path:
    """`model` with random weights in all three formats, as compressed-tensors writes it."""
    save_model(model, directory)
    tensors, groups = load_file(directory / "model.safetensors"), {}
    for form, (bits, linears) in LINEARS.items():
        targets = [name for name in linears_of(tensors) if name.rpartition(".")[2] in linears]
        for name in targets:
            n, channels = tensors.pop(f"{name}.weight").shape
            codes = torch.randint(0, 127, (n, channels * bits // 8), dtype=torch.uint8)
            codes |= torch.randint(0, 2, codes.shape, dtype=torch.uint8) << 7
            part = "weight" if bits == 8 else "weight_packed"
            tensors[f"{name}.{part}"] = codes.view(torch.float8_e4m3fn) if bits == 8 else codes
            tensors[f"{name}.weight_scale"] = random_scales(n, channels // 32)
        groups[form] = {
            "format": form,
            "targets": targets,
            "weights": arguments(bits, dynamic=False),
            "input_activations": arguments(bits, dynamic=True),
        }
    said = {"quant_method": "compressed-tensors", "quantization_status": "compressed", "format": "mixed-precision"}
    write(directory, tensors, {**said, "config_groups": groups, "ignore": ["lm_head"]}, files)
    return directory


def make_gpt_oss(directory: Path) -> Path:
    """A gpt-oss of one layer, its experts in MXFP4 with random codes."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"num_hidden_layers": 1, "num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 32, "vocab_size": 64}
    config = GptOssConfig(**sizes, **more, layer_types=["full_attention"])
    save_model(AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16), directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, channels, n = tensors.pop(name).shape
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, n, channels // 32, 16), dtype=torch.uint8)
        tensors[f"{name}_scales"] = random_scales(experts, n, channels // 32)
    stays = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    write(directory, tensors, {"quant_method": "mxfp4", "modules_to_not_convert": stays}, 1)
    return directory


def save_model(model: torch.nn.Module, directory: Path) -> None:
    """In one file."""
    model.save_pretrained(directory)  # type: ignore[operator]


def linears_of(tensors: dict[str, torch.Tensor]) -> list[str]:
    """Names of those in layers."""
    return sorted(name.removesuffix(".weight") for name in tensors if name.endswith("_proj.weight"))


def random_scales(*shape: int) -> torch.Tensor:
    """E8M0 bytes that keep a model finite."""
    return torch.randint(112, 124, shape, dtype=torch.uint8)


def arguments(bits: int, *, dynamic: bool) -> dict[str, Any]:
    """Of an MX format, as compressed-tensors calls them."""
    mx = {"type": "float", "strategy": "group", "group_size": 32, "symmetric": True, "scale_dtype": "torch.uint8"}
    return {"num_bits": bits, "dynamic": dynamic, **mx}


def write(directory: Path, tensors: dict[str, torch.Tensor], quantization: dict[str, Any], files: int) -> None:
    """Tensors in so many files, with an index if they are several, and what config.json says of them."""
    path = directory / "config.json"
    content = {**json.loads(path.read_text("utf-8")), "quantization_config": quantization}
    path.write_text(json.dumps(content), "utf-8")
    names = sorted(tensors)
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(files):
        file = "model.safetensors" if files == 1 else f"model-{i + 1:05d}-of-{files:05d}.safetensors"
        own = names[i::files]
        save_file({name: tensors[name] for name in own}, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(own, file)
    if files > 1:
        (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), "utf-8")


def values_of(model: torch.nn.Module) -> list[Any]:
    """All that a converted model is: its tensors, and its config without what names places."""
    config = model.config.to_dict()
    own = {name: value for name, value in config.items() if name not in ("_name_or_path", "quantization_config")}
    layouts = {n: m.layout for n, m in model.named_modules() if isinstance(m, micromix.MicroMixLinear)}
    layouts |= {n: m.layouts for n, m in model.named_modules() if isinstance(m, micromix.MicroMixExperts)}
    return [sorted(model.state_dict().items()), json.dumps(own, sort_keys=True, default=str), layouts]


def holds(model: torch.nn.Module, directory: Path) -> bool:
    """Whether the tensors of a converted model are those of the directory, and its activations what that says, or 8-bit
    where it says nothing."""
    files = {name: tensor for path in directory.glob("model*.safetensors") for name, tensor in load_file(path).items()}
    said = json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]
    groups, rest = said.get("config_groups", {}), set(files)
    pairs = {(group["weights"]["num_bits"], group["input_activations"]["num_bits"]) for group in groups.values()}
    for name, module in model.named_modules():
        if isinstance(module, micromix.MicroMixLinear):
            rest -= {f"{name}.{part}" for part in ("weight", "weight_packed", "weight_scale")}
            if not linear_holds(module, name, files, pairs):
                return False
        elif isinstance(module, micromix.MicroMixExperts):
            rest -= {f"{name}.{own}_{part}" for own in module.layouts for part in ("blocks", "scales")}
            if not experts_hold(module, name, files):
                return False
    state = model.state_dict()
    return all(same_values(state[name].double().numpy(), files[name].double().numpy()) for name in rest)


def linear_holds(module: Any, name: str, files: dict[str, torch.Tensor], pairs: set[tuple[int, int]]) -> bool:
    """Whether a packed linear is compressed-tensors'. pairs: the bits of weights and activations that there are."""
    scale = files[f"{name}.weight_scale"]
    codes = files.get(f"{name}.weight_packed", files.get(f"{name}.weight")).view(torch.uint8)
    bits = codes.shape[1] // scale.shape[1] // 4
    held = next(one for one, k in zip((4, 6, 8), module.split, strict=True) if k)
    expected = dequantized(codes.numpy(), scale.numpy(), bits)
    return (
        (bits, held) in pairs
        and module.layout.activations == "same"
        and same_values(module.weight.double().numpy(), expected)
    )


def experts_hold(module: Any, name: str, files: dict[str, torch.Tensor]) -> bool:
    """Whether packed experts are gpt-oss's, with the activations that the fuzzer names."""
    for own, layout in module.layouts.items():
        scales, blocks = (files[f"{name}.{own}_{part}"] for part in ("scales", "blocks"))
        order = module.get_buffer(f"{own}_order.channel_perm")
        for expert, packed in enumerate(zip(*module.packed(own), strict=True)):
            weight = torch.ops.micromix.dequantize_weight(*packed, order, len(order), layout.fp6, 0, torch.float32)
            expected = dequantized(blocks[expert].flatten(1).numpy(), scales[expert].numpy(), 4)
            if layout.activations != "fp8" or not same_values(weight.numpy(), expected):
                return False
    return True


def dequantized(packed: Array, scale: Array, bits: int) -> Array:
    """Codes of so many bits, the first in the lowest, and (N, K / 32) scales as float64 (N, K), by OCP's formula."""
    each = np.unpackbits(packed, axis=1, bitorder="little").reshape(len(packed), -1, bits)
    codes = (each.astype(np.int64) << np.arange(bits)).sum(-1)
    factors = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127))
    return VALUES[bits][codes] * np.repeat(factors, 32, axis=1)


def same_values(found: Array, expected: Array) -> bool:
    """In float32, NaN for NaN."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(found.astype(np.float32), expected.astype(np.float32), equal_nan=True))

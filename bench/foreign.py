"""A checkpoint of compressed-tensors for the fuzzer, and what it holds as read without our code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
from safetensors.torch import load_file

import micromix_compile as micromix

if TYPE_CHECKING:
    from pathlib import Path

    import torch

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=np.float64)


def make_foreign(model: torch.nn.Module, batches: list[torch.Tensor], folder: Path) -> Path:
    """`model` in MXFP4, weights and activations, as compressed-tensors writes it. It is packed on the way."""
    config = micromix.MicroMixConfig(
        policy="mxfp4", uniform_order="model", rotate="none", activations="same", weight_rounding="nearest"
    )
    packed = micromix.quantize_(model, micromix.calibrate(model, batches, config))
    packed.save_pretrained(folder / "one format")
    micromix.convert(folder / "one format", folder / "foreign")
    return folder / "foreign"


def values_of(model: torch.nn.Module) -> list[Any]:
    """All that a converted model is: its tensors, and its config without what names places."""
    config = model.config.to_dict()
    own = {name: value for name, value in config.items() if name not in ("_name_or_path", "quantization_config")}
    layouts = {n: m.layout for n, m in model.named_modules() if isinstance(m, micromix.MicroMixLinear)}
    return [sorted(model.state_dict().items()), json.dumps(own, sort_keys=True, default=str), layouts]


def holds(model: torch.nn.Module, directory: Path) -> bool:
    """Whether the tensors of a converted model are those of the directory, and its activations what that says."""
    files = load_file(directory / "model.safetensors")
    groups = json.loads((directory / "config.json").read_text("utf-8"))["quantization_config"]["config_groups"]
    bits = {group["input_activations"]["num_bits"] for group in groups.values()}
    for name, module in model.named_modules():
        if isinstance(module, micromix.MicroMixLinear):
            scale, codes = files[f"{name}.weight_scale"], files[f"{name}.weight_packed"]
            if not same_values(module.weight.double().numpy(), dequantized(codes.numpy(), scale.numpy())):
                return False
            held = next(one for one, k in zip((4, 6, 8), module.split, strict=True) if k)
            if held not in bits or module.layout.activations != "same":
                return False
    state = model.state_dict()
    plain = {name: tensor for name, tensor in files.items() if not name.endswith((".weight_packed", ".weight_scale"))}
    return all(same_values(state[name].double().numpy(), tensor.double().numpy()) for name, tensor in plain.items())


def dequantized(packed: np.ndarray[Any, Any], scale: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """MXFP4 (N, K / 2), (N, K / 32) as float64 (N, K), by OCP's table and formula."""
    codes = np.stack((packed & 15, packed >> 4), axis=-1).reshape(len(packed), -1)
    factors = np.where(scale == 255, np.nan, 2.0 ** (scale.astype(np.float64) - 127))
    return E2M1[codes] * np.repeat(factors, 32, axis=1)


def same_values(found: np.ndarray[Any, Any], expected: np.ndarray[Any, Any]) -> bool:
    """In float32, NaN for NaN."""
    with np.errstate(over="ignore"):
        return bool(np.array_equal(found.astype(np.float32), expected.astype(np.float32), equal_nan=True))

"""Make the checkpoint in this folder: a Llama of one layer with random weights, in MXFP8 by ModelOpt.

pip install nvidia-modelopt==0.47.0 (with its dependencies, into an environment of its own), then python make.py.
dequantized.safetensors are its weights as ModelOpt itself dequantizes them.
"""

from __future__ import annotations

from pathlib import Path

import modelopt.torch.quantization as mtq
import torch
from modelopt.torch.export import export_hf_checkpoint
from modelopt.torch.quantization.qtensor import MXFP8QTensor
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig

HERE = Path(__file__).parent


def main() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=32, architectures=["LlamaForCausalLM"])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    quantized = mtq.quantize(model, mtq.MXFP8_DEFAULT_CFG, lambda one: one(torch.arange(16).reshape(2, 8)))
    export_hf_checkpoint(quantized, export_dir=HERE)
    tensors = load_file(HERE / "model.safetensors")
    values = {}
    for name, scale in tensors.items():
        if name.endswith(".weight_scale"):
            codes = tensors[name.removesuffix("_scale")]
            held = MXFP8QTensor(codes.shape, torch.float32, codes)
            values[name.removesuffix("_scale")] = held.dequantize(scale=scale)
    save_file(values, HERE / "dequantized.safetensors")


if __name__ == "__main__":
    main()

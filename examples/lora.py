"""Train low-rank adapters around a packed model, whose own weights stay in MXFP4, 6 and 8.

python examples/lora.py [--steps 20]
"""

from __future__ import annotations

import argparse

import torch
from peft import LoraConfig, get_peft_model

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo


def main() -> None:
    """A line with the loss before and after."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--length", type=int, default=128, help="tokens of a window")
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    model, tokenizer = zoo.load_model(arguments.model, torch.float32)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 8, arguments.length)
    micromix.quantize_(model, micromix.calibrate(model, windows.split(1)))

    wrapped = get_peft_model(model, LoraConfig(r=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    optimizer = torch.optim.AdamW((p for p in wrapped.parameters() if p.requires_grad), lr=1e-3)
    losses = []
    for step in range(arguments.steps):
        batch = windows[step % len(windows)][None]
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    first, last = losses[: len(windows)], losses[-len(windows) :]
    print(f"loss {sum(first) / len(first):.3f}, after {arguments.steps} steps {sum(last) / len(last):.3f}")


if __name__ == "__main__":
    main()

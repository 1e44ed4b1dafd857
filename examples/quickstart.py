"""Calibrate a model, compare its compiled twin with it, pack it, save it, load it.

python examples/quickstart.py [--model DIRECTORY]
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.perplexity import evaluate


def main() -> None:
    """Everything, with a line for each step."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--windows", type=int, default=4, help="of calibration and of evaluation")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    arguments = parser.parse_args()
    model, tokenizer = zoo.load_model(arguments.model, torch.float32)
    text = texts.load_texts()
    calibration = texts.token_windows(text.calibration, tokenizer, arguments.windows, arguments.length)
    windows = texts.token_windows(text.evaluation, tokenizer, arguments.windows, arguments.length)

    recipe = micromix.calibrate(model, calibration.split(1))
    print(f"{len(recipe.linears)} linears, {recipe.bits_text}")

    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    before, after = evaluate(model, windows), evaluate(fast, windows, model)
    print(f"perplexity {before.perplexity:.3f}, quantized {after.perplexity:.3f}, divergence {after.kl:.2e} nats")

    micromix.quantize_(model, recipe)  # in place; the original weights are gone
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    same = all(torch.equal(a, b) for a, b in zip(model.buffers(), loaded.buffers(), strict=True))
    print(f"loaded as it was saved: {same}")


if __name__ == "__main__":
    main()

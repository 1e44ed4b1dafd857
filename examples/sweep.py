"""What bits buy: one calibration, split again for every budget; divergence from the model at each.

python examples/sweep.py [--bits 4.5 5 5.5 6]
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import replace

import torch

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.perplexity import evaluate


def main() -> None:
    """A line for each budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--windows", type=int, default=4, help="of calibration and of evaluation")
    parser.add_argument("--length", type=int, default=512, help="tokens of a window")
    parser.add_argument("--bits", type=float, nargs="+", default=(4.5, 5.0, 5.5, 6.0))
    arguments = parser.parse_args()
    model, tokenizer = zoo.load_model(arguments.model, torch.float32)
    text = texts.load_texts()
    calibration = texts.token_windows(text.calibration, tokenizer, arguments.windows, arguments.length)
    windows = texts.token_windows(text.evaluation, tokenizer, arguments.windows, arguments.length)

    # Weights that are rounded while calibrating belong to one split; these are rounded to nearest when they are packed.
    config = micromix.MicroMixConfig(weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, calibration.split(1), config)
    print("element bits  stored bits  perplexity  divergence")
    for bits in arguments.bits:
        split = micromix.assign(recipe, replace(recipe.config, target_bits=bits))
        packed = micromix.quantize_(copy.deepcopy(model), split)
        found = evaluate(packed, windows, model)
        print(f"{split.element_bits:12.2f}  {split.stored_bits:11.2f}  {found.perplexity:10.3f}  {found.kl:10.2e}")


if __name__ == "__main__":
    main()

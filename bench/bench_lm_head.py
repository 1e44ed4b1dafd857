"""What packing the head costs: perplexity and divergence of a language model with its head packed, and without.

python bench/bench_lm_head.py --windows 12 --json results.json
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

import micromix_compile as micromix
from micromix_compile.config import DEFAULT_SKIP
from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.evaluation.texts import load_texts, token_windows
from micromix_compile.evaluation.zoo import DEFAULT_MODEL, load_model

WITH_HEAD = tuple(pattern for pattern in DEFAULT_SKIP if pattern != "*lm_head")


def main() -> None:
    """Print a row for each policy, with and without the head."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--policies", nargs="+", default=["mxfp8", "mxfp8-anchor", "budget"])
    parser.add_argument("--weight-rounding", default="guided")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    model, tokenizer = load_model(given.model, torch.float32)
    texts = load_texts("wiki")
    calibration = token_windows(texts.calibration, tokenizer, count=given.calibration_windows, length=512)
    windows = token_windows(texts.evaluation, tokenizer, count=given.windows, length=512)
    rows: list[dict[str, Any]] = []
    for policy in given.policies:
        for head, skip in ((False, DEFAULT_SKIP), (True, WITH_HEAD)):
            config = micromix.MicroMixConfig(
                policy=policy, skip=skip, weight_rounding=given.weight_rounding,
                scale_search=given.weight_rounding != "nearest",
            )  # fmt: skip
            recipe = micromix.calibrate(model, calibration.split(1), config)
            packed = micromix.quantize_(copy.deepcopy(model), recipe)
            found = dataclasses.asdict(evaluate(packed, windows, model))
            bits = {"element_bits": recipe.element_bits, "model_bits": recipe.model_bits}
            rows.append({"policy": policy, "head": head, **bits, **found, "threads": torch.get_num_threads()})
            print(json.dumps(rows[-1]), flush=True)
    if given.json is not None:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()

"""How long the first call takes on the default model: with cold caches, then in a new process with warm ones.

python bench/bench_compile.py [--prompt 512]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo


def first_call(recipe: str, prompt: int) -> None:
    """Print the seconds of the first call of the compiled model; packing the weights is part of it."""
    model, tokenizer = zoo.load_model(dtype=torch.bfloat16, progress=False)
    ids = texts.token_windows(texts.load_texts().calibration, tokenizer, 1, prompt)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})
    start = time.perf_counter()
    with torch.no_grad():
        fast(input_ids=ids, use_cache=False)
    print(f"{time.perf_counter() - start:.1f}")


def main() -> None:
    """Calibrate, then start two processes that share one fresh cache directory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--recipe", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.recipe:
        first_call(arguments.recipe, arguments.prompt)
        return
    model, tokenizer = zoo.load_model(dtype=torch.bfloat16)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 4)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = Path(scratch) / "recipe.safetensors"
        micromix.calibrate(model, [{"input_ids": w[None], "use_cache": False} for w in windows]).save(recipe)
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(Path(scratch) / "inductor")}
        for name in ("cold", "warm"):
            command = [sys.executable, __file__, "--recipe", str(recipe), "--prompt", str(arguments.prompt)]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
            print(f"{name}: {done.stdout.strip()} s, torch {torch.__version__}, {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()

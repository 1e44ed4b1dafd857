"""Memory that loading takes on a CPU: a plain checkpoint, a packed one, and a plain one that is quantized meanwhile.

    python bench/bench_loading.py [--model DIRECTORY]

Each is loaded in a process of its own, in bfloat16. Peak is the most anonymous memory (RssAnon) while from_pretrained
runs, beyond what the process had before; files that are mapped do not count. It is looked at every two milliseconds.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any, Final

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo

STATUS: Final = Path("/proc/self/status")
CASES: Final = ("plain", "packed", "quantized while loading")


def anonymous_bytes() -> int:
    """Of this process."""
    found = re.search(r"RssAnon:\s+(\d+) kB", STATUS.read_text("utf-8"))
    assert found is not None, "Linux says so"
    return 1024 * int(found[1])


def load(case: str, folder: Path) -> Any:
    """The model of a case."""
    if case == "packed":
        return AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.bfloat16)
    given = {} if case == "plain" else {"quantization_config": micromix.MicroMixQuantConfig(folder / "recipe")}
    return AutoModelForCausalLM.from_pretrained(folder / "plain", dtype=torch.bfloat16, **given)


def measure(case: str, folder: Path) -> dict[str, int]:
    """Bytes of the model that is loaded, and of the peak."""
    load(case, folder)  # once before: libraries, threads, compiled kernels
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.002):
            peak = max(peak, anonymous_bytes() - before)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load(case, folder)
    done.set()
    watcher.join()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in model.state_dict().values()}
    return {"model": sum(storages.values()), "peak": peak}


def prepare(model_name: str, folder: Path) -> None:
    """The model in bfloat16, a recipe without rounded weights, and the packed model."""
    model, tokenizer = zoo.load_model(model_name, torch.bfloat16, progress=False)
    model.save_pretrained(folder / "plain")
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 4, 128)
    nearest = micromix.MicroMixConfig(weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, windows.split(1), nearest, progress=False)
    recipe.save(folder / "recipe")
    micromix.quantize_(model, recipe).save_pretrained(folder / "packed")


def main() -> None:
    """A row a case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(arguments.worker[0], Path(arguments.worker[1]))))
        return
    table = Table("loaded", "model, MB", "peak, MB", "peak of model")
    with tempfile.TemporaryDirectory() as name:
        prepare(arguments.model, Path(name))
        for case in CASES:
            command = [sys.executable, __file__, "--worker", case, name]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            row = json.loads(done.stdout.splitlines()[-1])
            sizes = (f"{row[key] / 1e6:.1f}" for key in ("model", "peak"))
            table.add_row(case, *sizes, f"{row['peak'] / row['model']:.2f}")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()

"""Whole-model times and memory on a CPU: torch.compile in BF16 against MicroMix, in one process, as medians.

    python bench/bench_cpu.py [--json FILE] [--repeats 15] [--prompt 512]

Three things are measured on the default model: prefill of --prompt tokens, decode of one token with a static cache of
1,024, and the bytes that the linears hold. The packed model is checked against eager first: nothing wrong is timed.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import logging
import statistics
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import torch
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.targets import cpu

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

CACHE_LENGTH = 1024
TIMED = micromix.MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False)
"""How weights were rounded does not matter to times; thresholds keep the splits of earlier measurements."""


def quantiles(samples: list[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds."""
    cuts = statistics.quantiles(samples, n=5)
    return {"median": 1e3 * statistics.median(samples), "p20": 1e3 * cuts[0], "p80": 1e3 * cuts[3]}


def time_side_by_side(runs: dict[str, Callable[[], object]], repeats: int) -> dict[str, dict[str, float]]:
    """Time the runs in turns, so that a slow moment of the machine hits all of them."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            samples[name].append(time.perf_counter() - start)
    return {name: quantiles(times) for name, times in samples.items()}


class Decoder:
    """One decoding step at a time, over a static cache that is filled once."""

    def __init__(self, compiled: Callable[..., Any], model: nn.Module, prompt: Tensor) -> None:
        self._compiled = compiled
        self._cache = StaticCache(config=model.config, max_cache_len=CACHE_LENGTH)
        self._step = prompt[:, -1:]
        compiled(prompt, past_key_values=self._cache, cache_position=torch.arange(prompt.shape[1]))
        self._position = prompt.shape[1]

    def __call__(self) -> Tensor:
        """The logits of one more token."""
        position = torch.tensor([self._position])
        self._position = min(self._position + 1, CACHE_LENGTH - 1)
        logits: Tensor = self._compiled(self._step, past_key_values=self._cache, cache_position=position).logits
        return logits


def check(model: nn.Module, compiled: Callable[..., Any], prompt: Tensor) -> float:
    """Mean difference of compiled from eager logits, as a share of their range; ends the run if it is large.

    An ulp of a norm or an activation may move an MX code and so a logit by a percent; a wrong weight, order or scale
    moves all of them by a tenth or more.
    """
    if not cpu.load():
        raise SystemExit(f"no compiled CPU kernels: {cpu.status().reason}")
    expected, actual = (run(prompt, use_cache=False).logits.float() for run in (model, compiled))
    off = float((actual - expected).abs().mean() / (expected.max() - expected.min()))
    if off > 0.02:
        raise SystemExit(f"compiled logits are off by {off:.3f} of their range: nothing to time")
    return off


def memory_of_linears(model: nn.Module, recipe: micromix.Recipe) -> dict[str, float]:
    """Bytes that the packed modules really hold, against stored bits x parameters / 8."""
    storages = {
        tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes()
        for module in model.modules()
        if isinstance(module, micromix.MicroMixLinear)
        for tensor in (*module.buffers(), *module.parameters())
    }
    promised = recipe.stored_bits * recipe.parameters / 8
    held = sum(storages.values())
    return {
        "held_bytes": held,
        "promised_bytes": promised,
        "ratio": held / promised,
        "bf16_bytes": 2 * recipe.parameters,
    }


def resident_bytes() -> int:
    """Memory of this process that is in RAM."""
    gc.collect()
    return int(psutil.Process().memory_info().rss)


def main() -> None:
    """Run it all and print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--prompt", type=int, default=512)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)

    model, tokenizer = zoo.load_model(dtype=torch.bfloat16)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 8)
    batches = [{"input_ids": w[None], "use_cache": False} for w in windows]
    recipe = micromix.calibrate(model, batches, TIMED)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    prompt = windows[:1, : arguments.prompt]
    results: dict[str, Any] = {"memory": memory_of_linears(packed, recipe)}
    with torch.no_grad():
        compiled: dict[str, Callable[..., Any]] = {}
        models = {"bf16": model, "micromix": packed}
        for name, backend in (("bf16", "inductor"), ("micromix", "micromix")):
            compiled[name] = torch.compile(models[name], backend=backend)
            start = time.perf_counter()
            compiled[name](prompt, use_cache=False)
            results[f"compile_s_{name}"] = time.perf_counter() - start
        results["logits_off"] = {name: check(m, compiled[name], prompt) for name, m in models.items()}
        prefill = {name: (lambda f=f: f(prompt, use_cache=False)) for name, f in compiled.items()}
        results["prefill_ms"] = time_side_by_side(prefill, arguments.repeats)
        decoders = {name: Decoder(compiled[name], models[name], prompt) for name in models}
        results["decode_ms"] = time_side_by_side(decoders, 2 * arguments.repeats)
    before = resident_bytes()
    del model, models, compiled, decoders, prefill
    results["memory"]["resident_freed_by_dropping_bf16"] = before - resident_bytes()
    report(results, arguments.prompt)
    if arguments.json:
        document = {"versions": versions(), "hardware": hardware(), "isa": cpu.status().isa, **results}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")


def report(results: dict[str, Any], prompt: int) -> None:
    """Print times with their ratios, and memory."""
    table = Table(title=f"CPU, {torch.get_num_threads()} threads, {cpu.status().isa}, torch {torch.__version__}")
    for column in ("", "BF16", "MicroMix", "ratio"):
        table.add_column(column, justify="right")
    for key, label in (("prefill_ms", f"prefill {prompt} tokens, ms"), ("decode_ms", "decode 1 token, ms")):
        bf16, mixed = (results[key][name]["median"] for name in ("bf16", "micromix"))
        table.add_row(label, f"{bf16:.1f}", f"{mixed:.1f}", f"{mixed / bf16:.2f}")
    memory = results["memory"]
    mib = 2**20
    held, promised = memory["held_bytes"], memory["promised_bytes"]
    table.add_row(
        "linears, MiB", f"{memory['bf16_bytes'] / mib:.1f}", f"{held / mib:.1f}", f"{held / memory['bf16_bytes']:.2f}"
    )
    table.add_row("linears, held / promised", "", f"{held / promised:.3f}", "")
    table.add_row("compile, s", f"{results['compile_s_bf16']:.0f}", f"{results['compile_s_micromix']:.0f}", "")
    Console(width=None if sys.stdout.isatty() else 160).print(table)


if __name__ == "__main__":
    main()

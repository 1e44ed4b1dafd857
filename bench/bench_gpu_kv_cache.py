"""A decoding step with transformers' BF16 static cache and with ours, on a GPU: its time, memory, and launches.

    python bench/bench_gpu_kv_cache.py [--layers 8] [--context 2048 8192] [--batch 1 16 64] [--attention sdpa eager]
                                       [--json FILE]

A model of Llama-3.1-8B's shape with random weights in bfloat16, compiled by Inductor with CUDA graphs; a cache as long
as the context, all of which attention reads, whatever is in it. Milliseconds are of a step of `layers` layers, the head
included, queued behind others. "read" is what a copy's bandwidth would take for the bytes of keys and values.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from launch_counts import launches
from llama_8b import CUDA, first_call, median_ms, random_llama_8b
from rich.console import Console
from rich.table import Table
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.numerics.kv_cache import CACHE_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable

STEPS = 16
"""Of each measurement."""

ROOM = 128
"""Places that are left at the end of the cache, for all steps of all measurements."""


def caches_of(config: Any) -> dict[str, Callable[[int], Any]]:
    """By name, what makes a cache of so many tokens."""
    quantized = {name: partial(micromix.QuantizedStaticCache, config, cache_format=name) for name in CACHE_FORMATS}
    return {"bf16": partial(StaticCache, config), **quantized}


def prepared(make: Callable[[int], Any], config: Any, context: int, batch: int) -> Any:
    """A cache with its memory, of zeros, that has room for `ROOM` tokens more."""
    cache = make(max_cache_len=context)
    head_dim = config.hidden_size // config.num_attention_heads
    cache.early_initialization(batch, config.num_key_value_heads, head_dim, torch.bfloat16, CUDA)
    for layer in cache.layers:
        layer.cumulative_length.fill_(context - ROOM)
    return cache


def bytes_of(cache: Any) -> int:
    """Of keys and values, scales included."""
    names = ("keys", "values", "key_scale", "value_scale")
    return sum(getattr(layer, name).nbytes for layer in cache.layers for name in names if hasattr(layer, name))


def bytes_per_second() -> float:
    """Of a copy, both ways counted."""
    source = torch.empty(2**30, dtype=torch.uint8, device=CUDA)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.nbytes / median_ms(lambda: target.copy_(source), 10) * 1e3


def step_of(model: Any, cache: Any, context: int, batch: int) -> Callable[[], None]:
    """One token for each sequence."""
    fast = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    token = torch.randint(0, 1000, (batch, 1), device=CUDA)
    position = torch.full((batch, 1), context - ROOM, device=CUDA)

    def step() -> None:
        fast(token, past_key_values=cache, position_ids=position, logits_to_keep=1)

    return step


def measure(model: Any, make: Callable[[int], Any], context: int, batch: int) -> dict[str, Any]:
    """Of one cache."""
    torch.compiler.reset()
    cache = prepared(make, model.config, context, batch)
    held = bytes_of(cache)
    step = step_of(model, cache, context, batch)
    seconds = first_call(step)
    for _ in range(3):  # records
        step()
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(lambda: [step() for _ in range(STEPS)], 5) / STEPS
    counts, busy = launches(step)
    return {
        "ms": ms, "cache_bytes": held, "peak_bytes": torch.cuda.max_memory_allocated(), "first_call_s": seconds,
        "launches": dict(counts), "gpu_ms": busy,
    }  # fmt: skip


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--context", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--attention", nargs="+", default=["sdpa", "eager"])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model, rate = random_llama_8b(options.layers), bytes_per_second()
    makers, rows = caches_of(model.config), []
    table = Table(
        "attention", "context", "sequences", "cache", "MB of it", "read, ms", "step, ms", "times as fast as bf16"
    )
    cases = [(a, c, b) for a in options.attention for c in options.context for b in options.batch]
    for attention, context, batch in cases:
        model.set_attn_implementation(attention)
        baseline = 0.0
        for name, make in makers.items():
            with torch.no_grad():
                found = measure(model, make, context, batch)
            baseline = baseline or found["ms"]
            rows.append({"attention": attention, "context": context, "batch": batch, "cache": name, **found})
            print(json.dumps(rows[-1]), flush=True)
            size, ms = found["cache_bytes"], found["ms"]
            cells = (f"{size / 1e6:.0f}", f"{1e3 * size / rate:.3f}", f"{ms:.3f}", f"{baseline / ms:.2f}")
            table.add_row(attention, str(context), str(batch), name, *cells)
    Console(width=120).print(table)
    about = {"command": sys.argv[1:], "versions": versions(), "hardware": hardware(), "bytes_per_second": rate}
    print(about)
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()

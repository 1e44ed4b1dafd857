"""Accuracy of a model that reads its context from a cache of 8-bit bytes, beside the same model with a BF16 cache.

    python bench/bench_kv_accuracy.py [--length 2048] [--steps 64] [--windows 12] [--dtype bfloat16] [--json FILE]
    python bench/bench_kv_accuracy.py --chunk 256 --recent 0

Each window goes through the default model with an empty static cache as generation takes it: a prompt of all but the
last `steps` tokens at once, then a token a step, each of which reads the whole context from the cache. Figures are of
the steps. Divergence (KL, in nats) is from the same model with transformers' own StaticCache, fed in the same way.

With --chunk all tokens come so many at a time, and figures are of all of them: what a prompt in parts costs, for a part
reads those before it from bytes.

The last row is the reference with all its tokens at once: what bfloat16's rounding does in another order of operations.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import kl_div
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.integrations.kv_cache import RECENT
from micromix_compile.numerics.kv_cache import CACHE_FORMATS
from micromix_compile.progress import track

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

REFERENCE = "as the model"
AT_ONCE = f"{REFERENCE}, all tokens at once"


def caches_of(config: Any, recent: int) -> dict[str, Callable[[int], Any]]:
    """By name, what makes an empty cache of so many tokens."""
    make = partial(micromix.QuantizedStaticCache, config, recent=recent)
    quantized = {name: partial(make, cache_format=name) for name in CACHE_FORMATS}
    return {REFERENCE: partial(StaticCache, config), **quantized, AT_ONCE: partial(StaticCache, config)}


def bytes_of_a_token(cache: Any) -> int:
    """Of keys and values of all layers of a cache for one sequence, without its recent tokens."""
    names = ("keys", "values", "key_scale", "value_scale")
    parts = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return sum(part.nbytes for part in parts if part is not None) // cache.layers[0].max_cache_len


def log_probabilities(model: Any, cache: Any, tokens: Tensor, sizes: Sequence[int], count: int) -> Tensor:
    """(count, V) float32 of the last tokens of (1, T), that come `sizes` at a time."""
    parts = tokens.split(list(sizes), dim=1)
    logits = [
        model(input_ids=part, past_key_values=cache, logits_to_keep=min(part.shape[1], count)).logits for part in parts
    ]
    return torch.cat(logits, dim=1)[0, -count:].float().log_softmax(-1)


def measure(model: Any, windows: Tensor, sizes: Sequence[int], count: int, recent: int) -> list[dict[str, Any]]:
    """A row for each cache: means over the last `count` of the tokens of each window (W, T + 1)."""
    makers = caches_of(model.config, recent)
    sums = {name: torch.zeros(4, dtype=torch.float64) for name in makers}
    sizes_of_a_token = {}
    for window in track(windows.split(1), "windows"):
        tokens, targets = window[:, :-1], window[0, -count:]
        expected: Tensor | None = None
        for name, make in makers.items():
            cache = make(max_cache_len=tokens.shape[1])
            log_q = log_probabilities(model, cache, tokens, [tokens.shape[1]] if name == AT_ONCE else sizes, count)
            expected = log_q if expected is None else expected
            kl = kl_div(log_q, expected, reduction="none", log_target=True).sum(-1).double()
            agreed = (log_q.argmax(-1) == expected.argmax(-1)).double()
            nll = -log_q.gather(1, targets[:, None])[:, 0].double()
            sums[name] += torch.stack([one.sum() for one in (nll, kl, agreed, kl.square())]).cpu()
            sizes_of_a_token[name] = bytes_of_a_token(cache)
            print(name, f"KL {kl.mean():.5f} in this window", file=sys.stderr, flush=True)
    predictions = len(windows) * count
    return [
        {
            "cache": name,
            "bytes_of_a_token": sizes_of_a_token[name],
            "perplexity": math.exp(nll),
            "kl": kl,
            "kl_standard_error": math.sqrt(max(squares - kl * kl, 0.0) / predictions),
            "top1": top1,
        }
        for name, total in sums.items()
        for nll, kl, top1, squares in [(total / predictions).tolist()]
    ]


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=64)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--chunk", type=int)
    parser.add_argument("--recent", type=int, default=RECENT)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    length, steps, chunk = options.length, options.steps, options.chunk
    model, tokenizer = zoo.load_model(dtype=getattr(torch, options.dtype), device=options.device)
    windows = texts.token_windows(texts.load_texts().evaluation, tokenizer, options.windows, length + 1)
    sizes = [length - steps] + [1] * steps
    if chunk:
        sizes = [chunk] * (length // chunk) + [length % chunk] * bool(length % chunk)
    with torch.inference_mode():
        rows = measure(model, windows.to(options.device), sizes, length if chunk else steps, options.recent)
    table = Table("cache", "bytes of a token", "perplexity", "KL", "top-1")
    for row in rows:
        kl = f"{row['kl']:.5f} ± {row['kl_standard_error']:.5f}"
        table.add_row(
            row["cache"], f"{row['bytes_of_a_token']:,}", f"{row['perplexity']:.3f}", kl, f"{row['top1']:.4f}"
        )
    about = {"command": sys.argv[1:], "versions": versions(), "hardware": hardware()}
    Console().print(table)
    print(about)
    if options.json:
        options.json.write_text(json.dumps({**about, "rows": rows}, indent=1), "utf-8")


if __name__ == "__main__":
    main()

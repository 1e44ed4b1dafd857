"""Four ways to choose formats at equal stored bits: accuracy on the default model, bytes, and time on a GPU.

    python bench/bench_gpu_linear.py --shares --csv shares.csv    on the GPU
    python bench/bench_policies.py [--shares shares.csv] [--windows 12] [--csv FILE]

One format for all channels, the same counts in every layer, calibrated thresholds (MicroMix, Eq. 6), and the budget,
which spends stored bytes or tensor-core time where it predicts most for it. The same counts are the budget's on
average, so that the difference is where they are spent. All round weights and activations to nearest, for the policies
alone to differ. Times are a layer's four linears of Llama-3.1-8B's shape, interpolated between measured ones of a
single format: up to 5 % too low where formats are mixed. Thresholds are those of the nearest of seven lambdas.
"""

from __future__ import annotations

import argparse
import copy
import csv
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_accuracy import ANCHOR, PLAIN, CachedLogits, measure, write_csv
from rich.console import Console
from rich.table import Table
from shares import Shares, with_shares

import micromix_compile as micromix
from micromix_compile.calibration.assignment import assign
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions

if TYPE_CHECKING:
    from collections.abc import Iterator

LAMBDAS = (0.125, 0.177, 0.25, 0.354, 0.5, 0.707, 1.0)
UNIFORM = ("100/0/0", "0/100/0", "0/0/100")


def shares_of(recipe: micromix.Recipe) -> Shares:
    """Of all weights, how many are in each format."""
    counts = [0.0, 0.0, 0.0]
    for linear in recipe.linears.values():
        for i, k in enumerate(linear.group.split):
            counts[i] += k * linear.out_features
    four, six, eight = (count / sum(counts) for count in counts)
    return four, six, eight


def budget(recipe: micromix.Recipe, kind: str, stored_bits: float) -> micromix.Recipe:
    """The budget of a kind that stores at most so many bits a weight."""
    low, high = 4.0, 9.0
    for _ in range(20):
        middle = (low + high) / 2
        try:
            fits = assign(recipe, replace(PLAIN, target_kind=kind, target_bits=middle)).stored_bits <= stored_bits
        except ValueError:  # less than the smallest formats take
            fits = True
        low, high = (middle, high) if fits else (low, middle)
    return assign(recipe, replace(PLAIN, target_kind=kind, target_bits=low))


def recipes(loaded: zoo.LoadedModel) -> Iterator[tuple[str, float, micromix.Recipe]]:
    """(policy, level, recipe): at the bits that thresholds store, and at those of uniform MXFP6."""
    tokens = texts.token_windows(texts.load_texts().calibration, loaded.tokenizer, 32)
    thresholds = {lam: replace(ANCHOR, lam=lam) for lam in LAMBDAS}
    uniform = replace(PLAIN, policy="mxfp6")
    made = list(micromix.calibrate_each(loaded.model, tokens.split(1), [PLAIN, *thresholds.values(), uniform]))
    by_budget, by_threshold, sixes = made[0], dict(zip(thresholds, made[1:-1], strict=True)), made[-1]
    for level, one_format in ((by_threshold[1.0].stored_bits, None), (sixes.stored_bits, sixes)):
        lam = min(LAMBDAS, key=lambda lam: abs(by_threshold[lam].stored_bits - level))
        by_bytes = budget(by_budget, "stored", level)
        if one_format is not None:
            yield "one format (E2M3)", level, one_format
        yield "the same counts everywhere", level, with_shares(by_bytes, shares_of(by_bytes))
        yield f"thresholds (lam {lam:g})", level, by_threshold[lam]
        yield "budget of tensor-core time", level, budget(by_budget, "time", level)
        yield "budget of bytes", level, by_bytes


def times_of_formats(path: Path) -> dict[int, list[float]]:
    """By M, microseconds of a layer in MXFP4, MXFP6 and MXFP8 alone. Raises KeyError for a split that is not there."""
    found: dict[int, dict[str, float]] = defaultdict(dict)
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["what"] == "linear" and row["case"].startswith("llama-8b "):
                of_m = found[int(row["M"])]
                of_m[row["split"]] = of_m.get(row["split"], 0.0) + float(row["us"])
    return {m: [of_m[name] for name in UNIFORM] for m, of_m in found.items()}


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--shares", type=Path, help="of bench_gpu_linear.py --shares --csv")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    times = times_of_formats(arguments.shares) if arguments.shares else {}
    loaded = zoo.load_model(dtype=torch.float32)
    windows = texts.token_windows(texts.load_texts().evaluation, loaded.tokenizer, arguments.windows)
    exact, results = CachedLogits(loaded.model), []
    for policy, level, recipe in recipes(loaded):
        found = measure(micromix.quantize_(copy.deepcopy(loaded.model), recipe), windows, exact)
        shares = shares_of(recipe)
        result: dict[str, Any] = {
            "policy": policy,
            "level": round(level, 2),
            "stored_bits": round(recipe.stored_bits, 3),
            "stored_mib": round(recipe.stored_bytes / 2**20, 1),
            "split": "/".join(f"{100 * share:.0f}" for share in shares),
            "perplexity": round(found["perplexity"], 2),
            "kl": round(found["kl"], 4),
        }
        for m, of_formats in times.items():
            result[f"us, M={m}"] = round(sum(share * us for share, us in zip(shares, of_formats, strict=True)), 1)
        results.append(result)
        print(result, flush=True)
        if arguments.csv:
            write_csv(results, arguments.csv)
    table = Table(title=f"{arguments.windows} windows; {versions()}; {hardware()}", title_justify="left")
    for key in results[0]:
        table.add_column(key)
    for result in results:
        table.add_row(*map(str, result.values()))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()

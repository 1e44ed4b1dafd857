"""Accuracy against bits on the default model: policies, roundings, shards, calibration texts and sizes, seeds.

    python bench/bench_accuracy.py [--studies table curve ...] [--rows NAME ...] [--seeds 0 ...] [--windows 12]
                                   [--device cuda] [--csv FILE] [--plot FILE]

Every row is a packed model (the bytes that run), compared window by window with the unquantized one in float32. The
evaluation text is never calibrated on. One calibration serves all rows that differ in options only.
"""

from __future__ import annotations

import argparse
import copy
import csv
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.evaluation.sqnr import linear_sqnr

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from torch import Tensor, nn

Config = micromix.MicroMixConfig
BEST = Config(activations="same", rotate="none", weight_rounding="gptq")  # but for what the study "activations" has
PLAIN = replace(BEST, weight_rounding="nearest", scale_search=False, scale_rounding="rceil", uniform_order="model")
ANCHOR = replace(PLAIN, policy="mxfp8-anchor")
AUTHORS = replace(ANCHOR, fp6="e3m2", granularity=128)

TABLE = {
    "mxfp8": replace(PLAIN, policy="mxfp8"),
    "mxfp6 e2m3": replace(PLAIN, policy="mxfp6"),
    "mxfp6 e3m2": replace(PLAIN, policy="mxfp6", fp6="e3m2"),
    "mxfp4": replace(PLAIN, policy="mxfp4"),
    "paper": replace(AUTHORS, policy="paper"),
    "released": replace(AUTHORS, policy="released"),
    "mxfp8-anchor": AUTHORS,
    "mxfp8-anchor, e2m3, granularity 32": ANCHOR,
    "mxfp8-anchor, W4": replace(AUTHORS, weights="mxfp4"),
    "budget 5.48": replace(BEST, target_bits=5.48),
    "budget 5.0": replace(BEST, target_bits=5.0),
    "budget 4.5": replace(BEST, target_bits=4.5),
    "budget 5.48, W4": replace(BEST, target_bits=5.48, weights="mxfp4"),
    "mxfp8, better rounding": replace(BEST, policy="mxfp8"),
    "mxfp6 e2m3, better rounding": replace(BEST, policy="mxfp6"),
    "mxfp4, better rounding": replace(BEST, policy="mxfp4"),
}
CURVE = {
    **{f"budget {bits}": replace(PLAIN, target_bits=bits) for bits in (4.25, 4.5, 5.0, 5.5, 6.0, 7.0)},
    **{f"budget+gptq {bits}": replace(BEST, target_bits=bits) for bits in (4.25, 4.5, 5.0, 5.5, 6.0, 7.0)},
    **{f"mxfp8-anchor lam={lam}": replace(AUTHORS, lam=lam) for lam in (0.25, 0.5, 1.0, 2.0)},
}
ABLATION = {
    f"{label} {bits}": replace(config, target_bits=bits)
    for bits in (5.48, 5.0, 4.5)
    for label, config in {
        "budget": PLAIN,
        "budget e3m2": replace(PLAIN, fp6="e3m2"),
        "budget, granularity 128": replace(PLAIN, granularity=128),
        "budget+fit": replace(PLAIN, scale_rounding="fit"),
        "budget+search": replace(PLAIN, scale_search=True),
        "budget+gptq": replace(PLAIN, weight_rounding="gptq"),
        "budget+gptq+search": replace(BEST, scale_rounding="rceil"),
        "budget+gptq+search+fit": BEST,
    }.items()
} | {
    "mxfp6, fit": replace(PLAIN, policy="mxfp6", scale_rounding="fit"),
    "mxfp6, sheltered": replace(PLAIN, policy="mxfp6", uniform_order="sheltered"),
    "mxfp4, fit": replace(PLAIN, policy="mxfp4", scale_rounding="fit"),
    "mxfp4, sheltered": replace(PLAIN, policy="mxfp4", uniform_order="sheltered"),
    "mxfp8-anchor+all": replace(BEST, policy="mxfp8-anchor", fp6="e3m2", granularity=128),
    "mxfp8-anchor e2m3/32+all": replace(BEST, policy="mxfp8-anchor"),
}
WEIGHTS = {
    **{f"budget {bits}": Config(target_bits=bits) for bits in (5.48, 5.0, 4.5)},
    "mxfp4": Config(policy="mxfp4"),
}
ACTIVATIONS = {
    f"{name}, activations {activations}, rotate {rotate}": replace(config, activations=activations, rotate=rotate)
    for name, config in WEIGHTS.items()
    for activations in ("fp8", "same", "mxfp6")
    for rotate in ("none", "auto", "all")
}
# 576 channels go into o_proj, which 4 or 8 shards of whole blocks do not divide: then down_proj's 1,536 alone are cut.
CUT = {("*o_proj", "*down_proj"): (1, 2, 6), ("*down_proj",): (2, 4, 8)}
SHARDS = {
    f"budget {bits}, shards {shards} of {' '.join(names)}": Config(target_bits=bits, shards=shards, row_parallel=names)
    for bits in (5.48, 4.5)
    for names, counts in CUT.items()
    for shards in counts
}
KEY = {name: TABLE[name] for name in ("budget 5.48", "budget 4.5")}


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """One calibration and the rows that are made from it."""

    study: str
    rows: Mapping[str, micromix.MicroMixConfig]
    data: str = texts.DEFAULT_DATA
    samples: int = 32
    seed: int = 0
    offset: int = 0


# The table has the rows of 32 samples and seed 0.
STUDIES: dict[str, list[Calibration]] = {
    "table": [Calibration(study="table", rows=TABLE)],
    "curve": [Calibration(study="curve", rows=CURVE)],
    "ablation": [Calibration(study="ablation", rows=ABLATION)],
    "activations": [
        Calibration(study="activations", rows=ACTIVATIONS, seed=seed, offset=32 * seed) for seed in (0, 1, 2)
    ],
    "shards": [Calibration(study="shards", rows=SHARDS)],
    "texts": [Calibration(study="texts", rows=KEY, data=data, samples=10) for data in ("wiki", "c4", "technical")],
    "samples": [Calibration(study="samples", rows=KEY, samples=samples) for samples in (8, 128)],
    "seeds": [Calibration(study="seeds", rows=KEY, seed=seed, offset=32 * seed) for seed in (1, 2, 3)],
}


class CachedLogits:
    """The unquantized model, run once per window; float16 keeps its divergence from itself under 1e-4."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._logits: dict[bytes, Tensor] = {}

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> Any:
        """An output with `logits`."""
        key = input_ids.cpu().numpy().tobytes()
        if key not in self._logits:
            self._logits[key] = self._model(input_ids=input_ids, use_cache=use_cache).logits.half()
        return SimpleNamespace(logits=self._logits[key])


def measure(model: Any, windows: Tensor, reference: Any) -> dict[str, Any]:
    """Perplexity, KL and agreement over all windows, and the loss per window."""
    each = [evaluate(model, window, reference, progress=False) for window in windows.split(1)]
    losses = [math.log(one.perplexity) for one in each]
    return {
        "perplexity": math.exp(statistics.fmean(losses)),
        "kl": statistics.fmean(one.kl or 0.0 for one in each),
        "top1": statistics.fmean(one.top1 or 0.0 for one in each),
        "losses": losses,
    }


def standard_error(losses: list[float], exact: list[float]) -> float:
    """Of the mean loss above full precision, over windows."""
    over = [a - b for a, b in zip(losses, exact, strict=True)]
    return statistics.stdev(over) / math.sqrt(len(over)) if len(over) > 1 else math.nan


def run(
    calibration: Calibration, loaded: zoo.LoadedModel, windows: Tensor, exact: CachedLogits
) -> Iterator[dict[str, Any]]:
    """One result per row."""
    text = texts.load_texts(calibration.data)
    wanted = calibration.offset + calibration.samples
    tokens = texts.token_windows(text.calibration, loaded.tokenizer, wanted)[calibration.offset :].to(windows.device)
    configs = [replace(config, seed=calibration.seed) for config in calibration.rows.values()]
    model: nn.Module = loaded.model
    full = measure(exact, windows, None)
    start = time.perf_counter()
    recipes = micromix.calibrate_each(model, tokens.split(1), configs)
    for name in calibration.rows:
        recipe = next(recipes)
        seconds = time.perf_counter() - start
        packed = micromix.quantize_(copy.deepcopy(model), recipe)
        result = measure(packed, windows, exact)
        sqnr = sorted(linear_sqnr(model, packed, tokens[:1]).values())
        yield {
            "study": calibration.study,
            "row": name,
            "data": calibration.data,
            "samples": calibration.samples,
            "seed": calibration.seed,
            "windows": len(windows),
            "element_bits": round(recipe.element_bits, 4),
            "stored_bits": round(recipe.stored_bits, 4),
            "stored_mib": round(recipe.stored_bytes / 2**20, 2),
            "perplexity": round(result["perplexity"], 4),
            "full_perplexity": round(full["perplexity"], 4),
            "loss_se": round(standard_error(result["losses"], full["losses"]), 5),
            "kl": round(result["kl"], 5),
            "top1": round(result["top1"], 4),
            "sqnr_db_min": round(sqnr[0], 2),
            "sqnr_db_median": round(statistics.median(sqnr), 2),
            "seconds": round(seconds, 1),
        }
        start = time.perf_counter()


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Divergence against element bits, a line per kind of row. Needs the extra `bench`."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    kinds: dict[str, list[tuple[float, float]]] = {}
    for result in results:
        if result["study"] in ("curve", "table"):
            kind = result["row"].split(" ")[0].rstrip(",") if result["study"] == "curve" else "one format, others"
            kinds.setdefault(kind, []).append((result["element_bits"], result["kl"]))
    for kind, points in kinds.items():
        style = "o" if kind.startswith("one") else "o-"
        axes.plot(*zip(*sorted(points), strict=True), style, label=kind)
    axes.set(xlabel="bits an element, weighted by multiply-accumulates", ylabel="KL to float32, nats", yscale="log")
    axes.grid(which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    """Run the studies, print one table, write CSV and plot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--studies", nargs="+", choices=list(STUDIES), default=["table"])
    parser.add_argument("--rows", nargs="+", help="only rows whose name begins so")
    parser.add_argument("--seeds", nargs="+", type=int, help="only calibrations of these seeds")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--device", default="cpu", help="where all of it runs, such as cuda")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    loaded = zoo.load_model(dtype=torch.float32, device=arguments.device)
    windows = texts.token_windows(texts.load_texts().evaluation, loaded.tokenizer, arguments.windows)
    windows = windows.to(arguments.device)
    exact, results = CachedLogits(loaded.model), []
    shown = ("row", "data", "samples", "seed", "element_bits", "stored_bits")
    shown += ("perplexity", "loss_se", "kl", "top1")
    for calibration in (calibration for study in arguments.studies for calibration in STUDIES[study]):
        if arguments.seeds and calibration.seed not in arguments.seeds:
            continue
        if arguments.rows:
            kept = {n: c for n, c in calibration.rows.items() if n.startswith(tuple(arguments.rows))}
            calibration = replace(calibration, rows=kept)
        for result in run(calibration, loaded, windows, exact):
            results.append(result)
            print(*(f"{key}={result[key]}" for key in (*shown, "sqnr_db_median", "seconds")), flush=True)
            if arguments.csv:
                write_csv(results, arguments.csv)
    table = Table(title=f"{arguments.windows} windows; {versions()}; {hardware()}", title_justify="left")
    for key in shown:
        table.add_column(key)
    for result in results:
        table.add_row(*(str(result[key]) for key in shown))
    Console(width=None if sys.stdout.isatty() else 150).print(table)
    if arguments.plot:
        plot(results, arguments.plot)


def write_csv(results: list[dict[str, Any]], path: Path) -> None:
    """All that was measured so far."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(results[0]))
        writer.writeheader()
        writer.writerows(results)


if __name__ == "__main__":
    main()

"""What a model keeps of its accuracy in tasks, by bits, beside AutoRound's published layer-wise MXFP4 and MXFP8.

    python bench/bench_recovery.py [--device cuda] [--items 1000] [--bits 4 4.5 5 6] [--batch-size 32] [--csv FILE]

Tasks, rules and average are those of that table (AutoRound's docs/auto_scheme_acc.md): LAMBADA, HellaSwag, PIQA and
Winogrande zero-shot, MMLU by lm-eval's own number of examples. Bits are of elements, without scales, as there. Its
models have 7 to 32 billion parameters and ours 135 million: where it guesses (one in four of MMLU, half of Winogrande)
nothing can be lost. Recovery is the average beside the unquantized model's, and its standard error takes both for
independent samples, which overstates it, for both answer the same questions.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from bench_accuracy import write_csv
from rich.console import Console
from rich.table import Table

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.harness import TaskSettings, compiled_twin, load_harness_task, run_harness_tasks
from micromix_compile.evaluation.machine import hardware, versions

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from micromix_compile.evaluation.types import TaskResult

TASKS = {"lambada_openai": 0, "hellaswag": 0, "piqa": 0, "winogrande": 0, "mmlu": None}
AUTOROUND = {4.0: 93.6, 4.5: 96.2, 5.0: 96.9, 6.0: 98.6}
"""By average bits: percent of the BF16 average that Llama-3.1-8B-Instruct keeps, without tuning."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one model reached. asked: bits of elements. error: the standard error of `average`."""

    name: str
    asked: float
    element_bits: float
    stored_bits: float
    shares: dict[str, float]
    error: float

    @property
    def average(self) -> float:
        """Of all tasks, as shares of right answers."""
        return statistics.fmean(self.shares.values())

    def recovery(self, whole: Row) -> tuple[float, float]:
        """Percent of the unquantized model's average, and its standard error."""
        kept = self.average / whole.average
        error = kept * math.hypot(self.error / self.average, whole.error / whole.average)
        return 100 * kept, 100 * error

    def cells(self, whole: Row) -> dict[str, Any]:
        """As the table and the file have them."""
        kept, error = self.recovery(whole)
        return {
            "row": self.name,
            "element bits": f"{self.element_bits:.2f}",
            "stored bits": f"{self.stored_bits:.2f}",
            **{task: f"{share:.4f}" for task, share in self.shares.items()},
            "average": f"{self.average:.4f}",
            "recovery %": f"{kept:.1f}",
            "standard error": f"{error:.1f}",
            "AutoRound's, Llama-3.1-8B-Instruct": AUTOROUND.get(self.asked, ""),
        }


def config(bits: float, activations: str) -> micromix.MicroMixConfig:
    """MXFP4 alone at 4 bits, the budget above."""
    if bits == 4:
        return micromix.MicroMixConfig(policy="mxfp4", activations=activations)
    return micromix.MicroMixConfig(target_bits=bits, activations=activations)


def reached(name: str, bits: tuple[float, float, float], results: Sequence[TaskResult]) -> Row:
    """A row of what the harness found. bits: asked for, of elements, stored."""
    asked, element_bits, stored_bits = bits
    metrics = {result.task: result.metrics["acc"] for result in results}
    error = math.hypot(*(metric.standard_error or 0.0 for metric in metrics.values())) / len(metrics)
    shares = {task: metric.value for task, metric in metrics.items()}
    return Row(name=name, asked=asked, element_bits=element_bits, stored_bits=stored_bits, shares=shares, error=error)


def measured(arguments: argparse.Namespace) -> Iterator[Row]:
    """The unquantized model, then each number of bits with each format of activations."""
    loaded = zoo.load_model(dtype=torch.bfloat16)
    model = loaded.model.to(arguments.device)
    settings = TaskSettings(items=arguments.items, batch_size=arguments.batch_size, data=arguments.task_data)
    tasks = [load_harness_task(name, loaded.tokenizer, settings, few_shot=shots) for name, shots in TASKS.items()]
    yield reached("bf16", (16, 16, 16), run_harness_tasks(model, tasks))
    tokens = texts.token_windows(texts.load_texts().calibration, loaded.tokenizer, 32).to(arguments.device)
    wanted = [(bits, config(bits, activations)) for activations in ("fp8", "same") for bits in arguments.bits]
    recipes = micromix.calibrate_each(model, tokens.split(1), [one for _, one in wanted])
    for (asked, _), recipe in zip(wanted, recipes, strict=True):
        results = run_harness_tasks(compiled_twin(model, recipe), tasks)
        torch.compiler.reset()
        bits = (asked, recipe.element_bits, recipe.stored_bits)
        yield reached(f"activations {recipe.config.activations}", bits, results)


def main() -> None:
    """Print the table, and write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--items", type=int, default=1000, help="of each task")
    parser.add_argument("--bits", type=float, nargs="+", default=list(AUTOROUND), help="of elements")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--task-data", default="packages")
    parser.add_argument("--csv", type=Path)
    arguments = parser.parse_args()
    rows: list[Row] = []
    for row in measured(arguments):
        rows.append(row)
        print(row.cells(rows[0]), flush=True)
        if arguments.csv:
            write_csv([one.cells(rows[0]) for one in rows], arguments.csv)
    table = Table(title=f"{arguments.items} items of a task; {versions()}; {hardware()}", title_justify="left")
    for key in rows[0].cells(rows[0]):
        table.add_column(key)
    for row in rows:
        table.add_row(*map(str, row.cells(rows[0]).values()))
    Console(width=180).print(table)


if __name__ == "__main__":
    main()

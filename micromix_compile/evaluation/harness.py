"""Tasks of EleutherAI's lm-evaluation-harness on a causal model, a packed or a compiled one too.

The harness is the optional package lm-eval. It fetches a task's data unless they are on this machine.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.evaluation.types import TaskResult

if TYPE_CHECKING:
    from collections.abc import Mapping

    from transformers import PreTrainedTokenizerBase

    from micromix_compile.evaluation.types import LanguageModel

HARNESS_COMMAND: Final = "pip install 'micromix-compile[lm-eval]'"
ACCURACIES: Final = ("acc", "exact_match")
"""The harness's metrics that are a share of right items, in order of preference."""


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task as the harness loaded it, data included. count: only its first items, or None for all."""

    name: str
    task: Any
    tokenizer: PreTrainedTokenizerBase
    count: int | None


def load_harness_task(name: str, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> HarnessTask:
    """The task called `name`.

    name: a task of the harness's own, or the path of a .yaml file that describes one.

    Raises ValueError for another name or a group of tasks, OSError where the data are not on this machine and can't be
    fetched, and ModuleNotFoundError (with the command that helps) without the harness.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(f"lm-eval's task {name} needs a package: {HARNESS_COMMAND}")
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_defaults=not Path(name).is_file())
    try:
        loaded = manager.load([name])
    except KeyError as error:
        raise ValueError(f"lm-eval has no task {name!r}, and it is no .yaml file") from error
    except OSError as error:
        raise OSError(f"the data of lm-eval's task {name} are not on this machine: {error}") from error
    tasks = loaded["tasks"]
    if len(tasks) != 1:
        raise ValueError(
            f"{name} is a group of {len(tasks)} tasks of lm-eval; name them one by one: {', '.join(tasks)}"
        )
    ((own_name, task),) = tasks.items()
    return HarnessTask(own_name, task, tokenizer, count)


def run_harness_task(model: LanguageModel, task: HarnessTask) -> TaskResult:
    """The share of items that `model` gets right, in the harness's own prompts and by its own rules.

    Raises ValueError if the task measures something else than a share.
    """
    importlib.import_module("micromix_compile.integrations.hf")  # the harness reads a packed model's config
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    wrapped: Any = HFLM(pretrained=model, tokenizer=task.tokenizer)
    report = simple_evaluate(wrapped, tasks=[task.task], limit=task.count, bootstrap_iters=0, log_samples=False)
    accuracy = share_of_right_items(task.name, report["results"][task.name])
    return TaskResult(task=task.name, items=report["n-samples"][task.name]["effective"], accuracy=accuracy)


def share_of_right_items(name: str, results: Mapping[str, Any]) -> float:
    """The first of `ACCURACIES` that a task measured, by the first of its filters of answers.

    results: the harness's, with keys "METRIC,FILTER" and others. Raises ValueError if there is none.
    """
    measured: dict[str, Any] = {}
    for key, value in results.items():
        metric, comma, _ = key.partition(",")
        if comma:
            measured.setdefault(metric, value)
    accuracy = next((float(measured[metric]) for metric in ACCURACIES if metric in measured), None)
    if accuracy is None:
        raise ValueError(f"lm-eval's task {name} measures {', '.join(measured)}, none of {', '.join(ACCURACIES)}")
    return accuracy

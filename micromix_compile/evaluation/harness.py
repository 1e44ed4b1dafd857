"""Tasks of EleutherAI's lm-evaluation-harness on a causal model, a packed or a compiled one too.

The harness is the optional package lm-eval. Prompts, examples, generation, filters of answers, metrics and their
standard errors are its own. Where tasks get their data is `task_data`'s business, how programs that a model wrote are
run `code_execution`'s.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.util
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.evaluation import task_data
from micromix_compile.evaluation.code_execution import Limits, replacing_code_eval
from micromix_compile.evaluation.types import Metric, TaskResult

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from transformers import PreTrainedTokenizerBase

    from micromix_compile.evaluation.types import LanguageModel
    from micromix_compile.recipe.types import Recipe

HARNESS_COMMAND: Final = "pip install 'micromix-compile[lm-eval]'"
MAIN_METRICS: Final = ("acc", "exact_match", "pass@1", "pass_at_1", "word_perplexity")
"""The harness's metrics of which a table shows the first that a task has."""

_BOOTSTRAPS: Final = 100
"""Samples for standard errors without a formula (LAMBADA's perplexity); those of shares have one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """How tasks are run.

    items: the first so many items of a task, or None for all; the subjects of a group share them out evenly.
    batch_size: sequences that the model computes at once.
    data: one of `TASK_DATA`, where tasks get their data.
    allow_code_execution: whether tasks may run programs that the model wrote (see `code_execution`).
    """

    items: int | None = None
    batch_size: int = 1
    data: str = "auto"
    allow_code_execution: bool = False


@dataclass(frozen=True, slots=True)
class HarnessTask:
    """A task or a group of tasks as the harness loaded it, data included.

    few_shot: examples before each question, or None for the task's own number.
    """

    name: str
    loaded: Any
    leaves: tuple[str, ...]
    tokenizer: PreTrainedTokenizerBase
    settings: TaskSettings
    few_shot: int | None = None

    @property
    def limit(self) -> int | None:
        """Items of each leaf."""
        items = self.settings.items
        return None if items is None else math.ceil(items / len(self.leaves))


class CodeNotAllowedError(ValueError):
    """A task runs programs that the model wrote, and nobody allowed it."""


def load_harness_task(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: TaskSettings | None = None,
    *,
    few_shot: int | None = None,
) -> HarnessTask:
    """The task or group called `name`.

    name: one of the harness's own, or the path of a .yaml file that describes one.

    Raises ValueError for another name or a tag, CodeNotAllowedError, OSError where the data are not on this machine and
    can't be fetched, and ModuleNotFoundError (with the command that helps) without the harness.
    """
    settings = settings or TaskSettings()
    if importlib.util.find_spec("lm_eval") is None:
        raise ModuleNotFoundError(f"lm-eval's task {name} needs a package: {HARNESS_COMMAND}")
    try:
        with task_data.reading_from(task_data.resolve(settings.data)), replacing_code_eval(Limits()):
            found = _known(name).load([name])
    except OSError as error:
        raise OSError(f"the data of lm-eval's task {name} are not on this machine: {error}") from error
    for leaf in found["tasks"].values():
        if leaf.config.unsafe_code and not settings.allow_code_execution:
            raise CodeNotAllowedError(
                f"lm-eval's task {name} runs programs that the model wrote; allow it (--allow-code-execution)"
            )
    ((own_name, loaded),) = {name: found["groups"][name]}.items() if name in found["groups"] else found["tasks"].items()
    return HarnessTask(own_name, loaded, tuple(found["tasks"]), tokenizer, settings, few_shot)


def _known(name: str) -> Any:
    """What loads the task. Raises ValueError for a name that stands for no task, or for several without a sum."""
    is_file = Path(name).is_file()
    manager = _manager(not is_file)
    if name in manager.all_tags and not is_file:
        raise ValueError(
            f"{name} is a tag of lm-eval; name its tasks: {' '.join(sorted(manager.task_index[name].tags))}"
        )
    if name not in manager.all_tasks and not is_file:
        raise ValueError(f"lm-eval has no task {name!r}, and it is no .yaml file")
    return manager


@functools.cache
def _manager(include_defaults: bool) -> Any:
    """An index of all tasks, which takes seconds to make."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_defaults=include_defaults)


def compiled_twin(model: Any, recipe: Recipe) -> Any:
    """A model with the same weights that runs compiled by `recipe`, in `generate`, too, while `model` stays as it is.

    `torch.compile(model).generate` would run `model` itself.
    """
    twin = copy.copy(model)
    compile_in_place(twin, recipe)
    return twin


def compile_in_place(model: Any, recipe: Recipe | str | None) -> None:
    """Compile a causal model of transformers for the harness; without a recipe, the model is packed.

    Its batches have many shapes. With sizes known to change and caches that don't grow, five graphs serve them all;
    else a model meets torch.compile's recompile limit after some batches.
    """
    options = {} if recipe is None else {"recipe": recipe}
    model.compile(backend="micromix", dynamic=True, options=options)
    model.generation_config = copy.deepcopy(model.generation_config)
    model.generation_config.cache_implementation = "static"
    model.generation_config.disable_compile = True  # transformers' own, of what is compiled


def run_harness_tasks(
    model: LanguageModel, tasks: Sequence[HarnessTask], *, responses: Path | None = None
) -> tuple[TaskResult, ...]:
    """What `model` reaches in each of one or more tasks, in the harness's own prompts and by its own rules.

    model: a causal model of transformers, compiled in place or not; not what `torch.compile` returns (see
    `compiled_twin`).
    responses: keeps what the model answered, request by request, and is read first: an evaluation that was interrupted
    goes on where it was. The caller sees to it that a file belongs to one model.

    Raises ValueError if a task has none of `MAIN_METRICS`.
    """
    importlib.import_module("micromix_compile.integrations.hf")  # the harness reads a packed model's config
    from lm_eval.models.huggingface import HFLM

    wrapped = HFLM(pretrained=model, tokenizer=tasks[0].tokenizer, batch_size=tasks[0].settings.batch_size)
    return tuple(_run(wrapped, task, responses) for task in tasks)


def _run(wrapped: Any, task: HarnessTask, responses: Path | None) -> TaskResult:
    from lm_eval import simple_evaluate

    os.environ.setdefault("DISABLE_MULTIPROC", "1")  # no forks of a process that runs torch's threads
    with contextlib.redirect_stdout(sys.stderr):
        report = simple_evaluate(
            wrapped,
            tasks=[task.loaded],
            num_fewshot=task.few_shot,
            limit=task.limit,
            bootstrap_iters=_BOOTSTRAPS,
            log_samples=False,
            task_manager=_manager(True),
            use_cache=None if responses is None else str(responses),
            confirm_run_unsafe_code=task.settings.allow_code_execution,
        )
    metrics = metrics_of(report["results"][task.name])
    main = main_metric(task.name, metrics)
    items = sum(report["n-samples"][leaf]["effective"] for leaf in task.leaves)
    return TaskResult(task=task.name, items=items, metric=main, metrics=metrics)


def metrics_of(results: Mapping[str, Any]) -> dict[str, Metric]:
    """The metrics that a task measured, each by the first of its filters of answers.

    results: the harness's, with keys "METRIC,FILTER", "METRIC_stderr,FILTER" and others.
    """
    measured: dict[str, Metric] = {}
    for key, value in results.items():
        metric, comma, by = key.partition(",")
        if not comma or metric.endswith("_stderr") or metric in measured:
            continue
        error = results.get(f"{metric}_stderr,{by}")
        measured[metric] = Metric(value=float(value), standard_error=error if isinstance(error, float) else None)
    return measured


def main_metric(name: str, metrics: Mapping[str, Metric]) -> str:
    """The first of `MAIN_METRICS` that there is. Raises ValueError if there is none."""
    found = next((metric for metric in MAIN_METRICS if metric in metrics), None)
    if found is None:
        raise ValueError(f"lm-eval's task {name} measures {', '.join(metrics)}, none of {', '.join(MAIN_METRICS)}")
    return found

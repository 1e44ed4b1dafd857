"""Sets of tasks that belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from micromix_compile.evaluation.harness import CodeNotAllowedError, load_harness_task

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from micromix_compile.evaluation.harness import HarnessTask, TaskSettings

ZERO_SHOT: Final = (
    "arc_easy",
    "arc_challenge",
    "boolq",
    "lambada_openai",
    "piqa",
    "hellaswag",
    "winogrande",
)

SUITES: Final[dict[str, dict[str, int | None]]] = {
    "zero-shot": dict.fromkeys(ZERO_SHOT, 0),
    "paper": {
        "wikitext": None,
        **dict.fromkeys(ZERO_SHOT, 0),
        "mmlu": 5,
        "gsm8k_cot": None,
        "minerva_math500": None,
        "humaneval": None,
        "mbpp": None,
    },
}
"""By name: lm-eval's tasks, with the number of examples before each question, or None for the task's own.

"paper" is what MicroMix (arXiv 2508.02343) evaluates: language modelling, zero-shot, few-shot, mathematics, code. GSM8K
is the task with eight fixed examples, and MATH the one of 500 problems: neither needs a training set.
"""


class LoadedSuite(NamedTuple):
    """left_out: why a task is not among `tasks`, by name."""

    tasks: tuple[HarnessTask, ...]
    left_out: dict[str, str]


def load_suite(name: str, tokenizer: PreTrainedTokenizerBase, settings: TaskSettings) -> LoadedSuite:
    """The tasks of a suite whose data can be had here and whose code may be run; it says what is left out and why.

    Raises ValueError for another name than those of `SUITES`, ModuleNotFoundError where a package is missing, and
    OSError if nothing is left.
    """
    if name not in SUITES:
        raise ValueError(f"suite must be one of {', '.join(SUITES)}, got {name!r}")
    tasks, left_out = [], {}
    for task, few_shot in SUITES[name].items():
        try:
            tasks.append(load_harness_task(task, tokenizer, settings, few_shot=few_shot))
        except (CodeNotAllowedError, OSError) as error:
            left_out[task] = " ".join(str(error).split())
    if not tasks:
        raise OSError("; ".join(left_out.values()))
    return LoadedSuite(tuple(tasks), left_out)

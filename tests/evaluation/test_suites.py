"""Suites: what is left out is said, what is missing for good is an error."""

from __future__ import annotations

import pytest

from micromix_compile.evaluation import suites
from micromix_compile.evaluation.harness import CodeNotAllowedError, TaskSettings


def test_what_cannot_be_had_or_may_not_run_is_left_out_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    reasons = {"wikitext": OSError("not\nhere"), "humaneval": CodeNotAllowedError("allow it")}

    def load(name: str, tokenizer: object, settings: TaskSettings, *, few_shot: int | None) -> tuple[str, int | None]:
        if name in reasons:
            raise reasons[name]
        return name, few_shot

    monkeypatch.setattr(suites, "load_harness_task", load)
    found = suites.load_suite("paper", None, TaskSettings())
    assert found.left_out == {"wikitext": "not here", "humaneval": "allow it"}
    assert dict(found.tasks) == {k: v for k, v in suites.SUITES["paper"].items() if k not in reasons}
    assert dict(found.tasks)["mmlu"] == 5


def test_a_suite_of_which_nothing_is_left_and_an_unknown_one_are_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str, *_: object, **__: object) -> None:
        raise OSError(f"no {name}")

    monkeypatch.setattr(suites, "load_harness_task", load)
    with pytest.raises(OSError, match=r"no arc_easy; no arc_challenge; .*no winogrande"):
        suites.load_suite("zero-shot", None, TaskSettings())
    with pytest.raises(ValueError, match="suite must be one of zero-shot, paper, got 'all'"):
        suites.load_suite("all", None, TaskSettings())

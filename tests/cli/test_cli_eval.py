"""micromix eval: rows, tasks, and where results go."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from pathlib import Path

from support.command_line import SHORT, run, run_well


def test_eval_prints_the_rows_and_writes_them_with_their_circumstances(
    small_model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """One table, one JSON file with versions and hardware."""
    path = tmp_path / "results.json"
    arguments = ("--model", small_model, "--recipe", recipe_file, "--windows", 2, *SHORT, "--json", path)
    out = run_well("eval", *arguments, "--rows", "fp32 mxfp4", "--rows", "micromix", "--granularity", 64)
    assert "perplexity" in out
    content = json.loads(path.read_text("utf-8"))
    full, mxfp4, mixed = content["rows"]
    assert [row["row"] for row in content["rows"]] == ["fp32", "mxfp4", "micromix"]
    assert (full["kl"], full["top1"], full["element_bits"]) == (0.0, 1.0, 32.0)
    assert (mxfp4["element_bits"], mixed["predictions"]) == (4.0, 2 * 31)
    assert mxfp4["kl"] > 0
    assert content["config"]["granularity"] == 64
    assert content["config"]["fp6"] == "e3m2"
    assert content["versions"]["torch"] == torch.__version__
    assert content["hardware"]["cpu"]


def test_eval_runs_tasks_on_every_row(small_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """A column in the table, and accuracy with its error in the file."""
    request = {"request": {"context": "Up and", "continuation": " down"}, "doc_id": 0, "label": ["down"]}
    (tmp_path / "words.jsonl").write_text(f"{json.dumps(request)}\n{json.dumps({**request, 'doc_id': 1})}\n")
    wanted = ("--tasks", tmp_path / "words.jsonl", "--rows", "fp32 mxfp4", "--json", tmp_path / "results.json")
    out = run_well("eval", "--model", small_model, "--recipe", recipe_file, "--windows", 1, *SHORT, *wanted)
    assert "words" in out
    for row in json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"]:
        assert row["tasks"] == [{"task": "words", "items": 2, "accuracy": 0.0, "standard_error": 0.0}]
    refused = run("eval", "--model", small_model, "--tasks", "words")
    assert (refused.exit_code, "task must be one of lambada, arc_easy, " in refused.stderr) == (1, True)


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_eval_runs_tasks_of_the_harness_on_every_row(small_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """Beside our own tasks, and with the same number of items."""
    pytest.importorskip("lm_eval")
    rows = [{"question": word, "choices": [" down", " up"], "answer": 0} for word in ("Up and", "Left and", "In and")]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    fields = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (tmp_path / "pairs.yaml").write_text(json.dumps(fields), "utf-8")  # JSON is YAML
    wanted = ("--lm-eval", tmp_path / "pairs.yaml", "--task-items", 2, "--rows", "fp32 mxfp4")
    arguments = ("--model", small_model, "--recipe", recipe_file, "--windows", 1, *SHORT)
    assert "pairs" in run_well("eval", *arguments, *wanted, "--json", tmp_path / "results.json")
    for row in json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"]:
        assert [(task["task"], task["items"]) for task in row["tasks"]] == [("pairs", 2)]
    refused = run("eval", *arguments, "--lm-eval", "missing.yaml")
    assert (refused.exit_code, "lm-eval has no task 'missing.yaml'" in refused.stderr) == (1, True)


def test_results_may_go_to_a_device_which_stays_one(small_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """Such as /dev/null, here a pipe."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    arguments = ("--model", small_model, "--recipe", recipe_file, "--windows", 1, *SHORT, "--rows", "mxfp4")
    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(pipe.read_bytes)
        run_well("eval", *arguments, "--json", pipe)
        assert json.loads(received.result())["rows"][0]["row"] == "mxfp4"
    assert pipe.is_fifo()

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

from micromix_compile.cli.resume import fingerprint
from micromix_compile.evaluation import zoo


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


def test_the_unquantized_model_alone_is_evaluated_without_calibrating(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of a recipe is in its row but the bytes of the linears, which then nobody counted."""
    from micromix_compile.cli import eval as command

    monkeypatch.setattr(command, "decide", lambda *_: pytest.fail("calibrated"))
    arguments = ("--model", small_model, "--windows", 1, *SHORT, "--json", tmp_path / "results.json")
    run_well("eval", *arguments, "--rows", "fp32", "--resume", tmp_path / "kept")
    assert (tmp_path / "kept" / "settings.json").is_file(), "the folder is this evaluation's"
    (row,) = json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"]
    assert (row["row"], row["stored_bits"], row["stored_bytes"]) == ("fp32", 32.0, None)


def write_pairs(folder: Path) -> Path:
    """A task of lm-eval with three items, whose data are here."""
    rows = [{"question": word, "choices": [" down", " up"], "answer": 0} for word in ("Up and", "Left and", "In and")]
    (folder / "rows.json").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    fields = {
        "task": "pairs",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "rows.json")}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    (folder / "pairs.yaml").write_text(json.dumps(fields), "utf-8")  # JSON is YAML
    return folder / "pairs.yaml"


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_eval_runs_tasks_on_every_row(small_model: Path, recipe_file: Path, tmp_path: Path) -> None:
    """A column in the table, and all metrics with their errors in the file."""
    pytest.importorskip("lm_eval")
    wanted = ("--tasks", write_pairs(tmp_path), "--task-items", 2, "--rows", "fp32 mxfp4", "--batch-size", 4)
    arguments = ("--model", small_model, "--recipe", recipe_file, "--windows", 1, *SHORT)
    assert "pairs" in run_well("eval", *arguments, *wanted, "--json", tmp_path / "results.json")
    for row in json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"]:
        (task,) = row["tasks"]
        assert (task["task"], task["items"], task["metric"]) == ("pairs", 2, "acc")
        assert set(task["metrics"]["acc"]) == {"value", "standard_error"}
    refused = run("eval", *arguments, "--tasks", "missing.yaml")
    assert (refused.exit_code, "lm-eval has no task 'missing.yaml'" in refused.stderr) == (1, True)


@pytest.mark.filterwarnings("ignore")  # the harness's own
def test_an_evaluation_goes_on_where_it_stopped(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither calibrating nor asking again; with another setting it is refused."""
    pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM

    from micromix_compile.cli import eval as command

    kept = ("--resume", tmp_path / "kept", "--tasks", write_pairs(tmp_path), "--rows", "fp32 mxfp4")
    arguments = ("--model", small_model, "--windows", 1, "--calibration-windows", 1, *SHORT, *kept)
    first = run_well("eval", *arguments)
    for module, name in ((HFLM, "_model_call"), (command, "decide")):
        monkeypatch.setattr(module, name, lambda *_, **__: pytest.fail("asked again"))
    assert run_well("eval", *arguments) == first
    refused = run("eval", *arguments, "--data", "c4")
    assert refused.exit_code == 2
    assert "kept holds an evaluation with another data: 'wiki', not 'c4'" in refused.stderr


def test_eval_refuses_what_it_cannot_do_before_a_model_is_loaded(
    small_model: Path, tmp_path: Path, no_loading: None
) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (("--suite", "all"), "--suite must be one of zero-shot, paper, got 'all'"),
        (("--task-data", "disk"), "--task-data must be one of auto, hub, packages, got 'disk'"),
        (("--resume", tmp_path), f"--resume must be a new directory or one of an evaluation before, got {tmp_path}"),
        (("--resume", tmp_path / "a", "--json", tmp_path / "a"), "--json and --resume must stand side by side, got"),
        (("--resume", tmp_path / "a", "--json", tmp_path / "a" / "settings.json"), "must stand side by side"),
        (("--resume", tmp_path / "a" / "b", "--json", tmp_path / "a"), "must stand side by side"),
        (("--resume", tmp_path / "file"), "--resume must be a new directory or one of an evaluation before"),
    ):
        refused = run("eval", "--model", small_model, *arguments)
        assert (refused.exit_code, message in refused.stderr) == (2, True), refused.stderr


@pytest.mark.parametrize(("content", "fact"), [("", "is not JSON"), ("[1]", "must be"), ("{", "is not JSON")])
def test_damaged_settings_in_the_folder_of_resume_are_named(
    small_model: Path, tmp_path: Path, no_loading: None, content: str, fact: str
) -> None:
    (tmp_path / "settings.json").write_text(content, "utf-8")
    refused = run("eval", "--model", small_model, "--resume", tmp_path)
    assert (refused.exit_code, f"{tmp_path / 'settings.json'} {fact}" in refused.stderr) == (2, True), refused.stderr


def test_a_command_that_was_wrong_leaves_the_folder_of_resume_to_the_right_one(
    small_model: Path, tmp_path: Path
) -> None:
    """Another model, text or number of windows than there are: found late, and nothing was measured."""
    (tmp_path / "text.txt").write_text("\n\n".join(f"{number} is a number. " * 20 for number in range(8)), "utf-8")
    given = ("--model", small_model, "--data", tmp_path / "text.txt", "--windows", 1, *SHORT, "--rows", "mxfp4")
    for wrong in (("--model", "tinny"), ("--data", "books"), ("--windows", 999), ("--calibration-windows", 999)):
        assert run("eval", *given, *wrong, "--resume", tmp_path / "kept").exit_code == 1
        assert not (tmp_path / "kept").exists()


def test_what_a_suite_leaves_out_is_said_and_written(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from micromix_compile.cli import eval as command
    from micromix_compile.evaluation.suites import LoadedSuite

    monkeypatch.setattr(command, "load_suite", lambda *_: LoadedSuite((), {"wikitext": "not here"}))
    path = tmp_path / "results.json"
    arguments = ("--model", small_model, "--windows", 1, "--calibration-windows", 1, *SHORT, "--rows", "fp32")
    result = run("eval", *arguments, "--suite", "paper", "--json", path)
    assert (result.exit_code, "left out: wikitext: not here" in result.stderr) == (0, True)
    assert json.loads(path.read_text("utf-8"))["tasks left out"] == {"wikitext": "not here"}


def test_a_fingerprint_changes_with_what_it_is_of(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("a")
    before = fingerprint(tmp_path), fingerprint(tmp_path / "weights")
    assert before == (fingerprint(str(tmp_path)), fingerprint(tmp_path / "weights"))
    (tmp_path / "weights").write_text("bc")
    assert not {*before} & {fingerprint(tmp_path), fingerprint(tmp_path / "weights")}
    assert fingerprint(zoo.DEFAULT_MODEL) == ""


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

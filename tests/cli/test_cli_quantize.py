"""micromix quantize: the checkpoint, and what it may replace."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

import micromix_compile as micromix
from micromix_compile.cli.errors import UsageError
from micromix_compile.cli.outputs import check_directory
from micromix_compile.evaluation import zoo

if TYPE_CHECKING:
    from pathlib import Path

from support.command_line import SHORT, run, run_well, write_packed_config


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


def test_a_failed_save_leaves_the_old_checkpoint_whole(
    small_model: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new one is written beside it and renamed at the end."""
    packed = tmp_path / "packed"
    packed.mkdir()
    (packed / "merges.txt").write_text("whole", "utf-8")
    write_packed_config(packed)

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(micromix, "quantize_", fail)
    result = run("quantize", "--model", small_model, "--recipe", recipe_file, "--out", packed, "--overwrite")
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "micromix quantize: disk full"
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert (packed / "merges.txt").read_text("utf-8") == "whole"


def test_what_somebody_else_put_in_the_place_meanwhile_stays(
    small_model: Path, recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    pack = micromix.quantize_

    def be_slow(*arguments: Any) -> object:
        packed.mkdir()
        (packed / "picture").write_text("whole", "utf-8")
        return pack(*arguments)

    monkeypatch.setattr(micromix, "quantize_", be_slow)
    result = run("quantize", "--model", small_model, "--recipe", recipe_file, "--out", packed)
    assert (result.exit_code, "exists; --overwrite replaces it" in result.stderr) == (2, True)
    assert [path.name for path in packed.iterdir()] == ["picture"]


def test_files_of_a_checkpoints_own_tokenizer_are_no_obstacle(tmp_path: Path) -> None:
    write_packed_config(tmp_path)
    (tmp_path / "emoji.json").touch()
    with pytest.raises(UsageError, match=r"holds emoji\.json, which is no part of one"):
        check_directory("--out", tmp_path, overwrite=True, made_from=None)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "GPTNeoXJapaneseTokenizer"}', "utf-8")
    check_directory("--out", tmp_path, overwrite=True, made_from=None)


def test_quantize_overwrites_only_when_told_to_however_the_path_is_written(
    small_model: Path, recipe_file: Path, tmp_path: Path
) -> None:
    """`missing/..` exists once its parents are made."""
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "merges.txt").touch()
    write_packed_config(tmp_path / "some")
    arguments = ("quantize", "--model", small_model, "--recipe", recipe_file)
    refused = run(*arguments, "--out", tmp_path / "missing" / ".." / "some")
    assert (refused.exit_code, "exists; --overwrite replaces it" in refused.stderr) == (2, True)
    run_well(*arguments, "--overwrite", "--out", tmp_path / "some" / ".." / "some")
    assert zoo.is_packed(tmp_path / "some")
    assert not (tmp_path / "some" / "merges.txt").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["some"]


@pytest.mark.parametrize(
    ("out", "fact"),
    [
        (".", "holds the current directory or a home"),
        ("..", "holds the current directory or a home"),
        ("../home", "holds the current directory or a home"),
        ("pictures", "holds no packed checkpoint"),
        ("plain", "holds no packed checkpoint"),
        ("noted", "holds README.md, which is no part of one"),
        ("nested", "holds packed/picture.png, which is no part of one"),
        ("linked", "holds packed, which is no part of one"),
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
    more = ("root/noted", "root/nested/packed", "root/linked")
    for name in ("home", "root/pictures", "root/plain", "root/repository/.git", "root/packed", *more):
        (tmp_path / name).mkdir(parents=True)
    (root / "noted" / "README.md").touch()
    (root / "nested" / "packed" / "picture.png").touch()
    (root / "linked" / "packed").symlink_to("../packed")
    (root / "pictures" / "cat.png").touch()
    (root / "plain" / "config.json").write_text("{}", "utf-8")
    (root / "link").symlink_to("packed")
    (root / "file").touch()
    for name in (".", "..", "../home", "repository", "packed", "noted", "nested", "linked"):
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


def test_the_recipe_that_a_checkpoint_is_made_from_outlives_it(tmp_path: Path, no_loading: None) -> None:
    """Whatever it is called."""
    write_packed_config(tmp_path)
    for name in ("model.recipe.safetensors", "model.safetensors"):
        (tmp_path / name).touch()
        result = run("quantize", "--recipe", tmp_path / name, "--out", tmp_path, "--overwrite")
        assert (result.exit_code, "must not hold what it is made from" in result.stderr) == (2, True)
    refused = run("quantize", "--out", tmp_path, "--overwrite")
    assert (refused.exit_code, "holds model.recipe.safetensors, which is no part" in refused.stderr) == (2, True)

"""micromix report: the page of a recipe and of the checkpoint packed by it, what is measured, what may be replaced."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from support.command_line import SHORT, run, run_well
from support.reports import Page

import micromix_compile as micromix
from micromix_compile.cli import demo
from micromix_compile.report.page import PASSES
from micromix_compile.report.pictures import Picture

if TYPE_CHECKING:
    from pathlib import Path

COMMON = (
    *("linears", "element-bits", "stored-bits", "stored-bytes", "bf16-bytes", "groups", "rotated-groups"),
    *("left-parameters", "bytes-MXFP4", "bytes-MXFP6", "bytes-MXFP8", "bytes-scales", "bytes-orders"),
)
"""What a recipe and a packed checkpoint both know."""


def page_at(path: Path) -> Page:
    return Page(path.read_text("utf-8"))


def test_a_recipe_and_the_checkpoint_packed_by_it_have_the_same_numbers(
    recipe_file: Path, packed_model: Path, tmp_path: Path
) -> None:
    pages = []
    for source, target in ((recipe_file, ("--target", "sm_100", "--target", "sm_90")), (packed_model, ())):
        out = tmp_path / source.with_suffix(".html").name
        assert "7 linears" in run_well("report", source, "--out", out, *target)
        pages.append(page_at(out))
    recipe, packed = pages
    assert {name: recipe.values[name] for name in COMMON} == {name: packed.values[name] for name in COMMON}
    for fqn, values in packed.linears.items():
        assert recipe.linears[fqn][: len(values)] == values
    assert float(recipe.values["stored-bits"]) == micromix.Recipe.load(recipe_file).stored_bits
    assert "sm_100: native" in recipe.text
    assert "lm_head" in recipe.text


def test_errors_are_measured_beside_the_model_as_eval_does(
    small_model: Path, recipe_file: Path, packed_model: Path, tmp_path: Path
) -> None:
    """Of a checkpoint, too, whose bytes are the recipe's; compiled it may sum norms in another order."""
    text = ("--windows", 1, *SHORT, "--dtype", "float32")
    run_well(
        "eval", "--model", small_model, "--recipe", recipe_file, "--rows", "micromix", "--json", tmp_path / "j", *text
    )
    (row,) = json.loads((tmp_path / "j").read_text())["rows"]
    found = []
    for source in (recipe_file, packed_model):
        run_well("report", source, "--model", small_model, *text, "--out", tmp_path / "r.html", "--overwrite")
        found.append(page_at(tmp_path / "r.html"))
    recipe, packed = found
    assert [float(recipe.values[name]) for name in ("perplexity", "kl", "top1")] == [
        row["perplexity"], row["kl"], row["top1"],
    ]  # fmt: skip
    for name, apart in (("unquantized", 0.0), ("perplexity", 0.001), ("kl", 0.5)):
        assert float(packed.values[name]) == pytest.approx(float(recipe.values[name]), rel=apart)
    counts = {name: int(recipe.values[f"pass-{name}"]) for name in PASSES}
    assert counts == {
        **dict.fromkeys(PASSES, 0), "find_linears": 7, "rewrite_linears": 7, "share_activations": 3, "fuse_rms_norm": 2,
    }  # fmt: skip
    noise = {fqn: values[-1] for fqn, values in recipe.linears.items()}
    assert {fqn: values[-1] for fqn, values in packed.linears.items()} == noise
    assert all(0 < float(values[-1]) < 99 for values in recipe.linears.values())
    assert "in float32" in recipe.text


def test_another_model_is_refused(small_model: Path, packed_model: Path, tmp_path: Path) -> None:
    """Of another size."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(small_model, intermediate_size=96)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(small_model).save_pretrained(tmp_path / "other")
    result = run("report", packed_model, "--model", tmp_path / "other", *SHORT, "--out", tmp_path / "r.html")
    assert result.exit_code == 1
    assert "the model must have a linear model.layers.0.mlp.gate_proj of (128, 64)" in result.stderr
    assert not (tmp_path / "r.html").exists()


def test_pictures_are_files_when_they_are_asked_for(recipe_file: Path, tmp_path: Path) -> None:
    command = ("report", recipe_file, "--out", tmp_path / "r.html", "--pictures", tmp_path / "p")
    run_well(*command)
    names = {path.name for path in (tmp_path / "p").iterdir()}
    assert {"bytes.png", "formats-0.png", "predicted.png", "channels-3.png"} <= names
    refused = run(*command)
    assert (refused.exit_code, "exists; --overwrite replaces it" in refused.stderr) == (2, True)
    run_well(*command, "--overwrite")
    assert {path.name for path in (tmp_path / "p").iterdir()} == names


def test_what_somebody_else_put_beside_the_pictures_meanwhile_stays(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    photos = tmp_path / "p"

    def be_slow(_: Picture) -> bytes:
        photos.mkdir(exist_ok=True)
        (photos / "mine.png").write_bytes(b"whole")
        return b""

    monkeypatch.setattr(Picture, "png", be_slow)
    refused = run("report", recipe_file, "--out", tmp_path / "r.html", "--pictures", photos)
    assert (refused.exit_code, "exists; --overwrite replaces it" in refused.stderr) == (2, True)
    assert [path.name for path in photos.iterdir()] == ["mine.png"]


def test_only_reports_are_overwritten(
    recipe_file: Path, tmp_path: Path, no_loading: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    letter, folder, link = tmp_path / "letter.html", tmp_path / "photos", tmp_path / "link"
    letter.write_text("<p>Dear all", "utf-8")
    folder.mkdir()
    (folder / "me.png").write_bytes(b"\x89PNG")
    link.symlink_to(folder)
    for options, fact in (
        (("--out", letter), "letter.html exists; --overwrite replaces it"),
        (("--out", letter, "--overwrite"), "--overwrite replaces reports and their pictures, and"),
        (("--out", folder), "--out must be a file, and"),
        (("--pictures", folder, "--out", tmp_path / "r", "--overwrite"), "--overwrite replaces reports and their"),
        (("--pictures", tmp_path / "p", "--out", tmp_path / "p" / "r.html"), "--out and --pictures must stand side by"),
        (("--pictures", tmp_path / "r", "--out", tmp_path / "r"), "--out and --pictures must stand side by side, got"),
        (("--pictures", tmp_path / "r" / "p", "--out", tmp_path / "r"), "--out and --pictures must stand side by side"),
        (("--pictures", ".", "--out", tmp_path / "r"), "--pictures must not hold the current directory or a home"),
        (("--pictures", letter, "--out", tmp_path / "r"), "--pictures must be a directory, got"),
        (("--pictures", link, "--out", tmp_path / "r"), "--pictures must be a directory, got"),
    ):
        result = run("report", recipe_file, *options, "--model", "anything")
        assert (result.exit_code, fact in result.stderr) == (2, True), result.stderr
    assert letter.read_text("utf-8") == "<p>Dear all"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "letter.html", "link", "photos"]


def test_the_demo_replaces_its_own_page_only(recipe_file: Path, tmp_path: Path, no_loading: None) -> None:
    """It is asked before a model is loaded."""
    letter, page = tmp_path / "letter.html", tmp_path / "page.html"
    letter.write_text("<p>Dear all", "utf-8")
    for place, fact in ((letter, "--overwrite replaces reports"), (tmp_path, "--report must be a file, and")):
        result = run("demo", "--report", place)
        assert (result.exit_code, fact in result.stderr) == (2, True), result.stderr
    run_well("report", recipe_file, "--out", page)
    with pytest.raises(AssertionError, match="a model was loaded"):
        raise run("demo", "--report", page).exception or SystemExit


def test_what_the_demo_ends_with_is_a_page(
    recipe_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = micromix.Recipe.load(recipe_file)
    demo._write_report(tmp_path / "page.html", recipe)
    assert str(tmp_path / "page.html") in capsys.readouterr().out
    page = page_at(tmp_path / "page.html")
    assert float(page.values["stored-bits"]) == recipe.stored_bits
    assert all(f"{name}: native" in page.text for name in demo.GPUS)


def test_sources_and_targets_that_are_none_are_one_line(recipe_file: Path, tmp_path: Path, no_loading: None) -> None:
    (tmp_path / "note.txt").write_text("hello", "utf-8")
    for source, options, fact in (
        (tmp_path / "missing", (), "no recipe and no packed checkpoint at"),
        (tmp_path / "note.txt", (), "no recipe, and no directory of a packed checkpoint"),
        (tmp_path, (), "has no config.json"),
        (recipe_file, ("--target", "h100"), "target must be sm_ and a compute capability"),
        (recipe_file, ("--model", "x", "--dtype", "int8"), "--dtype must be one of"),
        (recipe_file, ("--model", "x", "--data", "novel"), "data must be one of"),
    ):
        result = run("report", source, "--out", tmp_path / "r.html", *options)
        assert result.exit_code in (1, 2)
        assert result.stderr.splitlines()[-1].startswith("micromix report: ")
        assert fact in result.stderr
    assert not (tmp_path / "r.html").exists()

"""micromix convert: there and back, what it says, what it refuses and leaves as it was."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
from support.command_line import run, run_well, write_packed_config
from support.others import write_quantized

import micromix_compile as micromix
from micromix_compile.cli.options import CONVERTED_ACTIVATIONS
from micromix_compile.evaluation import zoo
from micromix_compile.integrations.from_others import ACTIVATIONS

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("theirs") / "model"
    write_quantized(directory, "weight-only")
    return directory


def test_activations_are_those_of_the_function() -> None:
    """Options are read without transformers, which the function needs."""
    assert CONVERTED_ACTIVATIONS == ACTIVATIONS


def test_convert_goes_there_and_back(theirs: Path, tmp_path: Path) -> None:
    packed, back = tmp_path / "packed", tmp_path / "back"
    out = run_well("convert", theirs, packed, "--activations", "fp8")
    assert out == f"{packed}: 7 linears, 7 mxfp4; activations fp8, as was asked for\n"
    assert zoo.is_packed(packed)
    out = run_well("convert", packed, back)
    assert "7 linears as compressed-tensors, 7 mxfp4; activations not said, for fp8 has no name there" in out
    refused = run("convert", theirs, packed, "--activations", "fp8")
    assert (refused.exit_code, "exists; --overwrite replaces it" in refused.stderr) == (2, True)
    run_well("convert", theirs, packed, "--activations", "same", "--overwrite")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 1, "Name what they are to be, activations= or --activations: same, fp8, mxfp6, mxfp8"),
        (("--activations", "int8"), 2, "--activations must be one of same, fp8, mxfp6, mxfp8, got 'int8'"),
    ],
)
def test_what_is_not_converted_is_one_line_and_leaves_nothing(
    theirs: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    result = run("convert", theirs, tmp_path / "packed", *arguments)
    assert result.exit_code == code
    assert message in result.stderr.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_source_and_one_that_is_the_destination_are_refused(theirs: Path, tmp_path: Path) -> None:
    missing = run("convert", tmp_path / "nowhere", tmp_path / "packed")
    assert (missing.exit_code, "no config.json in" in missing.stderr) == (1, True)
    same = run("convert", theirs, theirs, "--overwrite")
    assert (same.exit_code, "must not hold what it is made from" in same.stderr) == (2, True)
    for place in (theirs, theirs.parent):
        with pytest.raises(ValueError, match="destination must not be source or hold it"):
            micromix.convert(theirs, place)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / "config.json").write_text("{}", "utf-8")
    other = run("convert", theirs, tmp_path / "plain", "--overwrite")
    assert (other.exit_code, "holds no packed checkpoint" in other.stderr) == (2, True)


def test_what_convert_wrote_it_may_replace_in_both_directions(theirs: Path, tmp_path: Path) -> None:
    packed, twin = tmp_path / "packed", tmp_path / "twin"
    for _ in range(2):
        run_well("convert", theirs, packed, "--activations", "fp8", "--overwrite")
        run_well("convert", packed, twin, "--overwrite")


def test_a_directory_that_holds_the_source_or_notes_is_not_replaced(theirs: Path, tmp_path: Path) -> None:
    """Notes that are copied from the source are no loss, those that were changed since are."""
    outer, packed = tmp_path / "outer", tmp_path / "packed"
    shutil.copytree(theirs, outer / "inner")
    write_packed_config(outer)
    (tmp_path / "link").symlink_to("outer/inner")
    for source in (outer / "inner", tmp_path / "link"):
        refused = run("convert", source, outer, "--activations", "fp8", "--overwrite")
        assert (refused.exit_code, "must not hold what it is made from" in refused.stderr) == (2, True)
    (outer / "inner" / "README.md").write_text("a model", "utf-8")
    for _ in range(2):
        run_well("convert", outer / "inner", packed, "--activations", "fp8", "--overwrite")
    (packed / "README.md").write_text("a better model", "utf-8")
    refused = run("convert", outer / "inner", packed, "--activations", "fp8", "--overwrite")
    assert (
        refused.exit_code,
        f"holds README.md, which is no part of one and not that of {outer}" in refused.stderr,
    ) == (2, True)


def test_a_conversion_that_fails_leaves_the_old_checkpoint_whole(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"
    run_well("convert", theirs, packed, "--activations", "fp8")
    before = (packed / "model.safetensors").read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("micromix_compile.integrations.from_others.checkpoint.seal", fail)
    result = run("convert", theirs, packed, "--activations", "same", "--overwrite")
    assert (result.exit_code, result.stderr.splitlines()[-1]) == (1, "micromix convert: disk full")
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]
    assert (packed / "model.safetensors").read_bytes() == before


def test_what_somebody_else_put_in_the_place_meanwhile_stays(
    theirs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = tmp_path / "packed"

    def be_slow(*_: object) -> None:
        packed.mkdir()
        (packed / "picture").write_text("whole", "utf-8")

    monkeypatch.setattr("micromix_compile.integrations.convert._copy_others", be_slow)
    result = run("convert", theirs, packed, "--activations", "fp8")
    assert (result.exit_code, "exists; --overwrite replaces it" in result.stderr) == (2, True)
    assert [path.name for path in packed.iterdir()] == ["picture"]

"""Commands on a packed checkpoint: which options still mean something."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

from support.command_line import SHORT, run, run_well

HOW_TO_QUANTIZE = (
    *(("--recipe", "r"), ("--policy", "mxfp4"), ("--target-bits", "5"), ("--target-kind", "element"), ("--lam", "1")),
    *(("--fp6", "e2m3"), ("--weights", "same"), ("--scale-rounding", "rceil"), ("--weight-rounding", "nearest")),
    *(("--scale-search",), ("--no-scale-search",), ("--uniform-order", "model"), ("--granularity", "64")),
    ("--skip", "x"),
)


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

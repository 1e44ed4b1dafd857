"""The examples, each run as it is in a process's stead, on a small model."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
ARGUMENTS = {
    "quickstart": ("--windows", "1", "--length", "32"),
    "sweep": ("--windows", "1", "--length", "32", "--bits", "4.5", "6"),
    "lora": ("--length", "32", "--steps", "16"),
    "export": ("--length", "32"),
}


def test_every_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


@pytest.fixture
def printed(
    request: pytest.FixtureRequest,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> str:
    """What an example prints."""
    name = request.param
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--model", str(small_model), *ARGUMENTS[name]])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    return capsys.readouterr().out


@pytest.mark.deep  # the tutorial takes the same steps
@pytest.mark.parametrize("printed", ["quickstart"], indirect=True)
@pytest.mark.usefixtures("fresh_compiler")
def test_quickstart_quantizes_and_loads_what_it_saved(printed: str) -> None:
    assert re.search(r"7 linears, 5\.\d+", printed)
    divergence = re.search(r"divergence (\S+) nats", printed)
    assert divergence is not None
    assert float(divergence[1]) > 0
    assert "loaded as it was saved: True" in printed


@pytest.mark.parametrize("printed", ["sweep"], indirect=True)
def test_a_sweep_keeps_its_budgets_and_more_bits_diverge_less(printed: str) -> None:
    rows = [[float(cell) for cell in line.split()] for line in printed.splitlines()[1:]]
    assert 4.0 < rows[0][0] <= 4.5 < rows[1][0] <= 6.0
    assert rows[0][3] > rows[1][3] > 0


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("printed", ["lora"], indirect=True)
def test_adapters_learn_around_a_packed_model(printed: str) -> None:
    found = re.search(r"loss (\S+), after 16 steps (\S+)", printed)
    assert found is not None
    assert float(found[2]) < float(found[1])


@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's own, of tensors on a CPU
@pytest.mark.parametrize("printed", ["export"], indirect=True)
def test_an_exported_model_computes_what_the_packed_one_does(printed: str) -> None:
    found = re.search(r"largest difference (\S+)", printed)
    assert found is not None
    assert float(found[1]) < 1e-4

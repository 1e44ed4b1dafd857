"""Programs in processes of their own: what counts as passed, and which limits hold."""

from __future__ import annotations

import itertools
import math
import time
from dataclasses import replace

import pytest

from micromix_compile.evaluation import code_execution
from micromix_compile.evaluation.code_execution import CodeEval, Limits, passes

LIMITS = Limits(seconds=30, memory_bytes=256 << 20, written_bytes=1 << 16)
IMPATIENT = replace(LIMITS, seconds=1)
TESTS = "assert f(2) == 4\n"


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("def f(x): return 2 * x", True),
        ("def f(x):\n    print('x' * 1_000_000)\n    return 2 * x", True),
        ("import math\ndef f(x): return math.isqrt(16)", True),
        ("def f(x): return x", False),
        ("def f(x) return", False),
        ("raise SystemExit(0)", False),
        ("import os\nos._exit(0)", False),
        ("import mmap\nx = mmap.mmap(-1, 1 << 30)\ndef f(x): return 2 * x", False),
        ("open('big', 'wb').write(bytes(1 << 20))\ndef f(x): return 2 * x", False),
        ("import os\nassert not os.environ.get('HOME') and not os.listdir()\ndef f(x): return 4", True),
        ("def f(x): return input() or 4", False),
    ],
)
def test_a_program_passes_if_it_ends_well_within_the_limits(program: str, expected: bool) -> None:
    assert passes(f"{program}\n{TESTS}", LIMITS) is expected


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(60)"])
def test_a_program_that_does_not_end_is_ended(program: str) -> None:
    start = time.perf_counter()
    assert not passes(program, IMPATIENT)
    assert time.perf_counter() - start < 30


def test_processes_that_a_program_leaves_behind_are_ended(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("left") / "late"
    child = f"import time; time.sleep(1.5); open({str(path)!r}, 'w').close()"
    program = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', {child!r}])"
    assert passes(program, LIMITS)
    time.sleep(2.5)
    assert not path.exists()


def test_the_share_that_passes_is_estimated_without_bias() -> None:
    """Over all ways of drawing k of n programs, the share of those with one that passes."""
    for passed in itertools.product((False, True), repeat=4):
        for k in (1, 2, 3, 4):
            drawn = list(itertools.combinations(passed, k))
            assert math.isclose(code_execution._pass_at(k, passed), sum(map(any, drawn)) / len(drawn))


def test_problems_are_averaged_and_too_few_programs_are_refused() -> None:
    metric = CodeEval(LIMITS)
    programs = [["def f(x): return 2 * x", "def f(x): return 0"], ["def f(x): return 1", "def f(x): return 2"]]
    means, passed = metric.compute(references=[TESTS, TESTS], predictions=programs, k=[1, 2])
    assert (means, passed) == ({"pass@1": 0.25, "pass@2": 0.5}, {0: [True, False], 1: [False, False]})
    with pytest.raises(ValueError, match="pass@3 needs 3 programs for each problem, got 2"):
        metric.compute(references=[TESTS, TESTS], predictions=programs, k=[3])


@pytest.mark.parametrize("name", ["seconds", "memory_bytes", "written_bytes"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be positive, got 0"):
        Limits(**{name: 0})

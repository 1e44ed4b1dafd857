"""Programs that a model wrote, run in processes of their own with limits of time and memory.

The harness's tasks of code (HumanEval, MBPP) load a metric called code_eval from the hub, which runs programs inside
forks of the evaluating process. `CodeEval` stands in for it. The limits guard the machine against mistakes: endless
loops, memory, full disks. They are no protection against malice: for that, run the whole evaluation in a container.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.evaluation.task_data import replaced

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

_CODE_MODULES: Final = ("lm_eval.tasks.humaneval.utils", "lm_eval.tasks.mbpp.utils")
"""They keep the metric that they loaded when they were imported."""

_RUNNER: Final = """
import os, resource, sys
seconds, memory, written, passed = *map(int, sys.argv[1:4]), sys.argv[4]
for kind, limit in (("CPU", seconds), ("AS", memory), ("FSIZE", written), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (limit, limit))
program = compile(sys.stdin.read(), "program", "exec")
answer = os.dup(1)
os.dup2(2, 1)
sys.argv[1:] = []
exec(program, {})
os.write(answer, passed.encode())
"""
"""Limits itself before the program runs; says the word only if the program ran to its end without an exception."""

_PIPES: Final[dict[str, Any]] = {
    "stdin": subprocess.PIPE,
    "stdout": subprocess.PIPE,
    "stderr": subprocess.DEVNULL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What a program may use. Raises ValueError unless all are positive."""

    seconds: int = 10
    memory_bytes: int = 1 << 30
    written_bytes: int = 1 << 20

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_bytes", "written_bytes"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")


def passes(program: str, limits: Limits) -> bool:
    """Whether `program` runs to its end, in a process of its own, without an exception and within the limits.

    It gets an empty folder that is deleted afterwards, no environment, no input; what it prints is thrown away, and the
    processes that it started are ended with it. Raises OSError where the system has no such limits (Windows).
    """
    if importlib.util.find_spec("resource") is None:
        raise OSError(f"programs are run with limits that {sys.platform} has not: use Linux or macOS")
    word = secrets.token_hex(16)
    numbers = (limits.seconds, limits.memory_bytes, limits.written_bytes)
    command = [sys.executable, "-I", "-c", _RUNNER, *map(str, numbers), word]
    with (
        tempfile.TemporaryDirectory(prefix="micromix-program-") as folder,
        subprocess.Popen(command, cwd=folder, env={}, start_new_session=True, **_PIPES) as process,
    ):
        try:
            output, _ = process.communicate(program.encode(errors="replace"), timeout=limits.seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return bool(output == word.encode())


class CodeEval:
    """What the harness's tasks of code use of the metric code_eval."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits

    def compute(
        self, *, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int]
    ) -> tuple[dict[str, float], dict[int, list[bool]]]:
        """({"pass@k": its mean over the problems}, which programs passed, by problem).

        references: for each problem, the code that tests a program. predictions: for each problem, programs.
        The estimate of pass@k from n programs of which c pass is 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1).
        Raises ValueError if a problem has fewer than k programs.
        """
        fewest = min(map(len, predictions))
        if max(k) > fewest:
            raise ValueError(f"pass@{max(k)} needs {max(k)} programs for each problem, got {fewest}")
        passed = {
            index: [passes(f"{program}\n{test}", self._limits) for program in programs]
            for index, (test, programs) in enumerate(zip(references, predictions, strict=True))
        }
        means = {f"pass@{one}": sum(_pass_at(one, each) for each in passed.values()) / len(passed) for one in k}
        return means, passed


def _pass_at(k: int, passed: Sequence[bool]) -> float:
    return 1.0 - math.comb(len(passed) - sum(passed), k) / math.comb(len(passed), k)


@contextlib.contextmanager
def replacing_code_eval(limits: Limits) -> Iterator[None]:
    """While it lasts, the harness's tasks of code that are loaded take `CodeEval` for their metric."""
    import evaluate

    original = evaluate.load

    def load(path: str, *arguments: Any, **options: Any) -> Any:
        return CodeEval(limits) if path == "code_eval" else original(path, *arguments, **options)

    for module in _CODE_MODULES:
        sys.modules.pop(module, None)
    with replaced(evaluate, "load", load):
        yield

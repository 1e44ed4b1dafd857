"""A process that answers each request in a fork of itself: its imports are there, what an answer changes is not kept.

server = ForkServer("support.script")    in the tests
serve(answer)                            in the script, behind its imports
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

TESTS = Path(__file__).parents[1]


class ForkServer:
    """The side that asks. The process starts with the first question and ends with `close`."""

    def __init__(self, script: str, *, without: str) -> None:
        """script: the module that calls `serve`. without: a variable that its environment shall lack."""
        self.script, self.without = script, without
        self.process: subprocess.Popen[str] | None = None

    def ask(self, request: dict[str, Any]) -> Any:
        """The answer; raises RuntimeError with the traceback where there was an error instead."""
        if self.process is None:
            paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
            environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
            environment.pop(self.without, None)
            pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
            self.process = subprocess.Popen([sys.executable, "-m", self.script], env=environment, text=True, **pipes)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # it ended: then there is no line either
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.script} ended with code {self.process.wait()}")
        result = json.loads(line)
        if "error" in result:
            raise RuntimeError(f"{self.script}, asked {request}:\n{result['error']}")
        return result["answer"]

    def close(self) -> None:
        """End the process, which has nothing to do any more."""
        if self.process is not None:
            self.process.communicate()
            self.process = None


def serve(answer: Callable[[dict[str, Any]], Any]) -> None:
    """Answer every line of standard input, until it ends, with a line of standard output. Prints go to the errors."""
    with os.fdopen(os.dup(1), "w") as out:
        os.dup2(2, 1)
        for line in iter(sys.stdin.readline, ""):
            child = os.fork()
            if child == 0:
                _answer(answer, line, out)
            _, status = os.waitpid(child, 0)
            if status:
                _write(out, {"error": f"the process that answered ended with status {status}"})


def _answer(answer: Callable[[dict[str, Any]], Any], line: str, out: Any) -> None:
    """In the fork, which ends here."""
    try:
        result = {"answer": answer(json.loads(line))}
    except Exception:  # whatever it is, the test that asked raises it
        result = {"error": traceback.format_exc()}
    _write(out, result)
    sys.stderr.flush()
    os._exit(0)


def _write(out: Any, result: dict[str, Any]) -> None:
    out.write(json.dumps(result) + "\n")
    out.flush()

"""A small run of `bench/fuzz_files.py`, in a process of its own, for it forks."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "bench" / "fuzz_files.py"
KINDS = {
    *("recipe", "forged recipe", "packed", "packed, several files"),
    *("compressed-tensors", "the same in several files", "gpt-oss"),
}
EACH = 40


def test_damaged_files_are_refused_clearly_or_give_what_they_gave() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--mutations", str(EACH * len(KINDS)), "--seed", "1"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {
        match[1]: [int(n) for n in match[2].split()]
        for match in re.finditer(r"^ +([a-z ,-]+?)  +([\d ]+)$", done.stdout, re.M)
    }
    assert set(rows) == KINDS
    for kind in KINDS:
        assert sum(rows[kind]) == EACH
        assert rows[kind][0] > EACH / 2, "most damage is refused"
        assert rows[kind][3:] == [0, 0, 0, 0]

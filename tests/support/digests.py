"""Digests of generated code and PTX, recorded in `tests/support/digests.json`: moving source changes neither.

    assert_recorded("ptx", "sm_90a-16x64x256", compiled.ptx_digest)

They hold for the versions of torch and Triton that they were recorded with; with others nothing is compared.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from filelock import FileLock

PATH = Path(__file__).with_name("digests.json")
KINDS = ("code", "ptx")
ANEW = (
    "If it was meant to change, record anew with MICROMIX_RECORD_DIGESTS=1 "
    "pytest tests/lowering/test_codegen.py tests/targets"
)


def versions() -> dict[str, str]:
    """What besides our source decides what is generated."""
    return {"torch": str(torch.__version__), "triton": str(triton.__version__)}


def assert_recorded(kind: str, key: str, digest: str, *, may_lack: bool = False) -> None:
    """Fail if another digest is recorded, or none though it may not lack. While recording, record it instead."""
    if os.environ.get("MICROMIX_RECORD_DIGESTS"):
        record(kind, key, digest)
        return
    recorded = json.loads(PATH.read_text())
    if recorded["versions"] != versions():
        return
    found = recorded[kind].get(key)
    if found is None:
        assert may_lack, f"No digest of the {kind} of {key!r} is recorded. {ANEW}."
    else:
        assert found == digest, f"The {kind} of {key!r} has the digest {digest}, recorded is {found}. {ANEW}."


def record(kind: str, key: str, digest: str) -> None:
    """Write one digest. Those of other versions go; tests that run in several processes take turns."""
    with FileLock(Path(tempfile.gettempdir()) / "micromix-digests.lock"):
        recorded: dict[str, Any] = json.loads(PATH.read_text()) if PATH.exists() else {}
        if recorded.get("versions") != versions():
            recorded = {"versions": versions(), **{name: {} for name in KINDS}}
        recorded[kind][key] = digest
        PATH.write_text(json.dumps(recorded, indent=2, sort_keys=True) + "\n")


def of_code(code: str) -> str:
    """16 hexadecimal digits of the SHA-256 of a module that Inductor generated.

    Our modules count by their last names only, for they move. Left out: comments, which name files, lines and places in
    caches; docstrings, which name modules; the hash of the installed Triton, which is another for every build.
    """
    bare = re.sub(r"\bmicromix_compile\.(?:\w+\.)*(?=\w)", "", _bare(code))
    return hashlib.sha256(bare.encode()).hexdigest()[:16]


def _bare(code: str) -> str:
    """A module's code without comments and docstrings, and so the kernels in it, which are strings."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            node.body = [statement for statement in node.body if not _is_text(statement)] or [ast.Pass()]
        elif isinstance(node, ast.Dict):
            items = [(key, value) for key, value in zip(node.keys, node.values, strict=True) if not _is_hash(key)]
            node.keys, node.values = [key for key, _ in items], [value for _, value in items]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "async_compile.triton":
            source = node.args[1]
            assert isinstance(source, ast.Constant)
            source.value = _bare(str(source.value))
    return ast.unparse(tree)


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)


def _is_hash(key: ast.expr | None) -> bool:
    return isinstance(key, ast.Constant) and key.value == "backend_hash"

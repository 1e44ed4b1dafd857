"""Building, keeping and loading the compiled CPU kernels, and what serves without them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from support.products import packed_rows

from micromix_compile import ops, templates
from micromix_compile.numerics import reference
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.targets import cpu, cpu_cache

if TYPE_CHECKING:
    from collections.abc import Callable

    Split = tuple[int, int, int]

OP_NAMES = ("reorder_quantize", "rms_norm_reorder_quantize", "mixed_mx_mm")


def test_status_names_the_library_and_its_instruction_set() -> None:
    status = cpu.status()
    assert status.available
    assert status.reason == ""
    assert status.isa in ("amx-bf16", "avx512-bf16", "portable")
    assert status.library is not None
    assert status.library == cpu.build(), "a second build must find the first one's file"
    assert status.threads == torch.get_num_threads()


def test_the_library_is_named_after_all_that_its_code_depends_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "kernel.cpp").write_text("first")
    monkeypatch.setattr(templates, "cpu_sources", lambda: [tmp_path / "kernel.cpp"])
    names = {cpu._digest(["-O3"]), cpu._digest(["-O2"])}
    (tmp_path / "kernel.cpp").write_text("second")
    names.add(cpu._digest(["-O3"]))
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(cpu._digest(["-O3"]))
    monkeypatch.setattr(cpu, "_cpu_identity", lambda: "another machine")
    names.add(cpu._digest(["-O3"]))
    assert len(names) == 5


FAILING_COMPILER = 'import sys; sys.exit(sys.argv[1] != "--version" and "no such flag")'

PLAIN_PATH_SCRIPT = """
import json, logging, torch
from micromix_compile.targets import cpu, cpu_cache
from micromix_compile import ops
from micromix_compile.numerics import reference
records = []
handler = logging.Handler()
handler.emit = lambda record: records.append((record.levelname, record.getMessage()))
logging.getLogger("micromix_compile").addHandler(handler)
x, perm = torch.randn(3, 64), torch.randperm(64)
for _ in range(2):
    got = ops.reorder_quantize(x, perm, 32, 0, 32, "e2m3", "rceil", "same", 0)
want = reference.reorder_quantize(x, perm, (32, 0, 32), fp6="e2m3")
equal = all(torch.equal(a, b) for a, b in zip(got, want))
status = cpu.status()
print(json.dumps([equal, status.available, status.reason, records]))
"""


@pytest.mark.parametrize(
    ("environment", "reason", "warnings"),
    [
        ({"CXX": "/nowhere/c++"}, "/nowhere/c++' did not run", 1),
        ({"CXX": f"{sys.executable} -c '{FAILING_COMPILER}'"}, "no such flag", 1),
        ({"MICROMIX_NATIVE": "0"}, "MICROMIX_NATIVE=0 is set", 0),
    ],
    ids=["no compiler", "failing compiler", "switched off"],
)
def test_without_a_library_plain_pytorch_serves_and_the_log_says_why(
    tmp_path: Path, environment: dict[str, str], reason: str, warnings: int
) -> None:
    env = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **environment}
    command = [sys.executable, "-c", PLAIN_PATH_SCRIPT]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    equal, available, said, records = json.loads(done.stdout)
    assert equal
    assert not available
    assert reason in said
    messages = [message for level, message in records if level == "WARNING"]
    assert len(messages) == warnings
    assert all(reason in message for message in messages)


def test_operands_that_the_kernels_do_not_serve_get_the_errors_of_the_reference() -> None:
    """They would come back for ever: the dispatcher has no other kernel for them."""
    x, perm = torch.zeros(2, 64), torch.arange(64)
    kernels = cpu.CompiledExact()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        kernels.quantize("none", x, None, 0.0, perm.to("meta"), (32, 0, 32), "e2m3", "rceil")
    q = reference.reorder_quantize(x, perm, (32, 0, 32), fp6="e2m3")
    weight = PackedWeight(*packed_rows(3, (32, 0, 32), "e2m3"))
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        kernels.multiply(q._replace(scale=q.scale.to("meta")), weight, None, "e2m3", torch.float32)


def test_a_tensor_of_torch_s_own_quantization_gets_the_error_of_the_reference() -> None:
    """It lies in memory as others do, but torch calls other kernels for it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch 2.13 calls it deprecated
        x = torch.quantize_per_tensor(torch.randn(3, 32), 0.1, 0, torch.qint8)
    with pytest.raises(TypeError, match=r"x must be float32, bfloat16 or float16, got torch.qint8"):
        ops.reorder_quantize(x, torch.arange(32), 32, 0, 0, "e2m3", "fit", "same", 0)


def test_what_arrives_at_the_loaded_kernels_is_theirs() -> None:
    x, up, perm = torch.randn(3, 64), torch.randn(3, 64), torch.randperm(64)
    weight = PackedWeight(*packed_rows(3, (32, 0, 32), "e2m3"))
    kernels, layout = cpu.CompiledExact(), (perm, (32, 0, 32), "e2m3", "rceil")
    for producer, other in (("none", None), ("rms_norm", torch.rand(64)), ("silu_mul", up)):
        with torch.profiler.profile() as profile:
            q = kernels.quantize(producer, x, other, 1e-6, *layout)
            kernels.multiply(q, weight, None, "e2m3", torch.float32)
        called = {event.key for event in profile.key_averages()} & {f"micromix::{name}" for name in OP_NAMES}
        quantizer = "rms_norm_reorder_quantize" if producer == "rms_norm" else "reorder_quantize"
        assert called == {f"micromix::{quantizer}", "micromix::mixed_mx_mm"}


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of one library, which a compiler that only copies made; later builds find it or copy again."""
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\necho version\n[ "$1" = --version ] || while [ "$1" != -o ]; do shift; done\n'
                        '[ "$1" = --version ] || echo library > "$2"\n', "utf-8")  # fmt: skip
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(cpu, "_cache_dir", lambda: tmp_path / "cache")
    return cpu.build()


def test_a_library_that_is_whole_is_used_where_there_is_no_compiler(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.read_text() == "library\n"
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert cpu.build() == cached


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:3])


def make_foreign(path: Path) -> None:
    path.write_text("another library")


DAMAGES = {
    "truncated": (truncate, r"its content \(3 bytes\) is not what was compiled"),
    "empty": (lambda path: path.write_bytes(b""), r"its content \(0 bytes\)"),
    "foreign": (make_foreign, "is not what was compiled"),
    "writable": (lambda path: path.chmod(0o770), r"can be written by other users \(mode 770\)"),
    "a link": (lambda path: (path.rename(path.with_suffix("")), path.symlink_to(path.with_suffix(""))), "is no file"),
}


@pytest.mark.parametrize(("damage", "reason"), DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_refused_without_a_compiler_and_made_anew_with_one(
    cached: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], object], reason: str
) -> None:
    damage(cached)
    with monkeypatch.context() as context:
        context.setenv("CXX", "/nowhere/c++")
        with pytest.raises(cpu.NativeBuildError, match=reason):
            cpu.build()
    assert cpu.build() == cached
    assert cpu.build().read_text() == "library\n"


def test_a_library_of_another_user_is_refused(cached: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = cached.stat().st_uid
    monkeypatch.setattr(cpu_cache.os, "getuid", lambda: owner + 1)
    if owner != 0:
        assert cpu_cache.why_not(cached) == f"{cached.parent} belongs to user {owner}, not to {owner + 1} or root"
        return
    os.chown(cached, 12345, -1)
    assert f"{cached} belongs to user 12345, not to 1 or root" in str(cpu_cache.why_not(cached))


def test_other_users_may_read_a_library_and_one_that_cannot_be_read_is_refused(
    cached: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cached.stat().st_mode & 0o777 == 0o755

    def denied(path: Path) -> str:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(cpu_cache, "_digest", denied)
    assert cpu_cache.why_not(cached) == f"it can't be read: [Errno 13] Permission denied: '{cached}'"
    assert cpu_cache.find(cached.parent, "micromix", "*") is None
    monkeypatch.setattr(cpu_cache, "find", lambda folder, *_: denied(folder))
    with pytest.raises(cpu.NativeBuildError, match=f"cannot use {cached.parent}: .* Permission denied"):
        cpu.build()


def test_a_folder_that_the_users_group_can_write_to_is_closed(cached: Path) -> None:
    cached.parent.chmod(0o775)
    assert cpu.build() == cached
    assert cached.parent.stat().st_mode & 0o777 == 0o755


def test_what_killed_builds_leave_is_removed_when_it_is_old(cached: Path) -> None:
    old, new = cached.parent / "build-old", cached.parent / "build-new"
    for folder in (old, new):
        folder.mkdir()
        (folder / "kernel.o").touch()
    os.utime(old, (0, 0))
    cached.unlink()
    assert cpu.build() == cached
    assert not old.exists()
    assert new.exists()


def test_a_library_without_our_kernels_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with pytest.raises(cpu.NativeBuildError, match=r"cannot load .*micromix_isa"):
        cpu._load_library(Path(torch.__file__).parent / "lib" / "libc10.so")

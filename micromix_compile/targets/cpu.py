"""The compiled CPU kernels: built once per machine, kept in the user's cache, loaded on first use.

The sources are in `templates/cpu`; once loaded, they are the dispatcher's for the exact ops with CPU tensors. Without a
compiler, or with MICROMIX_NATIVE=0 in the environment, plain PyTorch serves, and the log says so.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs
import torch
from torch import Tensor

from micromix_compile import templates
from micromix_compile.numerics import producers
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets import cpu_cache
from micromix_compile.targets.kernels import PlainCache, PlainExact, PlainGrouped

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import PackedWeight, Split

logger = logging.getLogger(__name__)

DISABLE_VARIABLE: Final = "MICROMIX_NATIVE"
"""Environment variable: 0 leaves the CPU to the plain PyTorch implementations."""

_COMPILE_FLAGS: Final = ("-O3", "-std=c++20", "-march=native", "-fopenmp", "-fPIC", "-fvisibility=hidden")
_BUILD_TIMEOUT: Final = 600.0  # seconds for one source; a healthy compiler needs about ten
_ERROR_LINES: Final = 15  # of a failing compiler's messages


class NativeBuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message says why."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NativeStatus:
    """What serves the ops on this CPU.

    available: the compiled kernels are loaded. reason: why not, or "" where they are.
    isa: "amx-bf16", "avx512-bf16" or "portable"; "" where they are not. library: the loaded file.
    threads: how many threads the ops use.
    """

    available: bool
    reason: str
    isa: str
    library: Path | None
    threads: int


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of the one attempt to load: a library and its instruction set, or a reason."""

    library: Path | None = None
    isa: str = ""
    reason: str = ""


_lock = threading.Lock()
_outcome: _Outcome | None = None


def load() -> bool:
    """Build (if need be) and load the kernels. Returns whether they serve CPU tensors; tries once per process."""
    global _outcome
    with _lock:
        if _outcome is None:
            _outcome = _attempt()
        return _outcome.library is not None


def status() -> NativeStatus:
    """What serves the ops on this CPU, after `load`."""
    load()
    outcome = _outcome
    assert outcome is not None, "load always leaves an outcome"
    return NativeStatus(
        available=outcome.library is not None,
        reason=outcome.reason,
        isa=outcome.isa,
        library=outcome.library,
        threads=torch.get_num_threads(),
    )


class CompiledExact(PlainExact):
    """The compiled kernels, loaded, by way of the dispatcher, which knows them.

    What does not lie in plain CPU memory, such as operands on several devices, is the reference's, whose errors fit.
    """

    def quantize(
        self, producer: str, x: Tensor, other: Tensor | None, eps: float, channel_perm: Tensor, split: Split, fp6: str,
        scale_rounding: str, *, activations: str = "same", rotated: int = 0,
    ) -> QuantizedActivation:  # fmt: skip
        """See `ExactKernels`. There is none behind SiLU times up."""
        layout = (channel_perm, *split, fp6, scale_rounding, activations, rotated)
        if not _serves(x, other, channel_perm):
            return super().quantize(
                producer, x, other, eps, channel_perm, split, fp6, scale_rounding, activations=activations,
                rotated=rotated,
            )  # fmt: skip
        if producer == "rms_norm":
            return QuantizedActivation(*torch.ops.micromix.rms_norm_reorder_quantize(x, other, eps, *layout))
        producers.check_produce(producer, x, other)
        rows = producers.produce(producer, x, other, eps)
        return QuantizedActivation(*torch.ops.micromix.reorder_quantize(rows, *layout))

    def multiply(
        self, x: QuantizedActivation, w: PackedWeight, bias: Tensor | None, fp6: str, out_dtype: torch.dtype
    ) -> Tensor:
        """See `ExactKernels`."""
        if not _serves(*x, *w, bias):
            return super().multiply(x, w, bias, fp6, out_dtype)
        out: Tensor = torch.ops.micromix.mixed_mx_mm(*x, *w, bias, fp6, out_dtype)
        return out


class CompiledGrouped(PlainGrouped):
    """The compiled product with experts, in the same way."""

    def multiply(
        self, x: QuantizedActivation, rows: Tensor, offs: Tensor, w: PackedWeight, bias: Tensor | None, fp6: str,
        out_dtype: torch.dtype,
    ) -> Tensor:  # fmt: skip
        """See `GroupedKernels`."""
        if not _serves(*x, rows, offs, *w, bias):
            return super().multiply(x, rows, offs, w, bias, fp6, out_dtype)
        out: Tensor = torch.ops.micromix.grouped_mx_mm(*x, rows, offs, *w, bias, fp6, out_dtype)
        return out


class CompiledCache(PlainCache):
    """The compiled writing of caches, in the same way."""

    def write(
        self, key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
        scale_rounding: str,
    ) -> None:  # fmt: skip
        """See `CacheKernels`."""
        operands = (key, value, position, k_q, k_scale, v_q, v_scale)
        write = torch.ops.micromix.write_kv if _serves(*operands) else super().write
        write(*operands, scale_rounding)


COMPILED_CACHE: Final = CompiledCache()
COMPILED_EXACT: Final = CompiledExact()
COMPILED_GROUPED: Final = CompiledGrouped()


def _serves(*operands: Tensor | None) -> bool:
    tensors = [one for one in operands if one is not None]
    return all(one.device.type == "cpu" and one.layout == torch.strided and not one.is_quantized for one in tensors)


def build(flags: tuple[str, ...] = ()) -> Path:
    """The compiled library, from the cache or from the compiler. flags: added to the compiler's.

    One from the cache is used only whole and if nobody else can write to it. Where no compiler is at hand, one that any
    compiler made will do. Several processes may build at once: each renames a file of its own. Raises
    NativeBuildError.
    """
    folder = _cache_dir()
    try:
        return _found_or_compiled(folder, [*_COMPILE_FLAGS, *_machine_flags(), *flags])
    except OSError as error:
        raise NativeBuildError(f"cannot use {folder}: {error}") from error


def _found_or_compiled(folder: Path, arguments: list[str]) -> Path:
    """The library in `folder`. Raises OSError where that can't be used, and NativeBuildError."""
    compiler = shlex.split(os.environ.get("CXX", "")) or [_default_compiler()]
    stem = f"micromix-{_digest(arguments)}"
    try:
        made_by = hashlib.sha256(_run([*compiler, "--version"]).encode()).hexdigest()[:8]
    except NativeBuildError as error:
        if library := cpu_cache.find(folder, stem, "*"):
            return library
        raise NativeBuildError(f"{error}{cpu_cache.reasons(folder, stem)}") from error
    if library := cpu_cache.find(folder, stem, made_by):
        return library
    logger.info("compiling CPU kernels, once per machine (in %s; about 20 seconds)", folder)
    with cpu_cache.scratch(folder) as scratch:
        return cpu_cache.keep(_compile(compiler, arguments, scratch), folder, f"{stem}-{made_by}")


def _default_compiler() -> str:
    """g++ before c++, as Inductor has it: c++ may be a wrapper whose static libstdc++ clashes with torch's."""
    return next((name for name in ("g++", "c++", "clang++") if shutil.which(name)), "c++")


def _attempt() -> _Outcome:
    if os.environ.get(DISABLE_VARIABLE) == "0":
        return _Outcome(reason=f"{DISABLE_VARIABLE}=0 is set")
    try:
        library = build()
        return _Outcome(library=library, isa=_load_library(library))
    except NativeBuildError as error:
        logger.warning("no compiled CPU kernels, plain PyTorch runs instead (much slower): %s", error)
        return _Outcome(reason=str(error))


def _load_library(library: Path) -> str:
    """Register the library's kernels. Returns the instruction set that they use."""
    try:
        torch.ops.load_library(str(library))
        isa = ctypes.CDLL(str(library)).micromix_isa
    except (OSError, AttributeError, RuntimeError) as error:  # RuntimeError: it registers what is registered
        raise NativeBuildError(f"cannot load {library}: {error}") from error
    isa.restype = ctypes.c_char_p
    name: bytes = isa()
    return name.decode()


def _compile(compiler: list[str], arguments: list[str], scratch: Path) -> Path:
    """Compile every source and link them in `scratch`."""
    from torch.utils.cpp_extension import include_paths

    includes = [f"-isystem{path}" for path in include_paths()]
    sources = [path for path in templates.cpu_sources() if path.suffix == ".cpp"]
    objects = [scratch / f"{source.stem}.o" for source in sources]
    commands = [
        [*compiler, *arguments, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(_run, commands))
    library = scratch / "library.so"
    torch_libraries = Path(torch.__file__).parent / "lib"
    # Not -fopenmp: the OpenMP that libtorch_cpu brings must serve, a second one would have its own threads.
    link = ["-shared", *map(str, objects), "-o", str(library), f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"]
    _run([*compiler, *link, f"-Wl,-rpath,{torch_libraries}"])
    return library


def _run(command: list[str]) -> str:
    """Standard output of a compiler's command. Raises NativeBuildError where it cannot run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_BUILD_TIMEOUT, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeBuildError(f"the C++ compiler {command[0]!r} did not run: {error}") from error
    if done.returncode:
        messages = "\n".join((done.stderr or done.stdout).strip().splitlines()[:_ERROR_LINES])
        raise NativeBuildError(f"the C++ compiler {command[0]!r} failed with status {done.returncode}:\n{messages}")
    return done.stdout


def _cache_dir() -> Path:
    return Path(platformdirs.user_cache_dir("micromix-compile"))


def _machine_flags() -> list[str]:
    # GCC's tuning for many server CPUs prefers 256-bit vectors, which halves the quantizer's speed.
    return ["-mprefer-vector-width=512"] if platform.machine() in ("x86_64", "AMD64") else []


def _digest(arguments: list[str]) -> str:
    """Names a library by everything that its code depends on but the compiler, which may be gone."""
    parts = [*arguments, torch.__version__, sys.platform, _cpu_identity()]
    parts += [source.name + "\0" + source.read_text(encoding="utf-8") for source in templates.cpu_sources()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _cpu_identity() -> str:
    """What -march=native depends on: the machine type and, where the system tells, model and flags of the CPU."""
    lines = []
    with contextlib.suppress(OSError):
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        keys = ("model", "flags", "Features", "CPU implementer", "CPU part")
        lines = sorted({line for line in text.splitlines() if line.startswith(keys)})
    return "\n".join((platform.machine(), platform.processor(), *lines))

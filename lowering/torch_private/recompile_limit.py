"""What counts towards Dynamo's recompile limit.

Dynamo counts whatever was compiled of a function, whoever compiled it, and past the limit runs the function as it is:
here that would be unquantized, and for other backends slow. So versions that this backend compiled count for nobody
else, those of one model not for another, nor those of one recipe for the next, and those of a phase that is over for
nobody. What is left is what the limit is for: one model, compiled for ever new shapes.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch._C._dynamo import eval_frame
from torch._dynamo import convert_frame
from torch._dynamo import eval_frame as dynamo_eval_frame
from torch._guards import CompileContext, CompileId

from micromix_compile.lowering.torch_private.changed import changed

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from types import CodeType

__all__ = ["CompileId", "Counter", "count_apart", "current_compile_id", "forget"]

MARK: Final = "_micromix_counts_apart"
CHECK: Final = "exceeds_recompile_limit"
"""The function of Dynamo's module convert_frame that says whether a version more may be compiled."""
CODE, BACKEND = "code", "compiler_fn"
"""Variables of its caller: what is to be compiled, and by which backend."""


class Counter(Protocol):
    """What a backend of ours says about the versions that it compiled. What it raises reaches the caller."""

    def check(self) -> None:
        """Called before Dynamo looks at a function, also where nothing will be left of it to compile."""

    def counted(self, backend: Any) -> frozenset[CompileId] | None:
        """The versions that count beside what `backend` is about to compile; None: all of its own."""

    def gave_up(self, backend: Any, function: str, limit: str) -> None:
        """Called where Dynamo is about to run `function` as it is, at `limit`."""


def current_compile_id() -> CompileId:
    """Of the version that Dynamo is compiling."""
    compile_id = CompileContext.current_compile_id()
    assert compile_id is not None, "a backend is called while Dynamo compiles"
    return compile_id


def count_apart(backend: Callable[..., Any], counter: Counter) -> None:
    """From now on versions that `backend`, as torch.compile gets it, compiles count as `counter` says.

    Raises RuntimeError if this torch asks elsewhere whether there are too many.
    """
    setattr(backend, MARK, counter)
    original = getattr(convert_frame, CHECK, None)
    if original is None:
        raise changed(f"a function {CHECK} in {convert_frame.__name__}")
    if not hasattr(original, MARK):
        ours = functools.partial(_exceeds, original)
        setattr(ours, MARK, True)
        setattr(convert_frame, CHECK, ours)


def _counter_of(backend: Any) -> Counter | None:
    """The counter of a backend as a version knows it, perhaps with options around it."""
    return getattr(getattr(backend, "compiler_fn", backend), MARK, None)


def _exceeds(original: Callable[..., tuple[bool, str]], cache_size: Any, compile_id: CompileId) -> tuple[bool, str]:
    """Dynamo's own check, of the versions that count."""
    code, backend = _asked(sys._getframe(1).f_locals)
    counter = _counter_of(backend)
    if counter is not None:
        counter.check()
    ignored = _ignored(_versions(code), backend, counter)
    if not ignored and counter is None:
        return original(cache_size, compile_id)
    exceeded, limit = original(_without(cache_size, ignored), _earlier(compile_id, ignored, counter))
    if exceeded and counter is not None:
        function = f"{code.co_name} ({code.co_filename}:{code.co_firstlineno})"
        counter.gave_up(backend, function, f"torch._dynamo.config.{limit}={getattr(torch._dynamo.config, limit)}")
    return exceeded, limit


def _asked(variables: Mapping[str, Any]) -> tuple[CodeType, Any]:
    """What is to be compiled and by which backend, from the variables of whoever asks."""
    if not {CODE, BACKEND} <= set(variables):
        raise changed(f"variables {CODE} and {BACKEND} where {CHECK} is called, there are {', '.join(variables)}")
    return variables[CODE], dynamo_eval_frame.innermost_backend(variables[BACKEND])


def _versions(code: CodeType) -> list[Any]:
    """What was compiled of `code`, in the present call's region where torch has such (`isolate_recompiles`)."""
    versions = eval_frame._debug_get_cache_entry_list(code)
    if not hasattr(eval_frame, "get_eval_frame_isolate_recompiles_id"):
        return list(versions)
    region = eval_frame.get_eval_frame_isolate_recompiles_id()
    return [version for version in versions if version.isolate_recompiles_id == region]


def _ignored(versions: list[Any], backend: Any, counter: Counter | None) -> int:
    """How many of `versions` don't count beside what `backend` is about to compile."""
    if counter is None:
        return sum(_counter_of(version.backend) is not None for version in versions)
    counted = counter.counted(backend) if versions else None
    return sum(v.backend != backend or (counted is not None and v.compile_id not in counted) for v in versions)


def _without(cache_size: Any, ignored: int) -> Any:
    """Counts of versions, less those that don't count."""
    counts = {field.name: max(getattr(cache_size, field.name) - ignored, 0) for field in dataclasses.fields(cache_size)}
    return dataclasses.replace(cache_size, **counts)


def _earlier(compile_id: CompileId, ignored: int, counter: Counter | None) -> CompileId:
    """`compile_id` as if what doesn't count had not been compiled: Dynamo limits attempts, too.

    Versions of ours that are gone were recompiled for a new phase, recipe or model: only those that are left count.
    """
    attempts = 0 if counter is not None else max((compile_id.frame_compile_id or 0) - ignored, 0)
    return dataclasses.replace(compile_id, frame_compile_id=attempts)


def forget(backend: Callable[..., Any]) -> None:
    """Free `backend` and, of functions that nothing else was compiled of, what it compiled."""
    with convert_frame.compile_lock:
        for key, cached in list(dynamo_eval_frame.cached_backends.items()):
            if getattr(cached, "compiler_fn", cached) is backend:
                del dynamo_eval_frame.cached_backends[key]
        codes = [reference() for reference in convert_frame.input_codes.seen]
        for code in dict.fromkeys(code for code in codes if code is not None):
            versions = eval_frame._debug_get_cache_entry_list(code)
            if versions and all(getattr(v.backend, "compiler_fn", v.backend) is backend for v in versions):
                eval_frame.reset_code(code)

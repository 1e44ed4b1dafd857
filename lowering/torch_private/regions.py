"""Which module a call of torch.compile covers, and what runs in it and around it."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import dataclass
from functools import cache
from types import CodeType
from typing import TYPE_CHECKING, Any, Final

from torch import fx, nn
from torch._C import _functorch
from torch._dynamo import eval_frame
from torch._dynamo.symbolic_convert import InstructionTranslator

from micromix_compile.lowering.torch_private.changed import changed
from micromix_compile.lowering.torch_private.dynamo import source_of, text_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from types import FrameType

    from torch._guards import Source

WRAPPER: Final = "compile_wrapper"
"""The function in Dynamo's module eval_frame that a call of what was compiled runs first."""
AHEAD: Final = "aot_compile"
"""The one beside it that compiles for a file."""
WRAPPED: Final = "fn"
"""Their variable that holds what was compiled."""


@dataclass(frozen=True, slots=True)
class Region:
    """What one call of torch.compile covers, seen from a frame that runs in it.

    compiled: the module that it was given, or the owner of the method; else the outermost module that runs inside.
    running: modules that run inside, innermost first. around: those that run around it, likewise.
    """

    compiled: nn.Module | None
    running: Sequence[nn.Module]
    around: Sequence[nn.Module]


def running_region() -> Region:
    """The region that this thread runs or compiles, found by the frame of torch.compile's own wrapper.

    Raises RuntimeError if this torch has no such wrapper.
    """
    _expect_wrapper()
    frame: FrameType | None = sys._getframe()
    running: list[nn.Module] = []
    compiled: nn.Module | None = None
    while frame is not None and not _is_wrapper(frame.f_code, WRAPPER, AHEAD):
        _add_module(running, frame)
        frame = frame.f_back
    if frame is not None:
        function = frame.f_locals[WRAPPED]
        owner = getattr(function, "__self__", getattr(function, "__wrapped__", function))
        compiled = original_module(owner) if isinstance(owner, nn.Module) else None
    around: list[nn.Module] = []
    while frame is not None:
        _add_module(around, frame)
        frame = frame.f_back
    if compiled is None and running:
        compiled = running[-1]
    return Region(compiled, running, [module for module in around if module is not compiled])


def compiles_ahead() -> bool:
    """Whether this thread compiles for `torch.compile(...).aot_compile`, and not for a call."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and not _is_wrapper(frame.f_code, WRAPPER, AHEAD):
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == AHEAD


def _is_wrapper(code: CodeType, *names: str) -> bool:
    return code.co_name in names and code.co_filename == eval_frame.__file__ and WRAPPED in code.co_freevars


@cache
def _expect_wrapper() -> None:
    """Raise RuntimeError unless Dynamo has the function whose frame says what was compiled."""
    codes = [value.__code__ for kind in _classes() for value in vars(kind).values() if hasattr(value, "__code__")]
    while codes:
        code = codes.pop()
        if _is_wrapper(code, WRAPPER):
            return
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    raise changed(f"a function {WRAPPER} with the variable {WRAPPED} in {eval_frame.__name__}")


def _classes() -> list[type]:
    return [value for value in vars(eval_frame).values() if isinstance(value, type)]


def _add_module(found: list[nn.Module], frame: FrameType) -> None:
    """Note the module whose method `frame` runs."""
    if "self" not in frame.f_code.co_varnames:
        return  # a frame keeps alive what was read of it, so others' variables are not
    owner = frame.f_locals.get("self")
    if not isinstance(owner, nn.Module) or isinstance(owner, fx.GraphModule):
        return
    module = original_module(owner)
    if all(module is not other for other in found):
        found.append(module)


def source_modules(placeholders: Iterable[fx.Node]) -> list[nn.Module]:
    """The outermost modules through which the frame that is being compiled reaches these graph inputs."""
    frame = InstructionTranslator.current_tx().output.root_tx
    scope = {"L": frame.f_locals, "G": frame.f_globals}
    found: list[nn.Module] = []
    for node in placeholders:
        source, module = source_of(node), None
        while source is not None:
            value = _value_of(source, scope)
            module = original_module(value) if isinstance(value, nn.Module) else module
            source = getattr(source, "base", None)
        if module is not None and all(module is not other for other in found):
            found.append(module)
    return found


def _value_of(source: Source, scope: dict[str, Any]) -> object:
    """What a source stands for; None for sources that speak of more than values that the frame reaches."""
    try:
        return eval(text_of(source), dict(scope))
    except (AttributeError, KeyError, IndexError, NameError, NotImplementedError, SyntaxError, TypeError):
        return None


def original_module(module: nn.Module) -> nn.Module:
    """The user's module under torch.compile's wrapper. Raises TypeError for what is no module."""
    original = getattr(module, "_orig_mod", module)
    if not isinstance(original, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {type(module).__name__}")
    return original


@contextlib.contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """Within it, modules of `model` that were compiled in place (`module.compile()`) run as they are."""
    compiled = [module for module in model.modules() if module._compiled_call_impl is not None]
    calls = [module._compiled_call_impl for module in compiled]
    for module in compiled:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, call in zip(compiled, calls, strict=True):
            module._compiled_call_impl = call


def running_transform() -> str | None:
    """The transform of torch.func, such as vmap, that is running now, under which Dynamo compiles nothing."""
    top, kinds = _functorch.peek_interpreter_stack(), _functorch.TransformType
    if top is None or top.key() not in (kinds.Vmap, kinds.Grad, kinds.Jvp):
        return None
    return str(top.key().name).lower()

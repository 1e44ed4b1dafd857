"""What `torch.compile(...).aot_compile` gets of the backend: a packed model's compiled graph, which a file can hold."""

from __future__ import annotations

import pickle
from typing import TYPE_CHECKING, Any, Self

import torch

from micromix_compile import ops  # noqa: F401 - a process that loads the file needs the operations
from micromix_compile.lowering.torch_private.inductor import SerializableCallable, bytes_of_compiled, compiled_of_bytes
from micromix_compile.ops.prepared import Kept

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.session.graph import AppendedInputs
    from micromix_compile.session.session import Session


class AheadGraph(SerializableCallable):
    """Compiled code, called with a graph's own inputs, packed tensors among them. The file has no session.

    appended: made of these alone. gradients: whether the code records them.
    """

    def __init__(self, compiled: Callable[..., Any], appended: AppendedInputs, *, gradients: bool) -> None:
        assert not appended.weights, "a packed model has its packed tensors as inputs"
        self._compiled, self._appended, self._gradients = compiled, appended, gradients
        self._kept = Kept(appended.made, guarded=True)

    def __call__(self, *args: Any) -> Any:
        """What the graph returns."""
        more = self._kept.of([args[i] for i in self._appended.keys], args)
        with torch.set_grad_enabled(self._gradients):
            return self._compiled(*args, *more)

    @classmethod
    def serialize_compile_artifacts(cls, fn: Self) -> bytes:
        """For the file."""
        return pickle.dumps((bytes_of_compiled(fn._compiled), fn._appended, fn._gradients))

    @classmethod
    def deserialize_compile_artifacts(cls, data: bytes) -> Self:
        """Of a file that the user trusts: torch unpickles all of it."""
        compiled, appended, gradients = pickle.loads(data)
        return cls(compiled_of_bytes(compiled), appended, gradients=gradients)


def check_ahead(session: Session) -> None:
    """Raise ValueError unless all that the compiled code of a model depends on can be in a file."""
    if not session.takes_no_options:
        model = session.model_id
        raise ValueError(
            f"aot_compile takes a model that quantize_ has packed, {model} holds plain linears: pack it first"
        )

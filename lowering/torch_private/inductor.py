"""Compiling a graph with Inductor, its options, and passes of one's own on its graphs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch._inductor
import torch._inductor.config
from torch._dynamo.aot_compile_types import BundledAOTAutogradSerializableCallable, SerializableCallable
from torch._inductor.custom_graph_pass import CustomGraphPass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import fx

__all__ = [
    "CustomGraphPass",
    "SerializableCallable",
    "bytes_of_compiled",
    "compile_nodes",
    "compile_package",
    "compile_with_inductor",
    "compiled_of_bytes",
    "inductor_options",
    "inductor_setting",
    "load_package",
    "mode_options",
]


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """torch.compile's own back half, with Inductor options patched in; with gradients where they are enabled."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(gm, list(example_inputs), config_patches=dict(patches))
    assert callable(compiled), "a graph that is not exported compiles to a function"
    return compiled


def bytes_of_compiled(compiled: Callable[..., Any]) -> bytes:
    """What `compile_with_inductor` returned while torch.compile's aot_compile ran, as bytes for a file."""
    return BundledAOTAutogradSerializableCallable.serialize_compile_artifacts(
        BundledAOTAutogradSerializableCallable(compiled)
    )


def compiled_of_bytes(data: bytes) -> Callable[..., Any]:
    """The reverse of `bytes_of_compiled`."""
    compiled: Callable[..., Any] = BundledAOTAutogradSerializableCallable.deserialize_compile_artifacts(data)
    return compiled


def compile_package(program: torch.export.ExportedProgram, path: str) -> None:
    """Write a package of AOTInductor."""
    torch._inductor.aoti_compile_and_package(program, package_path=path)


def load_package(path: str) -> Callable[..., Any]:
    """The function that a package of AOTInductor holds."""
    return torch._inductor.aoti_load_package(path)


def inductor_options() -> frozenset[str]:
    """Names that Inductor accepts as options."""
    return frozenset(torch._inductor.list_options())


def inductor_setting(name: str) -> Any:
    """An Inductor option as it is now."""
    return getattr(torch._inductor.config, name)


def mode_options(mode: str) -> dict[str, Any]:
    """What a mode of torch.compile stands for. Raises RuntimeError for an unknown one."""
    return dict(torch._inductor.list_mode_options(mode))


def compile_nodes(nodes: Iterable[fx.Node]) -> None:
    """Mark nodes that Inductor is to compile even where its option fallback_by_default is set."""
    for node in nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "compile_with_inductor": True}

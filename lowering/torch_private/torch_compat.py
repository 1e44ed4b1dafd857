"""The one place that touches private parts of torch, each with what it is for. Works on torch 2.11 to 2.15."""

from __future__ import annotations

import contextlib
import copy
import re
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from torch import Tensor, fx, nn
from torch._C import _functorch
from torch._dynamo import eval_frame
from torch._dynamo.guards import GuardBuilder
from torch._dynamo.source import AttrSource
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch._guards import TracingContext
from torch._subclasses.fake_tensor import FakeTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
    from types import FrameType

    from torch._guards import Source


def source_of(placeholder: fx.Node) -> Source | None:
    """Where Dynamo found a graph input, or None for inputs of another origin."""
    grapharg = placeholder.meta.get("grapharg")
    return None if grapharg is None else grapharg.source


def source_name(placeholder: fx.Node) -> str:
    """Python expression of a graph input, relative to the frame that was compiled."""
    source = source_of(placeholder)
    if source is None:
        return placeholder.name
    return _text_of(source)


def _text_of(source: Source) -> str:
    name = source.name  # a method up to 2.11, a property since
    return str(name() if callable(name) else name)


def parameter_name(placeholder: fx.Node) -> str:
    """The name of a weight as far as its frame knows it: "layers.0.fc" of L['self'].layers[0].fc.weight."""
    parts = re.findall(r"_(?:modules|parameters)\['([^']+)'\]", source_name(placeholder))
    return ".".join(parts).removesuffix(".weight") or placeholder.name


def guard_attribute(placeholder: fx.Node, *path: str) -> None:
    """Make Dynamo compile anew when the attribute at `path` of the tensor behind a graph input changes its value."""
    source = source_of(placeholder)
    assert source is not None, f"{placeholder.name} has no Dynamo source to guard"
    for attribute in path:
        source = AttrSource(source, attribute)
    TracingContext.get().guards_context.dynamo_guards.add(source.make_guard(GuardBuilder.EQUALS_MATCH))


def copy_graph_module(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy that may get more inputs: Dynamo reads its own graph's placeholders again after the backend returns."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    result = graph.graph_copy(gm.graph, copies)
    output = graph.output(result)
    output.meta = dict(gm.graph.output_node().meta)
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    for name in ("_param_name_to_source", "_backend_id"):
        if hasattr(gm, name):
            setattr(copy, name, getattr(gm, name))
    return copy


def add_static_input(graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
    """Append a graph input of example's shape whose address stays the same between calls (no CUDA-graph copies).

    example: a tensor, or a fake one of this graph.
    """
    last = graph.find_nodes(op="placeholder")[-1]
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node._dynamo_source = None
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    fake_mode = TracingContext.get().fake_mode
    assert fake_mode is not None, "Dynamo compiles under a fake tensor mode"
    is_fake = isinstance(example, FakeTensor)
    node.meta["example_value"] = example if is_fake else fake_mode.from_tensor(example, static_shapes=True)
    return node


def compile_with_inductor(
    gm: fx.GraphModule, example_inputs: Sequence[Any], patches: Mapping[str, Any]
) -> Callable[..., Any]:
    """torch.compile's own back half, with Inductor options patched in; with gradients where they are enabled."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(gm, list(example_inputs), config_patches=dict(patches))
    assert callable(compiled), "a graph that is not exported compiles to a function"
    return compiled


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


def inductor_options() -> frozenset[str]:
    """Names that Inductor accepts as options."""
    import torch._inductor

    return frozenset(torch._inductor.list_options())


def inductor_setting(name: str) -> Any:
    """An Inductor option as it is now."""
    import torch._inductor.config

    return getattr(torch._inductor.config, name)


def compile_nodes(nodes: Iterable[fx.Node]) -> None:
    """Mark nodes that Inductor is to compile even where its option fallback_by_default is set."""
    for node in nodes:
        node.meta["custom"] = {**(node.meta.get("custom") or {}), "compile_with_inductor": True}


def mode_options(mode: str) -> dict[str, Any]:
    """What a mode of torch.compile stands for. Raises RuntimeError for an unknown one."""
    import torch._inductor

    return dict(torch._inductor.list_mode_options(mode))


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
    """The region that this thread runs or compiles, found by the frame of torch.compile's own wrapper."""
    frame: FrameType | None = sys._getframe()
    running: list[nn.Module] = []
    compiled: nn.Module | None = None
    while frame is not None and not _is_compile_wrapper(frame):
        _add_module(running, frame)
        frame = frame.f_back
    if frame is not None:
        function = frame.f_locals["fn"]
        owner = getattr(function, "__self__", getattr(function, "__wrapped__", function))
        compiled = original_module(owner) if isinstance(owner, nn.Module) else None
    around: list[nn.Module] = []
    while frame is not None:
        _add_module(around, frame)
        frame = frame.f_back
    if compiled is None and running:
        compiled = running[-1]
    return Region(compiled, running, [module for module in around if module is not compiled])


def _is_compile_wrapper(frame: FrameType) -> bool:
    code = frame.f_code
    return code.co_name == "compile_wrapper" and code.co_filename == eval_frame.__file__ and "fn" in frame.f_locals


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
        return eval(_text_of(source), dict(scope))
    except (AttributeError, KeyError, IndexError, NameError, NotImplementedError, SyntaxError, TypeError):
        return None


def original_module(module: nn.Module) -> nn.Module:
    """The user's module under torch.compile's wrapper."""
    original = getattr(module, "_orig_mod", module)
    assert isinstance(original, nn.Module), "torch.compile wraps a module"
    return original


def running_transform() -> str | None:
    """The transform of torch.func, such as vmap, that is running now, under which Dynamo compiles nothing."""
    top, kinds = _functorch.peek_interpreter_stack(), _functorch.TransformType
    if top is None or top.key() not in (kinds.Vmap, kinds.Grad, kinds.Jvp):
        return None
    return str(top.key().name).lower()


UNKNOWN_ROWS = 4096
"""Taken for a dimension that depends on data: a large tile is right for any size, a small one slow for many."""


def size_hint(sizevars: Any, size: Any) -> int:
    """A likely value of a dimension that Inductor compiles for, symbolic or not."""
    return int(sizevars.optimization_hint(size, fallback=UNKNOWN_ROWS))


def is_at_least(sizevars: Any, size: Any, least: int) -> bool | None:
    """Whether a symbolic dimension is at least `least`; a guard then has other code compiled where it is otherwise.

    None, and no guard, if it depends on data or has an upper bound: whoever declared one does not want it narrowed.
    """
    from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols

    if free_unbacked_symbols(size) or sizevars.shape_env.bound_sympy(size).upper < sys.maxsize - 1:
        return None
    return bool(sizevars.evaluate_expr(size >= least))


def select_algorithm(name: str, choices: list[Any], inputs: list[Any], layout: Any) -> Any:
    """The fastest of Inductor's choices for an operation, or the only one without a measurement."""
    from torch._inductor.select_algorithm import autotune_select_algorithm

    selected = autotune_select_algorithm(name, choices, inputs, layout)
    return selected[0] if isinstance(selected, tuple) else selected  # (node, choice) from 2.12 on


def lower_kernel_launch(
    kernel: Any, grid: Sequence[Any], args: Mapping[str, Any], constexprs: Mapping[str, Any]
) -> None:
    """Add one launch of a user-defined Triton kernel to the graph that Inductor is lowering.

    args: nodes of its IR and integers by name, those that the kernel writes included. grid: up to three extents.
    With a constant LAUNCH_PDL it is launched with that option of Triton's, which Inductor's C++ wrapper lacks.
    """
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table, triton_kernel_wrapper_mutation
    from torch._inductor.ir import UserDefinedTritonKernel
    from torch._inductor.lowering import lowerings
    from torch._inductor.virtualized import V

    with _analysed_once(kernel, args, constexprs):
        lowerings[triton_kernel_wrapper_mutation](
            kernel_idx=kernel_side_table.add_kernel(kernel),
            constant_args_idx=kernel_side_table.add_constant_args(dict(constexprs)),
            grid=[(*grid, 1, 1)[:3]],
            tma_descriptor_metadata={},
            kwargs=dict(args),
        )
    if constexprs.get("LAUNCH_PDL"):
        last = V.graph.operations[-1]
        assert isinstance(last, UserDefinedTritonKernel), "the launch is the last operation of the graph"
        node: Any = last
        node.codegen = partial(_generate_with_pdl, node.codegen)


def _generate_with_pdl(generate: Callable[[Any], None], wrapper: Any) -> None:
    """Generate a launch and, the first time, its kernel with the option that Inductor gives only kernels of its own."""
    define = wrapper.define_kernel

    def define_with_pdl(name: str, body: str, *rest: Any, **options: Any) -> None:
        define(name, body.replace("triton_meta={", "triton_meta={'launch_pdl': True, ", 1), *rest, **options)

    wrapper.define_kernel = define_with_pdl
    try:
        generate(wrapper)
    finally:
        wrapper.define_kernel = define


_analyses: dict[Hashable, Any] = {}


@contextlib.contextmanager
def _analysed_once(kernel: Any, args: Mapping[str, Any], constexprs: Mapping[str, Any]) -> Iterator[None]:
    """Within it Inductor finds out what a kernel writes once for all launches that compile to the same code.

    It compiles the kernel to Triton's IR for that, at every launch: half of the time that a model of many layers takes.
    """
    from torch._higher_order_ops import triton_kernel_wrap

    # Another name from 2.13 on, and another result, which also speaks of the kernel's own argument names only.
    name = next(n for n in ("identify_accessed_tensors", "identify_mutated_tensors") if hasattr(triton_kernel_wrap, n))
    key = (kernel, *sorted(constexprs.items()), *((arg, _kind(value)) for arg, value in args.items()))
    analyse = getattr(triton_kernel_wrap, name)

    def remembered(kernel: Any, kwargs: Mapping[str, Any], *rest: Any) -> Any:
        if key not in _analyses:
            # What it does not know it takes for writing to every argument.
            unknown = {"LAUNCH_PDL": False} if "LAUNCH_PDL" in kwargs else {}
            _analyses[key] = analyse(kernel, {**kwargs, **unknown}, *rest)
        return copy.copy(_analyses[key])

    setattr(triton_kernel_wrap, name, remembered)
    try:
        yield
    finally:
        setattr(triton_kernel_wrap, name, analyse)


def _kind(value: Any) -> Hashable:
    """What Triton's code for a run-time argument depends on."""
    if isinstance(value, int):
        return ("int", value == 1, -(2**31) <= value < 2**31)
    return value if value is None else (type(value), value.get_dtype() if hasattr(value, "get_dtype") else None)

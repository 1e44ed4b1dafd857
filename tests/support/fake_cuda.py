"""Inductor's code for a GPU that isn't here: fake tensors on "cuda", a made-up device, and a stop before loading.

    with fake_cuda((10, 0)):
        source = generate(function, [((M, K), torch.bfloat16), ...])

Nothing runs: `generate` returns the text of the module that Inductor would load on that GPU. It must not share a
process with Triton's interpreter, so tests call it through `support.inductor_codegen`.
"""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from unittest import mock

import torch
import triton.runtime
from torch._dynamo.device_interface import CudaInterface, register_interface_for_device
from torch._inductor import compile_fx, config
from torch._inductor.fx_passes import joint_graph
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime import hints, triton_helpers
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from triton.backends.compiler import GPUTarget

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

MULTIPROCESSORS = {9: 132, 10: 148, 12: 170}


def _properties(capability: tuple[int, int]) -> SimpleNamespace:
    return SimpleNamespace(
        name=f"a GPU of compute capability {capability}",
        major=capability[0],
        minor=capability[1],
        multi_processor_count=MULTIPROCESSORS[capability[0]],
        total_memory=2**36,
        regs_per_multiprocessor=2**16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
        shared_memory_per_block=48 * 1024,
        shared_memory_per_block_optin=99 * 1024,
        L2_cache_size=2**26,
        gcnArchName="",
        is_integrated=0,
    )


def _answers(
    capability: tuple[int, int], properties: SimpleNamespace
) -> tuple[dict[str, Callable[..., Any]], dict[str, Callable[..., Any]], dict[str, Callable[..., Any]]]:
    """What both torch.cuda and Dynamo's interface to it answer, torch.cuda, and the interface."""
    everywhere: dict[str, Callable[..., Any]] = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: capability,
        "get_device_name": lambda *_: properties.name,
        "synchronize": lambda *_: None,
    }
    cuda = {
        **everywhere,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "_exchange_device": lambda _: 0,
        "_maybe_exchange_device": lambda _: 0,
        "get_rng_state": lambda *_: torch.zeros(16, dtype=torch.uint8),
        "set_rng_state": lambda *_: None,
        "is_current_stream_capturing": lambda: False,
    }
    interface = {
        **everywhere,
        "get_compute_capability": lambda *_: 10 * capability[0] + capability[1],
        "exchange_device": lambda _: 0,
        "maybe_exchange_device": lambda _: 0,
        "get_raw_stream": lambda _: 0,
        "is_triton_capable": lambda *_: True,
        "raise_if_triton_unavailable": lambda *_: None,
        "is_bf16_supported": lambda *_, **__: True,
    }
    return everywhere, cuda, interface


@contextlib.contextmanager
def fake_cuda(capability: tuple[int, int]) -> Iterator[None]:
    """Within it torch and Triton believe in one CUDA device of this compute capability."""
    properties = _properties(capability)
    number = 10 * capability[0] + capability[1]
    driver = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", number, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
        is_active=lambda: True,
    )
    everywhere, cuda, interface = _answers(capability, properties)
    register_patterns = joint_graph.lazy_init

    def register_patterns_on_cpu(*_: Any, **__: Any) -> None:  # it makes real tensors of the input's device
        register_patterns(torch.device("cpu"))

    with contextlib.ExitStack() as stack:

        def patch(owner: Any, **attributes: Any) -> None:
            for name, value in attributes.items():
                stack.enter_context(mock.patch.object(owner, name, value, create=True))

        patch(torch.cuda, **cuda)
        patch(CudaInterface, **{name: staticmethod(function) for name, function in interface.items()})
        patch(CudaInterface.Worker, get_device_properties=staticmethod(everywhere["get_device_properties"]),
              current_device=staticmethod(lambda: 0))  # fmt: skip
        patch(torch._C, _cuda_getCurrentRawStream=lambda _: 0)
        patch(torch.version, cuda="13.0")
        patch(type(triton.runtime.driver), active=property(lambda _: driver))
        patch(triton_helpers, set_driver_to_gpu=lambda: None)
        patch(fake_tensor, init_gpu_context=lambda _: None)  # which CUDA builds call for a first fake tensor
        patch(joint_graph, lazy_init=register_patterns_on_cpu)
        register_interface_for_device("cuda", CudaInterface)
        register_interface_for_device("cuda:0", CudaInterface)
        hints.DeviceProperties.create.cache_clear()
        yield


class _GeneratedError(Exception):
    """Carries the source out of Inductor before it loads it."""


def generate(
    function: Callable[..., Any], specs: Sequence[tuple[Sequence[int], torch.dtype]], *, dynamic_rows: bool = False,
    **options: Any,
) -> str:  # fmt: skip
    """Inductor's module for `function` of CUDA tensors with these shapes and dtypes.

    dynamic_rows: the first dimension of the first tensor, and all that are equal to it, are symbolic.
    options: Inductor's own.
    """

    def stop(graph: GraphLowering) -> None:
        wrapper, _ = graph.codegen()
        raise _GeneratedError(wrapper.value)

    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        tensors = [torch.empty(shape, dtype=dtype, device="cuda:0") for shape, dtype in specs]
    rows = specs[0][0][0]
    if dynamic_rows:
        tensors = [_with_dynamic_rows(mode, tensor, rows) for tensor in tensors]
    settings = {"force_disable_caches": True, "compile_threads": 1, "joint_graph_constant_folding": False, **options}
    with mock.patch.object(GraphLowering, "compile_to_module", stop), config.patch(settings), torch.no_grad():
        with mode:
            graph = make_fx(function, tracing_mode="fake")(*tensors)
        try:
            compile_fx.compile_fx(graph, tensors)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None:
                if isinstance(cause, _GeneratedError):
                    return str(cause)
                cause = cause.__cause__ or cause.__context__
            raise
    raise AssertionError("Inductor compiled without generating a module")


def _with_dynamic_rows(mode: FakeTensorMode, tensor: torch.Tensor, rows: int) -> torch.Tensor:
    sizes = [DimDynamic.DYNAMIC if i == 0 and n == rows else DimDynamic.STATIC for i, n in enumerate(tensor.shape)]
    meta = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    symbolic = mode.from_tensor(meta, symbolic_context=StatelessSymbolicContext(dynamic_sizes=sizes))
    with mode:
        return torch.empty(symbolic.shape, dtype=tensor.dtype, device="cuda:0")

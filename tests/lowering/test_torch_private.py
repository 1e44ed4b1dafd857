"""What relies on names and texts inside of torch: it works with this torch, and fails by name where torch changes."""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
import torch._inductor.compile_fx
from support.models import make_net
from torch import Tensor, fx, nn
from torch._dynamo import convert_frame
from torch._higher_order_ops import triton_kernel_wrap

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.lowering.inductor import PostGradPasses, source_files
from micromix_compile.lowering.torch_private import dynamo, recompile_limit, regions, user_kernels
from micromix_compile.lowering.torch_private.operators import argument_names, arguments_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]

PACKAGE = Path(micromix.__file__).parent
PRIVATE = re.compile(r"\btorch\.(_(?!_)\w+|fx\.experimental|utils\._pytree|nn\.modules\.conv)\b")
SAYS_TORCH = f"torch {re.escape(torch.__version__)} is not one that micromix-compile knows: expected "


def test_private_parts_of_torch_are_named_in_one_folder_only() -> None:
    bench = (PACKAGE.parent / "bench").glob("*.py")
    files = [path for path in (*source_files(PACKAGE), *bench) if "torch_private" not in path.parts]
    found = {str(path): PRIVATE.search(path.read_text("utf-8")) for path in files if path.suffix == ".py"}
    assert not {path: match[0] for path, match in found.items() if match}


@pytest.mark.parametrize("name", ["operators", "tensors", "tracing"])
def test_what_lower_layers_use_loads_neither_dynamo_nor_inductor(name: str) -> None:
    heavy = "[name for name in ('torch._dynamo', 'torch._inductor', 'triton') if name in sys.modules]"
    code = f"import sys, micromix_compile.lowering.torch_private.{name}; print({heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


# ---- dynamo


@torch.compiler.disable
def twice(x: Tensor) -> Tensor:
    """Breaks the graph of whoever calls it."""
    return 2 * x


class Masked(nn.Module):
    """Two layers in a list, a mask, and a break between them while a value is on the stack."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8)}) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.layers[0]["up"](x) * attention_mask
        x = x + twice(x)
        return self.layers[1]["up"](x)


def test_sources_name_weights_masks_and_what_follows_a_break() -> None:
    graphs: list[tuple[list[str], set[str]]] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        inputs = gm.graph.find_nodes(op="placeholder")
        assert all(dynamo.source_of(node) is not None for node in inputs)
        graphs.append((list(map(dynamo.source_name, inputs)), set(map(dynamo.parameter_name, inputs))))
        return gm.forward

    with torch.no_grad():
        torch.compile(Masked(), backend=backend)(torch.randn(2, 8), attention_mask=torch.ones(2, 8))
    (first, first_weights), (second, second_weights) = graphs
    assert first_weights >= {"layers.0.up", "layers.0.up.bias"}
    assert second_weights >= {"layers.1.up", "layers.1.up.bias"}
    assert any("attention_mask" in name for name in first)
    assert not dynamo.is_resumed(first)
    assert dynamo.is_resumed(second)


def test_packed_weights_are_inputs_that_inductor_need_not_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    net, x = make_net(layers=1), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    compile_inner = torch._inductor.compile_fx._compile_fx_inner
    moving: list[int] = []

    def watched(gm: fx.GraphModule, example_inputs: list[Any], **options: Any) -> Any:
        moving.append(len(set(range(len(example_inputs))) - set(options["static_input_idxs"])))
        return compile_inner(gm, example_inputs, **options)

    monkeypatch.setattr(torch._inductor.compile_fx, "_compile_fx_inner", watched)
    with torch._functorch.config.patch(enable_autograd_cache=False), torch.no_grad():
        torch.compile(net, backend="micromix", options={"recipe": recipe}, dynamic=False)(x)
    assert moving == [1]


# ---- regions


def test_without_dynamos_wrapper_a_region_is_not_guessed(monkeypatch: pytest.MonkeyPatch) -> None:
    regions._expect_wrapper.cache_clear()
    assert regions.running_region().compiled is None
    monkeypatch.setattr(regions, "WRAPPED", "renamed")
    regions._expect_wrapper.cache_clear()
    with pytest.raises(RuntimeError, match=f"{SAYS_TORCH}a function compile_wrapper with the variable renamed"):
        regions.running_region()
    regions._expect_wrapper.cache_clear()


# ---- recompile_limit


def test_without_dynamos_check_nothing_counts_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(convert_frame, recompile_limit.CHECK)
    with pytest.raises(RuntimeError, match=f"{SAYS_TORCH}a function exceeds_recompile_limit"):
        recompile_limit.count_apart(lambda *_: None, SimpleNamespace())  # type: ignore[arg-type]


def test_a_caller_of_dynamos_check_without_the_code_and_the_backend_is_named() -> None:
    message = f"{SAYS_TORCH}variables code and compiler_fn where exceeds_recompile_limit is called, there are source"
    with pytest.raises(RuntimeError, match=message):
        recompile_limit._asked({"source": None})


# ---- user_kernels


def test_a_kernel_whose_text_has_no_place_for_its_options_is_an_error() -> None:
    defined: list[str] = []
    wrapper = SimpleNamespace(define_kernel=lambda name, body: defined.append(body))
    user_kernels._generate_with_pdl(lambda w: w.define_kernel("fold", "@f(triton_meta={'a': 1})"), wrapper)
    assert defined == ["@f(triton_meta={'launch_pdl': True, 'a': 1})"]
    with pytest.raises(RuntimeError, match=f"{SAYS_TORCH}'triton_meta={{' in the code .* here of fold"):
        user_kernels._generate_with_pdl(lambda w: w.define_kernel("fold", "@f(meta={'a': 1})"), wrapper)
    assert len(defined) == 1


def test_a_torch_that_finds_what_a_kernel_writes_elsewhere_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in user_kernels.ANALYSES:
        monkeypatch.delattr(triton_kernel_wrap, name, raising=False)
    with pytest.raises(RuntimeError, match=f"{SAYS_TORCH}identify_accessed_tensors or identify_mutated_tensors in"):
        user_kernels.lower_kernel_launch(None, (1,), {}, {})


# ---- operators


def test_arguments_of_a_call_go_by_the_names_of_its_schema() -> None:
    graph = fx.Graph()
    x, perm = graph.placeholder("x"), graph.placeholder("perm")
    names = ("x", "channel_perm", "k4", "k6", "k8", "fp6", "scale_rounding", "activations", "rotated")
    assert argument_names(ops.reorder_quantize) == names
    layout = (perm, 32, 0, 32, "e2m3", "fit", "fp8", 32)
    for op in (ops.reorder_quantize, torch.ops.micromix.reorder_quantize):
        node = graph.call_function(op, (x, *layout[:-1]), {"rotated": 32})
        assert list(arguments_of(node).items()) == list(zip(names, (x, *layout), strict=True))
    total = graph.call_function(torch.ops.aten.add.Tensor, (x, perm))
    assert arguments_of(total) == {"self": x, "other": perm, "alpha": 1}


@pytest.mark.parametrize("target", [torch.relu, torch.ops.aten.add])
def test_arguments_of_what_has_no_schema_or_several_are_an_error(target: Any) -> None:
    graph = fx.Graph()
    with pytest.raises(TypeError, match="is no operator with one schema"):
        arguments_of(graph.call_function(target, (graph.placeholder("x"),)))


# ---- inductor


def test_inductors_copies_of_its_options_leave_a_models_state_alone() -> None:
    passes = PostGradPasses(lambda graph: None, {"state": object()})
    assert copy.deepcopy({"hook": passes})["hook"] is passes

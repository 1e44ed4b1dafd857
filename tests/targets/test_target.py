"""Who computes: which row serves which device, rows from outside, and that nobody else decides."""

from __future__ import annotations

import ast
import importlib.util
import logging
import subprocess
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.models import make_net
from support.products import folded_weight, quantized_rows
from support.targets import FOLDING, served_by
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics.layout import PackedWeight, activation_shapes, packed_shapes
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.numerics.rounding import PLAIN_STEPS, BlockSteps
from micromix_compile.ops.pack import round_weights
from micromix_compile.recipe.types import GroupRecipe
from micromix_compile.targets import cpu, gluon_kernels
from micromix_compile.targets.exact import TritonExact
from micromix_compile.targets.folded_tiles import FOLDED_SM_90
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import PlainExact, PlainFolded
from micromix_compile.targets.target import (
    FOLDED,
    WITH_TRITON,
    Device,
    Row,
    Target,
    register_target,
    target_for,
    target_of,
)
from micromix_compile.targets.tiles import SM_90

REPOSITORY = Path(__file__).parents[2]
CPU = torch.device("cpu")
LAYOUT = (torch.arange(64), 32, 0, 32, "e2m3", "rceil", "same", 0)


def gpu(capability: tuple[int, int], **known: Any) -> Target:
    return target_for(Device(type="cuda", model="a GPU", capability=capability, **known))


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [
        ((8, 0), "bf16"), ((8, 9), "bf16"), ((9, 0), "sm_90"), ((10, 0), "sm_100"), ((10, 3), "sm_100"),
        ((11, 0), "bf16"), ((12, 0), "sm_120"), ((12, 1), "bf16"), ((13, 0), "bf16"), ((0, 0), "bf16"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("exact", [False, True])
def test_a_compute_capability_has_its_kernels(capability: tuple[int, int], tiles: str, exact: bool) -> None:
    """(0, 0) is another vendor's GPU."""
    target = gpu(capability, exact=exact)
    assert target.emulated is None
    assert isinstance(target.exact, TritonExact)
    assert target.exact.tiles.name == tiles
    assert tiles in target.name
    folds = tiles == "sm_90" and not exact
    assert target.takes == ("folded" if folds else "mx")
    assert target.passes == (FOLDED if folds else WITH_TRITON)
    assert isinstance(target.folded, TritonFolded if tiles == "sm_90" else PlainFolded)


@pytest.mark.parametrize("capability", [(5, 0), (7, 5)])
def test_a_gpu_that_is_too_old_runs_plain_pytorch_and_says_why(capability: tuple[int, int]) -> None:
    target = gpu(capability)
    assert (
        target.emulated == f"compute capability {capability[0]}.{capability[1]} has no bfloat16 MMA, 8.0 is the least"
    )
    assert type(target.exact) is PlainExact


def test_a_gpu_without_triton_runs_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    target = gpu((9, 0))
    assert target.emulated == "Triton is not installed"
    assert target.takes == "mx"
    assert type(target.exact) is PlainExact


@pytest.mark.parametrize("loads", [False, True])
def test_a_cpu_runs_what_could_be_compiled(loads: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    status = cpu.NativeStatus(available=loads, reason="no compiler", isa="portable", library=None, threads=1)
    monkeypatch.setattr(cpu, "load", lambda: loads)
    monkeypatch.setattr(cpu, "status", lambda: status)
    target = target_for(Device(type="cpu", model="cpu"))
    assert target.name == ("cpu (portable)" if loads else "cpu (plain PyTorch)")
    assert target.emulated == (None if loads else "no compiler")
    assert type(target.exact) is (cpu.CompiledExact if loads else PlainExact)


def test_other_devices_run_plain_pytorch() -> None:
    assert target_of(torch.device("meta")) == Target(
        name="meta", emulated="there are kernels for CPUs and for CUDA devices"
    )


def test_a_device_counts_its_own_processors() -> None:
    """Few tiles are shared among as many programs as run at a time: those of half a GPU are half as many."""
    whole, half = gpu((9, 0)).folded.tiles, gpu((9, 0), processors=66).folded.tiles
    assert whole is not None
    assert half is not None
    assert replace(whole, gluon=None) == FOLDED_SM_90
    assert replace(half, gluon=None) == replace(FOLDED_SM_90, processors=66)
    tile = FOLDED_SM_90.small[-1][1]
    assert FOLDED_SM_90.parts_for(64, [4096], 4096, tile) == (0, 4)
    assert half.parts_for(64, [4096], 4096, tile) == (0, 3)


def test_the_persistent_kernel_is_asked_first_where_triton_compiles_it_and_its_absence_is_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(gluon_kernels, "refusal", lambda: None)
    tiles = gpu((9, 0), processors=66).folded.tiles
    assert tiles is not None
    assert tiles.gluon is not None
    assert tiles.gluon.processors == 66
    monkeypatch.setattr(gluon_kernels, "refusal", lambda: "there is a reason")
    with caplog.at_level(logging.INFO, "micromix_compile"):
        tiles = gpu((9, 0)).folded.tiles
    assert tiles is not None
    assert tiles.gluon is None
    assert [record.getMessage() for record in caplog.records] == [
        "a GPU: products that the persistent kernels take run as others do: there is a reason"
    ]


# ---- rows from outside


@dataclass(frozen=True)
class RecordingFolded(PlainFolded):
    """Somebody's kernels: plain PyTorch, and a note of each call."""

    calls: list[str] = field(default_factory=list)

    def quantize(self, producer: str, *args: Any, **options: Any) -> Any:
        self.calls.append(f"{producer}{' and a sum' * (options['residual'] is not None)}")
        return super().quantize(producer, *args, **options)

    def multiply(self, *args: Any, **options: Any) -> list[Tensor]:
        self.calls.append("multiply")
        return super().multiply(*args, **options)


def test_kernels_from_outside_compute_the_folded_operations() -> None:
    x, y, weight = torch.randn(3, 64), torch.randn(3, 64), torch.rand(64)
    w = folded_weight(quantized_rows(5, (32, 0, 32), "e2m3"), "e2m3")

    def run() -> list[Tensor]:
        q = ops.reorder_fold(x, *LAYOUT, False)
        results = [*q, *ops.rms_norm_reorder_fold(x, weight, 1e-6, *LAYOUT, False)]
        results += ops.add_rms_norm_reorder_fold(x, y, weight, 1e-6, *LAYOUT, False)
        results += ops.silu_mul_reorder_fold(x, y, *LAYOUT, False)
        return results + ops.folded_mm(*q, *([part] for part in w[:5]), [], [], "e2m3", torch.float32)

    want, kernels = run(), RecordingFolded()
    with served_by(Target(name="somebody's", folded=kernels)):
        got = run()
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    calls = ["none", "rms_norm", "rms_norm and a sum", "silu_mul", "multiply"]
    assert kernels.calls == calls
    run()
    assert kernels.calls == calls, "the row was taken back"


def test_a_target_from_outside_has_its_own_passes_and_lowers_nothing(fresh_compiler: None) -> None:
    """What a compiled model calls are the operations themselves: there are no tiles to launch kernels with."""
    net, x = make_net(torch.bfloat16, layers=1), torch.randn(2, 5, 64).bfloat16()
    recipe = micromix.calibrate(net, [x])
    kernels = RecordingFolded()
    with served_by(Target(name="somebody's", folded=kernels, passes=FOLDED)), torch.no_grad():
        got = torch.compile(net, backend="micromix", options={"recipe": recipe, "strict": True})(x)
        want = micromix.quantize_(net, recipe)(x)
    assert kernels.calls == ["rms_norm", "multiply", "multiply", "silu_mul", "multiply"]
    assert (got - want).abs().max() <= 2.0**-6 * want.abs().max()


EXACT_SCRIPT = """
import torch
from micromix_compile import ops
from micromix_compile.targets.kernels import PlainExact
from micromix_compile.targets.target import Row, Target, register_target

calls = []

class Kernels(PlainExact):
    def quantize(self, producer, *args, **options):
        calls.append(producer)
        return super().quantize(producer, *args, **options)

    def multiply(self, *args):
        calls.append("multiply")
        return super().multiply(*args)

target = Target(name="somebody's", exact=Kernels())
register_target(Row(serves=lambda device: device.type == "cpu", target=lambda device: target))
x, layout = torch.randn(3, 64), (torch.arange(64), 32, 0, 32, "e2m3", "rceil", "same", 0)
q = ops.reorder_quantize(x, *layout)
ops.rms_norm_reorder_quantize(x, torch.rand(64), 1e-6, *layout)
ops.silu_mul_reorder_quantize(x, x, *layout)
w = (q[0], torch.zeros(3, 3, 0, dtype=torch.uint8), q[2], q[3])
ops.mixed_mx_mm(*q, *w, None, "e2m3", torch.float32)
print(calls)
"""


def test_kernels_from_outside_compute_the_exact_operations() -> None:
    """In a process of its own: compiled CPU kernels, once loaded, are the dispatcher's, which asks nobody."""
    done = subprocess.run([sys.executable, "-c", EXACT_SCRIPT], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "['none', 'rms_norm', 'silu_mul', 'multiply']", done.stderr


def test_who_rounds_weights_is_the_targets_to_say() -> None:
    blocks = []

    def compensate(*args: Any) -> tuple[Tensor, Tensor]:
        blocks.append("compensate")
        return PLAIN_STEPS.compensate(*args)

    def descend(*args: Any) -> Tensor:
        blocks.append("descend")
        return PLAIN_STEPS.descend(*args)

    config = MicroMixConfig(weight_rounding="gptq")
    group = GroupRecipe(name="g", channel_perm=torch.arange(64), split=(32, 0, 32), statistics=None)  # type: ignore[arg-type]
    with served_by(Target(name="somebody's", steps=BlockSteps(compensate, descend))):
        round_weights({"w": torch.randn(5, 64)}, group, torch.eye(64), config)
    assert blocks[:3] == ["compensate", "compensate", "descend"]


def test_the_row_that_came_last_is_asked_first_and_can_be_taken_back() -> None:
    before = target_of(CPU)
    first, second = Target(name="first"), Target(name="second")
    remove_first = register_target(Row(serves=lambda device: device.type == "cpu", target=lambda _: first))
    assert target_of(CPU) is first
    with served_by(second):
        assert target_of(CPU) is second
        remove_first()
        assert target_of(CPU) is second
    assert target_of(CPU) == before


def test_a_target_that_folds_is_not_asked_where_products_must_be_exact() -> None:
    with served_by(FOLDING):
        assert target_of(CPU) is FOLDING
        assert target_of(CPU, exact=True).takes == "mx"


def test_who_computes_is_logged_once(caplog: pytest.LogCaptureFixture, fresh_compiler: None) -> None:
    net, x = make_net(layers=1), torch.randn(2, 5, 64)
    recipe = micromix.calibrate(net, [x])
    with served_by(Target(name="somebody's")), caplog.at_level(logging.DEBUG, "micromix_compile"), torch.no_grad():
        for _ in range(2):
            torch._dynamo.reset()
            torch.compile(net, backend="micromix", options={"recipe": recipe})(x)
    said = [record for record in caplog.records if "somebody's" in record.getMessage()]
    assert [record.getMessage() for record in said] == [
        "the linears run on somebody's: their products take mx operands"
    ]
    assert said[0].levelno == logging.DEBUG


# ---- one owner


def names_in(path: Path) -> set[str]:
    """Attributes and functions that a file reads."""
    nodes = list(ast.walk(ast.parse(path.read_text())))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {n.id for n in nodes if isinstance(n, ast.Name)}


OWNERS = {
    "get_device_capability": {"micromix_compile/targets/target.py"},
    "multi_processor_count": {"micromix_compile/targets/target.py"},
    "expand_from": {"micromix_compile/targets/folded_tiles.py"},
    "all_expand_from": {"micromix_compile/targets/folded_tiles.py"},
    "library_from": {"lowering/folded.py", "micromix_compile/targets/hopper.py"},  # to guard symbolic rows, to be quick
    "max_expanded": {"micromix_compile/targets/folded_tiles.py"},
    "processors": {
        "micromix_compile/targets/folded_tiles.py",
        "micromix_compile/targets/gluon_tiles.py",
        "micromix_compile/targets/grouped_tiles.py",
        "micromix_compile/targets/target.py",
    },
    "widen_fp4": {"micromix_compile/targets/tiles.py"},
    "do_not_specialize": {"micromix_compile/targets/offline.py"},
}


@pytest.mark.parametrize("name", OWNERS)
def test_what_differs_by_device_is_asked_in_one_place(name: str) -> None:
    folders = [REPOSITORY / folder for folder in ("micromix_compile", "passes", "lowering")]
    files = {path.resolve() for folder in folders for path in folder.rglob("*.py")}
    found = {str(path.relative_to(REPOSITORY)) for path in files if name in names_in(path)}
    assert {path for path in found if not path.startswith("micromix_compile/evaluation/")} == OWNERS[name]


def test_a_product_of_triton_allocates_its_output_only() -> None:
    """Of no rows, so that nothing is launched."""
    split = (32, 0, 32)
    x = QuantizedActivation(*(torch.empty(shape, dtype=torch.uint8) for shape in activation_shapes(0, split)))
    w = PackedWeight(*(torch.empty(shape, dtype=torch.uint8) for shape in packed_shapes(24, split)))
    with Allocations() as allocations:
        out = TritonExact(SM_90).multiply(x, w, None, "e2m3", torch.bfloat16)
    assert allocations.shapes == [out.shape] == [(0, 24)]


class Allocations(TorchDispatchMode):
    """The shapes of tensors that were allocated."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[torch.Size] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.new_empty.default:
            self.shapes.append(out.shape)
        return out

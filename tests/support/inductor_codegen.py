"""What Inductor generates for a CUDA target, as JSON: a process of its own for `tests/lowering/test_codegen.py`.

    echo '{"case": "mlp", "capability": [10, 0], "rows": 70, ...}' | PYTHONPATH=tests python -m support.inductor_codegen

Answers {"launches": [names in order], "kernels": {name: source}, "mma": {name: kinds in the PTX}, "pdl": {name: whether
it may start early}, "analyses": how many of the launches Inductor had to look into, "digest": see `digests.of_code`}.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._inductor import config

import micromix_compile.lowering.folded
import micromix_compile.lowering.mixed_mx_mm
import micromix_compile.lowering.reorder_quantize
import micromix_compile.lowering.weighted_sum  # noqa: F401 - they register lowerings
from micromix_compile import ops
from micromix_compile.lowering.inductor import POST_GRAD_HOOK, PostGradPasses
from micromix_compile.lowering.torch_private import user_kernels
from micromix_compile.numerics import folding
from micromix_compile.numerics.layout import RowLayout, Split, packed_shapes, weight_split
from micromix_compile.passes import POST_GRAD_PASSES, PassContext, for_inductor
from micromix_compile.targets.exact import TritonExact
from micromix_compile.targets.folded_tiles import FOLDED_SM_90
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.ptx import mma_kind
from micromix_compile.targets.target import FOLDED, Row, Target, register_target
from micromix_compile.targets.tiles import SM_90
from support import digests
from support.fake_cuda import fake_cuda, generate
from support.fork_server import serve

if TYPE_CHECKING:
    from collections.abc import Callable

Spec = tuple[tuple[int, ...], torch.dtype]

C, HIDDEN = 256, 352
SPLITS = ((96, 96, 64), (32, 128, 96), (128, 224, 0))
LAYOUT = ("e2m3", "fit", "same", 0)
ACTIVATIONS, ROTATES = "same", False


def row_layout(split: Split) -> RowLayout:
    """Of an MLP's rows; where they are rotated, the channels that weights have in MXFP4."""
    return RowLayout(*split, *LAYOUT[:2], ACTIVATIONS, split[0] if ROTATES else 0)


def weight_specs(rows: int, split: Split, *, fp4: bool) -> list[Spec]:
    shapes = packed_shapes(rows, weight_split(split, "mxfp4" if fp4 else "same"))
    return [(shape, torch.uint8) for shape in shapes]


def mlp(
    x: Tensor, norm: Tensor, perm: Tensor, hidden_perm: Tensor, bias: Tensor, *weights: Tensor
) -> tuple[Tensor, ...]:
    """Two MLPs of a decoder that differ in their splits: norm, gate (with a bias), up, SiLU·mul, down, residual."""
    for split in SPLITS[:2]:
        gate, up, down = weights[:4], weights[4:8], weights[8:12]
        q = ops.rms_norm_reorder_quantize(x, norm, 1e-6, perm, *row_layout(split))
        g = ops.mixed_mx_mm(*q, *gate, bias, LAYOUT[0], x.dtype)
        u = ops.mixed_mx_mm(*q, *up, None, LAYOUT[0], x.dtype)
        h = ops.silu_mul_reorder_quantize(g, u, hidden_perm, *row_layout(SPLITS[2]))
        x = x + ops.mixed_mx_mm(*h, *down, None, LAYOUT[0], x.dtype)
        weights = weights[12:]
    return (x,)


def gelu(x: Tensor, perm: Tensor, bias: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """A producer without a kernel of its own, and an activation behind the product."""
    q = ops.reorder_quantize(torch.nn.functional.gelu(x), perm, *SPLITS[0], *LAYOUT)
    return (torch.nn.functional.gelu(ops.mixed_mx_mm(*q, *weights, bias, LAYOUT[0], x.dtype), approximate="tanh"),)


def folded_mlp(x: Tensor, norm: Tensor, perm: Tensor, hidden_perm: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
    """`mlp` on the folded path: gate and up are one product."""
    for split in SPLITS[:2]:
        gate, up, down = weights[:5], weights[5:10], weights[10:15]
        q = ops.reorder_fold(ops.rms_norm(x, norm, 1e-6), perm, *row_layout(split), False)
        lists = [list(pair) for pair in zip(gate, up, strict=True)]
        g, u = ops.folded_mm(*q, *lists, [], [], LAYOUT[0], x.dtype)
        act = torch.nn.functional.silu(g) * u
        q = ops.reorder_fold(act, hidden_perm, *row_layout(SPLITS[2]), False)
        x = x + ops.folded_mm(*q, *([part] for part in down), [], [], LAYOUT[0], x.dtype)[0]
        weights = weights[15:]
    return (x,)


def folded_fork(x: Tensor, perm: Tensor, *weights: Tensor) -> list[Tensor]:
    """Three products of one activation. weights: five parts of each, then each expanded, if they are kept so."""
    q = ops.reorder_fold(x, perm, *SPLITS[0], *LAYOUT, False)
    lists = [list(column) for column in zip(weights[:5], weights[5:10], weights[10:15], strict=True)]
    return ops.folded_mm(*q, *lists, [], list(weights[15:]), LAYOUT[0], x.dtype)


def folded_fork_in_use(*args: Tensor) -> tuple[Tensor, ...]:
    """None of them is a result, nor a view of one."""
    first, second, third = folded_fork(*args)
    return first + 1, second.reshape(len(second), 2, -1).transpose(0, 1) * 2, third.mul_(3)


def folded_fork_of_views(*args: Tensor) -> tuple[Tensor, ...]:
    """A view of one of them is a result."""
    first, second, third = folded_fork(*args)
    return first + 1, second.reshape(len(second), 2, -1).transpose(0, 1), third + 1


def folded_fork_of_pieces(*args: Tensor) -> tuple[Tensor, ...]:
    """One of several views of one of them is a result."""
    first, second, third = folded_fork(*args)
    return first + 1, second + 1, third.split(32, 1)[1]


def folded_fork_of_strides(*args: Tensor) -> tuple[Tensor, ...]:
    """One of them is read by strides, which are those of its own memory."""
    first, second, third = folded_fork(*args)
    return first + 1, second.as_strided((len(second) // 2, 32), (128, 1)) + 1, third + 1


def folded_specs(rows: int, split: Split) -> list[Spec]:
    factors = folding.factor_shape(rows, split)
    return [*weight_specs(rows, split, fp4=False)[:3], (factors, torch.uint8), ((rows,), torch.float32)]


def quantized(x: Tensor, perm: Tensor) -> Any:
    return ops.reorder_quantize(x.reshape(-1, C), perm, *SPLITS[0], *LAYOUT)


def folded(x: Tensor, perm: Tensor) -> Any:
    return ops.reorder_fold(x.reshape(-1, C), perm, *SPLITS[0], *LAYOUT, False)


def silu_mul(gate: Tensor, up: Tensor, perm: Tensor) -> Any:
    return quantized(torch.nn.functional.silu(gate) * up, perm)


def halves(both: Tensor, perm: Tensor) -> Any:
    """Gate and up as one matmul's output: rows of a wider matrix."""
    gate, up = both.chunk(2, -1)
    return silu_mul(gate, up, perm)


def no_silu(gate: Tensor, up: Tensor, perm: Tensor) -> Any:
    """What looks like SiLU but for a keyword."""
    return quantized(gate / torch.add(torch.exp(-gate), 1, alpha=2) * up, perm)


def residual_norm(x: Tensor, residual: Tensor, weight: Tensor, perm: Tensor) -> Any:
    """The sum is read by others, here it is a result."""
    total = x + residual
    return total, *folded(ops.rms_norm(total, weight, 1e-6), perm)


def late_weight(x: Tensor, residual: Tensor, weight: Tensor, perm: Tensor) -> Any:
    """The norm's weight depends on the sum."""
    total = x + residual
    return total, *folded(ops.rms_norm(total, weight * total.amax(0), 1e-6), perm)


def scaled_residual(x: Tensor, residual: Tensor, weight: Tensor, perm: Tensor) -> Any:
    """What looks like a sum but for a keyword."""
    total = torch.add(x, residual, alpha=2)
    return total, *folded(ops.rms_norm(total, weight, 1e-6), perm)


def experts(x: Tensor, weights: Tensor, perm: Tensor, rows: Tensor, offs: Tensor, order: Tensor, *w: Tensor) -> Any:
    """One product with three experts' weights and the sum of what two of them made of each token."""
    q = ops.reorder_quantize(x, perm, *SPLITS[0], *LAYOUT)
    made = ops.grouped_mx_mm(*q, rows, offs, *w, None, LAYOUT[0], x.dtype)
    index = torch.ops.aten.index.Tensor  # in Python's brackets CUDA would be asked for
    weighted = made * index(weights.reshape(-1), [order]).unsqueeze(-1)
    return (index(weighted, [order.argsort()]).view(len(x), 2, made.shape[1]).sum(1).to(x.dtype),)


def rms_norm(x: Tensor, weight: Tensor, perm: Tensor) -> Any:
    return quantized(ops.rms_norm(x, weight, 1e-6), perm)


# A producer before a quantize: function, shapes.
PRODUCERS: dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]] = {
    "silu 3d": (silu_mul, [(7, 10, C), (7, 10, C)]),
    "silu 2d": (silu_mul, [(70, C), (70, C)]),
    "silu of halves": (halves, [(7, 10, 2 * C)]),
    "silu broadcast": (silu_mul, [(7, 10, C), (1, 1, C)]),
    "no silu": (no_silu, [(7, 10, C), (7, 10, C)]),
    "norm 3d": (rms_norm, [(7, 10, C), (C,)]),
    "norm 2d": (rms_norm, [(70, C), (C,)]),
    "residual 3d": (residual_norm, [(7, 10, C), (7, 10, C), (C,)]),
    "residual 2d": (residual_norm, [(70, C), (70, C), (C,)]),
    "residual broadcast": (residual_norm, [(7, 10, C), (1, 1, C), (C,)]),
    "residual scaled": (scaled_residual, [(70, C), (70, C), (C,)]),
    "residual with a late weight": (late_weight, [(70, C), (70, C), (C,)]),
}


FORKS = {
    "fork": folded_fork,
    "fork of kept": folded_fork,
    "fork in use": folded_fork_in_use,
    "fork of views": folded_fork_of_views,
    "fork of pieces": folded_fork_of_pieces,
    "fork of strides": folded_fork_of_strides,
}


def case(name: str, rows: int, dtype: torch.dtype, *, fp4: bool) -> tuple[Callable[..., Any], list[Spec]]:
    if name in PRODUCERS:
        function, shapes = PRODUCERS[name]
        return function, [*((shape, dtype) for shape in shapes), ((C,), torch.int16)]
    if name == "gelu":
        specs: list[Spec] = [((rows, C), dtype), ((C,), torch.int16), ((HIDDEN,), dtype)]
        return gelu, specs + weight_specs(HIDDEN, SPLITS[0], fp4=fp4)
    if name == "experts":
        routing = [((2 * rows,), torch.int32), ((3,), torch.int32), ((2 * rows,), torch.int64)]
        stacked = [((3, *shape), kind) for shape, kind in weight_specs(HIDDEN, SPLITS[0], fp4=fp4)]
        return experts, [((rows, C), dtype), ((rows, 2), torch.float32), ((C,), torch.int16), *routing, *stacked]
    if name in FORKS:
        specs = [((rows, C), dtype), ((C,), torch.int16)]
        specs += [spec for n in (HIDDEN, 64, 64) for spec in folded_specs(n, SPLITS[0])]
        if name == "fork of kept":
            width = folding.fold_width(SPLITS[0], w_fp4=False)
            specs += [((n, width), torch.uint8) for n in (HIDDEN, 64, 64)]
        return FORKS[name], specs
    if name == "folded":
        specs = [((rows, C), dtype), ((C,), dtype), ((C,), torch.int16), ((HIDDEN,), torch.int16)]
        for split in SPLITS[:2]:
            specs += folded_specs(HIDDEN, split) * 2 + folded_specs(C, SPLITS[2])
        return folded_mlp, specs
    specs = [((rows, C), dtype), ((C,), dtype), ((C,), torch.int16), ((HIDDEN,), torch.int16), ((HIDDEN,), dtype)]
    for split in SPLITS[:2]:
        specs += weight_specs(HIDDEN, split, fp4=fp4) * 2 + weight_specs(C, SPLITS[2], fp4=fp4)
    return mlp, specs


def compiled(name: str, source: str) -> list[Any]:
    """What Triton makes of every configuration of a generated kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        function = re.search(r"^def (\w+)\(", source[source.index("@triton_heuristics") :], re.M)
        assert function is not None
        tuner = getattr(module, function[1])
        return [tuner._precompile_config(configuration).kernel for configuration in tuner.configs]


def widen(factor: int) -> None:
    """Make the MLPs `factor` times as wide: the folded product splits K of some hundred channels."""
    global C, HIDDEN, SPLITS
    C, HIDDEN = C * factor, HIDDEN * factor
    SPLITS = tuple((k4 * factor, k6 * factor, k8 * factor) for k4, k6, k8 in SPLITS)  # type: ignore[assignment]


def expand_up_to(size: int) -> None:
    """Let sm_90 expand no more bytes than that of weights together."""
    tiles = replace(FOLDED_SM_90, max_expanded=size)
    target = Target(name="sm_90", exact=TritonExact(SM_90), folded=TritonFolded(tiles), passes=FOLDED)
    register_target(Row(serves=lambda device: device.type == "cuda", target=lambda _: target))


def answer(request: dict[str, Any]) -> dict[str, Any]:
    global ACTIVATIONS, ROTATES
    ACTIVATIONS, ROTATES = request["activations"], request["rotates"]
    widen(request["widen"])
    if request["max_expanded"]:
        expand_up_to(request["max_expanded"])
    function, specs = case(request["case"], request["rows"], getattr(torch, request["dtype"]), fp4=request["fp4"])
    kernels: dict[str, str] = {}
    mma: dict[str, list[str]] = {}
    pdl: dict[str, bool] = {}
    passes = for_inductor(POST_GRAD_PASSES, PassContext(owner=None, example_inputs=()))  # type: ignore[arg-type]
    with fake_cuda(tuple(request["capability"])), config.patch(use_static_triton_launcher=False):
        hook = {POST_GRAD_HOOK: PostGradPasses(passes, {})} if request["ours"] else {}
        code = generate(function, specs, dynamic_rows=request["dynamic"], **hook, **request["options"])
        for name, source in re.findall(
            r"^(\w+) = async_compile\.triton\('\w+', '''(.*?)''', device_str", code, re.M | re.S
        ):
            kernels[name] = source
            if request["compile"]:
                binaries = compiled(name, source)
                instructions = [i for binary in binaries for i in re.findall(r"\S*mma\S*", binary.asm["ptx"])]
                pdl[name] = binaries[0].metadata.launch_pdl
                mma[name] = sorted({kind for kind in map(mma_kind, instructions) if kind})
    launches = re.findall(r"^[^#\n]*?(\w+)\.run\(|^[^#\n]*(?<!')(torch\.ops\.(?:micromix|aten)\.\w+)", code, re.M)
    found = {"launches": [kernel or op for kernel, op in launches], "kernels": kernels, "mma": mma, "pdl": pdl}
    return {**found, "analyses": len(user_kernels._analyses), "digest": digests.of_code(code)}


if __name__ == "__main__":
    with fake_cuda((9, 0)):
        generate(lambda x: (x + 1,), [((2,), torch.float32)])  # what Inductor imports and registers at its first use
    serve(answer)

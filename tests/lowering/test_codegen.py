"""Inductor's code for CUDA targets, generated and compiled where there is no GPU: launches, fusions, MMA kinds."""

from __future__ import annotations

import importlib.util
import re
from typing import TYPE_CHECKING, Any
from unittest import mock

import pytest
import torch
import triton
from support.digests import assert_recorded
from support.fork_server import ForkServer
from support.inductor_codegen import SPLITS, C
from support.products import assert_product_is_exact, packed_rows, quantized_rows

from micromix_compile.numerics.layout import activation_split
from micromix_compile.targets.gluon_kernels import FIRST_TRITON, LAST_TRITON

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from types import ModuleType

# `fake_cuda` replaces torch.cuda's answers; over a real device that would test neither.
pytestmark = [
    pytest.mark.versions,
    pytest.mark.skipif(torch.cuda.is_available(), reason="where there is a GPU, test_gpu.py runs the code"),
]

CODEGEN = ForkServer("support.inductor_codegen", without="TRITON_INTERPRET")
DEFAULTS: dict[str, Any] = {
    "rows": 70, "dtype": "bfloat16", "fp4": False, "dynamic": False, "compile": False, "ours": True,
    "widen": 1, "max_expanded": None, "options": {}, "activations": "same", "rotates": False,
}  # fmt: skip
KINDS = {
    (9, 0): {"wgmma bf16"},
    (10, 0): {"tcgen05.mma mxf4", "tcgen05.mma mxf8f6f4"},
    (12, 0): {"mma.sync mxf4nvf4", "mma.sync mxf8f6f4"},
}


FP4_BY_FP4 = {"tcgen05.mma mxf4", "mma.sync mxf4nvf4"}


@pytest.fixture(scope="module", autouse=True)
def codegen() -> Iterator[None]:
    yield
    CODEGEN.close()


def generated(case: str, capability: tuple[int, int], **changes: Any) -> dict[str, Any]:
    """What Inductor generates for a case of `inductor_codegen.py`, in a process without Triton's interpreter.

    It is the code that is recorded; whether it's compiled too makes no difference to it.
    """
    result: dict[str, Any] = CODEGEN.ask({"case": case, "capability": capability} | DEFAULTS | changes)
    others = [f"{name}={value}" for name, value in changes.items() if value != DEFAULTS[name] and name != "compile"]
    target = "sm_{}{}".format(*capability)
    assert_recorded("code", ", ".join([case, target, *sorted(others)]), result["digest"])
    return result


def is_matmul(name: str) -> bool:
    return name.startswith("triton_tem_fused") and "mixed_mx_mm" in name


def is_quantizer(name: str) -> bool:
    return name.startswith("reorder_quantize_kernel")


@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        pytest.param((9, 0), {"rows": 1}, id="sm_90-decode"),
        pytest.param((10, 0), {"dynamic": True}, id="sm_100-any-rows"),
        pytest.param((10, 0), {"rows": 1, "fp4": True}, id="sm_100-decode-fp4-weights"),
        pytest.param((12, 0), {"rows": 300}, id="sm_120-prefill"),
        pytest.param((12, 0), {"fp4": True, "dtype": "float16"}, id="sm_120-fp4-weights"),
        pytest.param((9, 0), {"rows": 1, "activations": "fp8", "rotates": True}, id="sm_90-decode-fp8-rotated"),
        pytest.param((10, 0), {"activations": "fp8", "dynamic": True}, id="sm_100-any-rows-fp8"),
        pytest.param((10, 0), {"fp4": True, "activations": "fp8"}, id="sm_100-fp4-weights-fp8"),
        pytest.param((12, 0), {"activations": "mxfp6", "rotates": True}, id="sm_120-mxfp6-rotated"),
        pytest.param((12, 0), {"rotates": True}, id="sm_120-rotated"),
    ],
)
def test_an_mlp_is_two_quantizers_and_three_products_with_everything_else_inside(
    capability: tuple[int, int], changes: dict[str, Any]
) -> None:
    code = generated("mlp", capability, compile=True, **changes)
    kinds = ["quantize" if is_quantizer(name) else "matmul" if is_matmul(name) else name for name in code["launches"]]
    assert kinds == ["quantize", "matmul", "matmul", "quantize", "matmul"] * 2
    matmuls = [name for name in code["kernels"] if is_matmul(name)]
    # Layers that differ in their splits run the same kernels. Inductor names a quantizer for every split, though.
    assert len(matmuls) == 3
    quantizers = {re.sub(r"_kernel_\d+", "", code["kernels"][name]) for name in code["kernels"] if is_quantizer(name)}
    assert len(quantizers) == 2
    meets_wide = "activations" in changes and "fp4" not in changes  # all MXFP4 they are met by any, in one kernel
    for name in matmuls:
        assert set(code["mma"][name]) == KINDS[capability] - (FP4_BY_FP4 if meets_wide else set())
        assert ("M = ks" in code["kernels"][name]) == changes.get("dynamic", False)


@pytest.mark.parametrize("capability", KINDS)
def test_what_experts_made_of_each_token_is_summed_by_one_launch(capability: tuple[int, int]) -> None:
    """Nothing multiplies the rows before, and no cast comes behind."""
    code = generated("experts", capability, compile=True)
    at = code["launches"].index("torch.ops.micromix.grouped_mx_mm")
    *between, last = code["launches"][at + 1 :]
    assert last.startswith("weighted_sum_kernel")
    assert not any("mul" in name for name in between)


def test_a_producer_without_a_kernel_is_one_launch_and_an_activation_none() -> None:
    launches = generated("gelu", (10, 0))["launches"]
    producer, quantizer, matmul = launches
    assert producer.startswith("triton_poi_fused_gelu")
    assert is_quantizer(quantizer)
    assert is_matmul(matmul)
    assert "gelu" in matmul


def test_under_another_backend_the_ops_stay_calls_for_its_cache_does_not_know_our_sources() -> None:
    launches = generated("mlp", (9, 0), ours=False)["launches"]
    assert "torch.ops.micromix.mixed_mx_mm" in launches
    assert not any(is_quantizer(name) or is_matmul(name) for name in launches)


def test_where_all_else_is_called_as_eager_does_our_ops_are_still_compiled() -> None:
    launches = generated("gelu", (9, 0), options={"fallback_by_default": True, "selective_decompose": True})["launches"]
    calls = {name for name in launches if name.startswith("torch.ops.")}
    assert calls == {"torch.ops.aten.gelu"}
    quantizer, matmul = [name for name in launches if name not in calls]
    assert is_quantizer(quantizer)
    assert matmul.startswith("triton_tem_fused")


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize(
    ("case", "producer", "adds", "others"),
    [
        ("silu 3d", "silu_mul", False, 0),
        ("silu 2d", "silu_mul", False, 0),
        ("silu of halves", "silu_mul", False, 0),
        ("silu broadcast", "none", False, 1),
        ("no silu", "none", False, 1),
        ("norm 3d", "rms_norm", False, 0),
        ("norm 2d", "rms_norm", False, 0),
        ("residual 3d", "rms_norm", True, 0),
        ("residual 2d", "rms_norm", True, 0),
        ("residual broadcast", "rms_norm", False, 1),
        ("residual scaled", "rms_norm", False, 1),
        ("residual with a late weight", "rms_norm", False, 1),
    ],
)
def test_a_producer_joins_the_quantizer_or_stays_whole(
    case: str, producer: str, adds: bool, others: int, dtype: str
) -> None:
    code = generated(case, (9, 0), dtype=dtype)
    *before, quantizer = code["launches"]
    assert len(before) == others
    source = code["kernels"][quantizer]
    assert f"'PRODUCER': '{producer}'" in source
    assert f"'EPS': {1e-6 if producer == 'rms_norm' else 0.0}" in source
    assert ("'ADDS': True" in source) == adds


def test_a_residual_of_any_number_of_rows_joins_the_quantizer() -> None:
    (launch,) = generated("residual 3d", (9, 0), dynamic=True)["launches"]
    assert launch.startswith("reorder_fold_kernel")


@pytest.mark.parametrize(("rows", "widen"), [(16, 1), (1, 6)], ids=["16 rows", "1 row, K split"])
def test_a_folded_mlp_is_two_quantizers_and_two_fp8_products(rows: int, widen: int) -> None:
    code = generated("folded", (9, 0), rows=rows, widen=widen, compile=True)
    kinds = [name.rsplit("_kernel_", 1)[0] for name in code["launches"]]
    layer = ["reorder_fold", "folded_mm", "reorder_fold", "folded_mm"]
    assert kinds == [*layer, *layer, "triton_poi_fused_add_0"]
    assert code["analyses"] == 5  # the second layer is the first with another split, but that its norm is behind a sum
    quantizers = [code["kernels"][name] for name in code["launches"][:3:2]]
    assert "'PRODUCER': 'rms_norm'" in quantizers[0]
    assert "'PRODUCER': 'silu_mul'" in quantizers[1]
    for quantizer in quantizers:
        assert f"'RELEASE': '{'start' if rows == 1 else 'end'}'" in quantizer
    for name in code["kernels"]:
        if name.startswith("folded_mm"):
            assert code["mma"][name] == ["wgmma e4m3"]
            assert ("'SPLIT_K': 1" not in code["kernels"][name]) == (widen > 1)
        assert code["pdl"][name] == (not name.startswith("triton_"))


def test_a_folded_product_of_many_rows_expands_its_weights_for_one_product_of_the_library() -> None:
    launches = generated("folded", (9, 0), rows=1100)["launches"]
    kinds = [name.rpartition("_kernel_")[0] or name for name in launches]
    product = ["expand_weights", "torch.ops.aten._scaled_mm"]
    layer = ["reorder_fold", *product, "reorder_fold", *product]
    assert kinds == [*layer, *layer, "triton_poi_fused_add_0"]


def test_wide_weights_of_one_activation_are_expanded_one_after_the_other() -> None:
    """So that the memory of the first is free for the second."""
    code = generated("folded", (9, 0), rows=1100, widen=20, compile=True)
    kinds = [name.rpartition("_kernel_")[0] or name for name in code["launches"]]
    product = ["expand_weights", "torch.ops.aten._scaled_mm"]
    layer = ["reorder_fold", *product, *product, "reorder_fold", *product]
    assert kinds == [*layer, *layer, "triton_poi_fused_add_0"]
    assert all(code["pdl"][name] for name in code["kernels"] if name.startswith("expand_weights"))


@pytest.mark.parametrize(
    ("rows", "activations", "by_blocks"), [(16, "fp8", False), (300, "fp8", True), (300, "mxfp6", True)]
)
def test_a_folded_mlp_has_activations_of_their_own_format_and_rotates_them(
    rows: int, activations: str, by_blocks: bool
) -> None:
    """Wide enough for threads that have whole blocks of a row; `odd_rotated` is an argument of the launch."""
    code = generated("folded", (9, 0), rows=rows, widen=20, compile=True, activations=activations, rotates=True)
    quantizers = [name for name in code["launches"] if name.startswith("reorder_fold")]
    assert len(quantizers) == 4
    for name in quantizers:
        source = code["kernels"][name]
        assert f"'ACTIVATIONS': '{activations}'" in source
        assert f"'BY_BLOCKS': {by_blocks}" in source
        assert "'odd_rotated': 'i32'" in source
        assert code["pdl"][name]


@pytest.mark.parametrize(("case", "products"), [("fork in use", 2), ("fork", 3)])
def test_some_of_the_weights_of_one_activation_are_expanded_together(case: str, products: int) -> None:
    launches = generated(case, (9, 0), rows=300, max_expanded=(352 + 64) * C)["launches"]
    kinds = [name.rpartition("_kernel_")[0] or name for name in launches]
    assert kinds[:2] == ["reorder_fold", "expand_weights"]
    assert kinds.count("expand_weights") == 2
    assert kinds.count("torch.ops.aten._scaled_mm") == products


@pytest.mark.parametrize(
    ("case", "products", "pointwise"),
    [
        ("fork", 3, 0),
        ("fork in use", 1, 3),
        ("fork of views", 3, 2),
        ("fork of pieces", 3, 2),
        ("fork of strides", 3, 3),
    ],
)
def test_products_of_many_rows_are_one_unless_one_must_lie_in_memory_as_in_eager(
    case: str, products: int, pointwise: int
) -> None:
    launches = generated(case, (9, 0), rows=300)["launches"]
    others = [name for name in launches if "_scaled_mm" not in name]
    assert len(launches) - len(others) == products
    assert [name.rpartition("_kernel_")[0] for name in others[:2]] == ["reorder_fold", "expand_weights"]
    assert len(others) == 2 + pointwise  # and no copies


@pytest.mark.parametrize(("rows", "dynamic"), [(257, False), (300, True), (256, False)])
def test_weights_that_are_kept_expanded_are_multiplied_by_the_library_as_they_are(rows: int, dynamic: bool) -> None:
    """But by few rows, which read the packed ones."""
    launches = generated("fork of kept", (9, 0), rows=rows, dynamic=dynamic)["launches"]
    kinds = [name.rpartition("_kernel_")[0] or name for name in launches]
    products = ["torch.ops.aten._scaled_mm"] * 3 if rows > 256 else ["folded_mm"]
    assert kinds == ["reorder_fold", *products]


def test_a_folded_product_of_any_rows_is_the_library_s_if_it_is_compiled_for_many() -> None:
    launches = generated("folded", (9, 0), rows=1100, dynamic=True)["launches"]
    assert launches == generated("folded", (9, 0), rows=1100)["launches"]


@pytest.mark.parametrize(("rows", "dynamic", "widen"), [(16, True, 1), (300, True, 2), (300, False, 2)])
def test_a_folded_product_is_decided_when_it_runs_if_rows_may_be_few_or_the_persistent_kernel_takes_it(
    rows: int, dynamic: bool, widen: int
) -> None:
    """The forks above have an odd number of MXFP6 blocks, which it does not take: their 300 rows are the library's.

    So are these, if it is not known to compile with the Triton that is installed.
    """
    launches = generated("folded", (9, 0), rows=rows, dynamic=dynamic, widen=widen)["launches"]
    compiles = FIRST_TRITON <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= LAST_TRITON
    is_decided_later = compiles or rows == 16
    assert launches.count("torch.ops.micromix.folded_mm") == (4 if is_decided_later else 0)
    assert any(name.startswith("expand_weights") for name in launches) != is_decided_later
    assert not any(name.startswith("folded_mm_kernel") for name in launches)


def load(name: str, source: str, folder: Path) -> ModuleType:
    """The generated kernel as a function of Triton's interpreter, in its float32 arithmetic."""
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    path = folder / f"{name}.py"
    path.write_text(re.sub(r"MODE : tl.constexpr = '\w+'", "MODE : tl.constexpr = 'f32'", source))
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    unwrapped = mock.patch.object(triton_heuristics, "template", return_value=lambda function: function)
    with unwrapped, mock.patch.object(triton_helpers, "set_driver_to_gpu"):
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("capability", KINDS)
@pytest.mark.parametrize(("rows", "activations"), [(5, "same"), (140, "same"), (5, "fp8"), (140, "fp8")])
def test_the_generated_kernel_computes_the_product_and_its_epilogue(
    capability: tuple[int, int], rows: int, activations: str, tmp_path: Path
) -> None:
    code = generated("mlp", capability, rows=rows, dtype="float32", activations=activations)
    name = code["launches"][4]
    source = code["kernels"][name]
    kernel = getattr(load(name, source, tmp_path), name)
    x_split = activation_split(SPLITS[2], activations)
    x, w = quantized_rows(rows, x_split, "e2m3"), packed_rows(C, SPLITS[2], "e2m3")
    residual, out = torch.randn(rows, C), torch.full((rows, C), torch.nan)
    operands = dict(zip(("X4", "X6", "X8", "X_SCALE", "W4", "W6", "W8", "W_SCALE"), (*x, *w), strict=True))
    arguments: dict[str, Any] = {f"arg_{key}": value for key, value in operands.items()}
    blocks = [k // 32 for k in SPLITS[2]]
    ends = [2 * (sum(blocks[: i + 1]) + i) + 3 for i in range(3)]
    arguments |= {f"ks{i}": value for i, value in enumerate(ends)}
    names = kernel.arg_names
    arguments |= dict(zip((n for n in names if n.startswith(("in_", "out_"))), (residual, out), strict=True))
    tile = {key: int(value) for key, value in re.findall(r"(BLOCK_[MN]) : tl.constexpr = (\d+)", source)}
    grid = (-(-rows // tile["BLOCK_M"]) * -(-C // tile["BLOCK_N"]),)
    kernel[grid](*(arguments[name] for name in names))
    assert_product_is_exact(out, x, w, residual, "e2m3")

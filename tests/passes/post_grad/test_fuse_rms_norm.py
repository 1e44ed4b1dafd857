"""RMSNorm before a quantizer: on Inductor's graphs, made by hand."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.graphs import run_post_grad
from support.targets import served_by
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from micromix_compile import ops
from micromix_compile.passes import fuse_rms_norm
from micromix_compile.targets.target import Target

pytestmark = pytest.mark.versions


def normed_and_quantized(dtype: torch.dtype, *, keep_rows: bool, widen: bool = True) -> fx.GraphModule:
    """RMSNorm -> reorder_quantize as it looks after AOTAutograd: functional aten, casts as prims."""

    def convert(x: Tensor, *, dtype: torch.dtype, **_: object) -> Tensor:
        return torch.ops.prims.convert_element_type(x, dtype)

    def program(x: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
        h = x.to(torch.float32) if widen else x
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        y = weight * h.to(x.dtype)
        quantized = ops.reorder_quantize(y.reshape(-1, 64), perm, 32, 0, 32, "e2m3", "rceil", "fp8", 32)
        return (y, *quantized) if keep_rows else quantized

    inputs = (torch.randn(2, 3, 64).to(dtype), torch.rand(64).to(dtype), torch.arange(64, dtype=torch.int32))
    return make_fx(program, {torch.ops.aten._to_copy.default: convert}, tracing_mode="fake")(*inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_rms_norm_before_a_quantize_joins_it(dtype: torch.dtype) -> None:
    gm = normed_and_quantized(dtype, keep_rows=False)
    assert run_post_grad(fuse_rms_norm, gm.graph) == 1
    gm.graph.lint()
    targets = Counter(str(node.target) for node in gm.graph.nodes)
    assert targets["micromix.rms_norm_reorder_quantize.default"] == 1
    (fused,) = (node for node in gm.graph.nodes if node.target is ops.rms_norm_reorder_quantize)
    assert fused.args[-2:] == ("fp8", 32)
    assert targets["micromix.reorder_quantize.default"] == targets["aten.rsqrt.default"] == 0


def test_a_norm_whose_rows_are_used_elsewhere_stays() -> None:
    assert run_post_grad(fuse_rms_norm, normed_and_quantized(torch.float32, keep_rows=True).graph) == 0


def test_a_norm_computed_in_half_precision_stays() -> None:
    assert run_post_grad(fuse_rms_norm, normed_and_quantized(torch.bfloat16, keep_rows=False, widen=False).graph) == 0


def test_a_norm_stays_where_the_target_has_no_such_pass() -> None:
    with served_by(Target(name="somebody's", passes=frozenset())):
        assert run_post_grad(fuse_rms_norm, normed_and_quantized(torch.float32, keep_rows=False).graph) == 0

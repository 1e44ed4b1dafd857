"""The sum before an RMSNorm that is part of a quantizer."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from support.graphs import run_post_grad
from support.targets import FOLDING, served_by
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from micromix_compile import ops
from micromix_compile.passes import fuse_residual

pytestmark = pytest.mark.versions


def residual_program(x: Tensor, y: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
    """Two sums of one stream, each behind a quantizer; the first has a reader before it, the second is a result."""
    layout = (perm, 32, 0, 32, "e2m3", "rceil", "same", 0, False)
    first = x + y
    before = first * 2
    folded = ops.rms_norm_reorder_fold(first.reshape(-1, 64), weight, 1e-6, *layout)
    second = first + before
    return (second, *folded, *ops.rms_norm_reorder_fold(second.reshape(-1, 64), weight, 1e-6, *layout))


@pytest.mark.parametrize("shape", [(2, 3, 64), (6, 64)])
@pytest.mark.parametrize("mode", ["fake", "symbolic"])
def test_a_sum_before_a_norm_and_quantize_joins_them_with_equal_results(shape: tuple[int, ...], mode: str) -> None:
    inputs = (*torch.randn(2, *shape).bfloat16(), torch.rand(64).bfloat16(), torch.randperm(64))
    gm = make_fx(residual_program, tracing_mode=mode)(*inputs)
    want = gm(*inputs)
    with served_by(FOLDING):
        assert run_post_grad(fuse_residual, gm.graph) == 2
    gm.graph.lint()
    gm.recompile()
    targets = Counter(str(node.target) for node in gm.graph.nodes)
    assert targets["micromix.add_rms_norm_reorder_fold.default"] == 2
    assert targets["micromix.rms_norm_reorder_fold.default"] == targets["aten.add.Tensor"] == 0
    assert all(torch.equal(a, b) for a, b in zip(gm(*inputs), want, strict=True))


@pytest.mark.parametrize("shape", [(64,), (1, 64), (3, 64)])
def test_a_sum_of_other_shapes_stays_and_leaves_sizes_free(
    shape: tuple[int, ...],
) -> None:
    inputs = (torch.randn(5, 3, 64), torch.randn(shape), torch.rand(64), torch.randperm(64))

    def program(x: Tensor, y: Tensor, weight: Tensor, perm: Tensor) -> tuple[Tensor, ...]:
        rows = (x + y).reshape(-1, 64)
        return ops.rms_norm_reorder_fold(rows, weight, 1e-6, perm, 32, 0, 32, "e2m3", "rceil", "same", 0, False)

    gm = make_fx(program, tracing_mode="symbolic")(*inputs)
    environment = next(iter(gm.graph.nodes)).meta["val"].fake_mode.shape_env
    guards = len(environment.guards)
    with served_by(FOLDING):
        assert run_post_grad(fuse_residual, gm.graph) == 0
    assert len(environment.guards) == guards


def test_a_sum_stays_where_the_target_has_no_such_pass() -> None:
    inputs = (*torch.randn(2, 6, 64).bfloat16(), torch.rand(64).bfloat16(), torch.randperm(64))
    gm = make_fx(residual_program, tracing_mode="fake")(*inputs)
    assert run_post_grad(fuse_residual, gm.graph) == 0

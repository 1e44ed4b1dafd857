"""The folded operations: their checks, and what is kept of weights."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from weakref import ref

import pytest
import torch
from support.products import assert_within_folding, folded_weight, pack_activation
from torch import Tensor

from micromix_compile import ops
from micromix_compile.numerics import folding, packing, reference, rotation
from micromix_compile.numerics.layout import ACTIVATIONS
from micromix_compile.ops import folded, prepared

if TYPE_CHECKING:
    from collections.abc import Callable


def folded_operands(columns: int = 40) -> list[Any]:
    x = pack_activation(torch.randn(3, 96), (32, 32, 32), "e2m3")
    weight = folded_weight(
        reference.reorder_quantize(torch.randn(columns, 96), torch.arange(96), (32, 32, 32), fp6="e2m3"), "e2m3"
    )
    parts = (weight.w4, weight.w6, weight.w8, weight.factor, weight.row_scale)
    return [*x, *([part] for part in parts), [torch.randn(columns)], [], "e2m3", torch.float32]


@pytest.mark.parametrize("activations", ACTIVATIONS)
@pytest.mark.parametrize("rotated", [0, 64])
@pytest.mark.parametrize("w_fp4", [False, True])
def test_the_quantizers_pass_the_checks_of_torch_library(activations: str, rotated: int, w_fp4: bool) -> None:
    x, y, weight = torch.randn(3, 96), torch.randn(3, 96), torch.rand(96)
    layout = (torch.randperm(96), 32, 32, 32, "e2m3", "fit", activations, rotated, w_fp4)
    torch.library.opcheck(ops.reorder_fold, (x, *layout))
    torch.library.opcheck(ops.rms_norm_reorder_fold, (x, weight, 1e-6, *layout))
    torch.library.opcheck(ops.add_rms_norm_reorder_fold, (x, y, weight, 1e-6, *layout))
    torch.library.opcheck(ops.silu_mul_reorder_fold, (x, y, *layout))


def test_the_product_passes_the_checks_of_torch_library() -> None:
    torch.library.opcheck(ops.folded_mm, tuple(folded_operands()))


def test_quantizers_name_what_is_wrong_with_activations_and_rotated() -> None:
    x, perm = torch.randn(3, 96), torch.randperm(96)
    for wrong, message in ((("fp4", 0), "activations must be one of same, fp8, mxfp6"), (("fp8", 48), "rotated must")):
        with pytest.raises(ValueError, match=message):
            ops.reorder_fold(x, perm, 32, 32, 32, "e2m3", "fit", *wrong, False)


@pytest.mark.parametrize("activations", ["same", "fp8", "mxfp6"])
@pytest.mark.parametrize("rotated", [0, 96])
def test_a_folded_linear_is_near_the_exact_one(activations: str, rotated: int) -> None:
    """As `test_folding` derives it, of weights that were rotated before they were quantized."""
    split = (96, 64, 32)
    x, w, perm = torch.randn(7, 192), torch.randn(9, 192), torch.randperm(192)
    packed = reference.reorder_quantize(w, perm, split, fp6="e2m3", rotated=0)
    if rotated:
        turned = rotation.rotate_weight(w[:, perm], rotated)
        packed = reference.reorder_quantize(turned, torch.arange(192), split, fp6="e2m3")
    weight = folded_weight(packed, "e2m3")
    layout = (perm, *split, "e2m3", "fit", activations, rotated)
    exact = ops.mixed_mx_mm(
        *ops.reorder_quantize(x, *layout), weight.w4, weight.w6, weight.w8, packed.scale, None, "e2m3", torch.float32
    )
    (got,) = ops.folded_mm(
        *ops.reorder_fold(x, *layout, False), *([part] for part in weight[:5]), [], [], "e2m3", torch.float32
    )
    left = reference.dequantize_activation(*ops.reorder_quantize(x, *layout))
    right = reference.dequantize_activation(*packed)
    assert_within_folding(got, exact, left, right, activations)
    assert bool(((exact - x @ w.T).norm() / exact.norm()) < 0.2)


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(4), r"row_scale must have shape \(3,\), got \(4,\)"),
        (4, [torch.zeros(3, 40, 0, dtype=torch.uint8)], r"weight 0 takes rows of 64 bytes, q has 128"),
        (6, [torch.zeros(40, 3, dtype=torch.uint8)], r"w_factor\[0\] must have shape \(3, 40, 4\), got \(40, 3\)"),
        (8, [torch.zeros(39)], r"bias\[0\] must have shape \(40,\), got \(39,\)"),
        (8, [torch.zeros(40)] * 2, r"w4 must list 1 to 3 weights, bias as many or none, got 1 and 2"),
        (9, [torch.zeros(40, 64)], r"expanded\[0\] must have shape \(40, 128\), got \(40, 64\)"),
        (9, [torch.zeros(40, 128)] * 2, r"expanded must list as many weights as w4, 1, or none, got 2"),
    ],
)
def test_operands_of_a_folded_product_must_fit(place: int, wrong: Any, message: str) -> None:
    operands = folded_operands()
    operands[place] = wrong
    with pytest.raises(ValueError, match=message):
        ops.folded_mm(*operands)


def test_operands_are_checked_unless_the_kernels_know_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a wrong operand, which only a check finds."""
    operands, met = folded_operands(), []
    operands[1] = torch.zeros(4)
    kernels = SimpleNamespace(multiply_again=lambda *given, has_expanded: met.append(given) or [torch.ones(3, 40)])
    monkeypatch.setattr(folded, "target_of", lambda device: SimpleNamespace(folded=kernels))
    assert torch.equal(ops.folded_mm(*operands)[0], torch.ones(3, 40))
    ((x, parts, fp6, out_dtype),) = met
    assert [part.shape for part in x] == [part.shape for part in operands[:3]]
    assert [part.shape for part in parts] == [one.shape for given in operands[3:9] for one in given]
    assert (fp6, out_dtype) == tuple(operands[10:])
    kernels.multiply_again = lambda *_, **__: None
    with pytest.raises(ValueError, match=r"row_scale must have shape"):
        ops.folded_mm(*operands)


def test_weights_of_one_product_must_be_split_alike() -> None:
    *x, w4, w6, w8, factor, row_scale, _, expanded, fp6, out_dtype = folded_operands()
    other = [torch.zeros(40, 32), torch.zeros(3, 40, 0), torch.zeros(40, 64), torch.zeros(2, 40, 4)]
    lists = [[*first, part.to(torch.uint8)] for first, part in zip((w4, w6, w8, factor), other, strict=True)]
    with pytest.raises(ValueError, match=r"split like the first, \(\d+, \d+, \d+\), weight 1 is split \(64, 0, 64\)"):
        ops.folded_mm(*x, *lists, row_scale * 2, [], expanded, fp6, out_dtype)


def kept(make: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    """As graphs keep what was made of their last call's inputs."""
    one = prepared.Kept(make)
    return lambda *inputs: one.of(inputs[-1:], *inputs)


@pytest.mark.parametrize("keep", [lambda make: make, kept], ids=["all", "one"])
def test_factors_follow_their_scales(keep: Callable[..., Callable[..., tuple[Tensor, ...]]]) -> None:
    q = reference.reorder_quantize(torch.randn(5, 96), torch.arange(96), (32, 32, 32), fp6="e2m3")
    w6, scale = packing.pack_fp6(q.q6, "e2m3"), q.scale.clone()
    of = keep(partial(prepared.folded_factors, fp6="e2m3"))

    def factors() -> tuple[Tensor, ...]:
        return of(q.q4, w6, q.q8, scale)

    first = factors()
    assert factors()[0] is first[0]
    scale.add_(1)
    assert torch.equal(factors()[1], 2 * first[1])
    scale.data = scale + 1
    assert torch.equal(factors()[1], 4 * first[1])
    assert torch.equal(of(q.q4, w6, q.q8, scale + 1)[1], 8 * first[1])
    assert torch.equal(factors()[1], 4 * first[1])


def test_an_expanded_weight_follows_its_scales_and_is_made_once() -> None:
    q = reference.reorder_quantize(torch.randn(5, 96), torch.arange(96), (32, 32, 32), fp6="e2m3")
    w6, scale = packing.pack_fp6(q.q6, "e2m3"), q.scale.clone()

    def expanded() -> tuple[Tensor, Tensor]:
        (w,) = prepared.expanded_weight(q.q4, w6, q.q8, scale, fp6="e2m3")
        factor, row_scale = prepared.folded_factors(q.q4, w6, q.q8, scale, fp6="e2m3")
        assert torch.equal(w, folding.fold_weight(q.q4, w6, q.q8, factor, "e2m3"))
        return w, row_scale

    first = expanded()[0]
    assert expanded()[0] is first
    scale[0, 0] += 3
    assert expanded()[0] is not first


def test_a_product_with_expanded_weights_is_that_of_the_packed() -> None:
    operands = folded_operands()
    want = ops.folded_mm(*operands)[0]
    w = folding.fold_weight(*(operands[i][0] for i in (3, 4, 5, 6)), "e2m3")
    operands[9] = [w]
    assert torch.equal(ops.folded_mm(*operands)[0], want)
    operands[9] = [torch.zeros_like(w)]
    assert torch.equal(ops.folded_mm(*operands)[0], operands[8][0].expand(3, 40)), "they are what is read"
    torch.library.opcheck(ops.folded_mm, tuple(operands))


def test_what_a_graph_keeps_is_let_go_before_it_is_made_anew() -> None:
    """It may be all weights of a model."""
    made: list[ref[Tensor]] = []

    def make() -> Tensor:
        assert all(one() is None for one in made)
        new = torch.zeros(3)
        made.append(ref(new))
        return new

    one, other, keep = torch.zeros(3), torch.zeros(3), prepared.Kept(make)
    for keys, count in (((one, other), 1), ((one, other), 1), ((other, one), 2), ((other, one), 2)):
        keep.of(keys)
        assert len(made) == count
    other.add_(1)
    keep.of((other, one))
    assert len(made) == 3


def test_a_short_order_follows_its_order_and_is_made_once() -> None:
    perm = torch.arange(96, dtype=torch.int32)
    of = kept(prepared.short_order)
    (short,) = of(perm)
    assert short.dtype == torch.int16
    assert of(perm)[0] is prepared.short_order(perm)[0] is short
    perm.copy_(perm.flip(0))
    assert torch.equal(of(perm)[0].int(), perm)

"""The persistent kernel on a GPU that it is made for (sm_90): exact, the same every time, in graphs and on streams."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.folded import (
    OnePlan,
    assert_equal_but_for_one_rounding,
    exact_integers,
    folded_rows,
    integers,
    random_weight,
)
from support.gpu import FOLDS, compiled, launches, needs_folding
from support.products import assert_folded_product_is_exact
from torch import Tensor, nn
from torch._dynamo.utils import counters

import micromix_compile as micromix
from micromix_compile.targets import gluon
from micromix_compile.targets.gluon_tiles import GluonTiles, TimedTile, gluon_sm_90, steps_of
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon_tiles import Plan
    from micromix_compile.targets.kernels import FoldedWeight

pytestmark = [pytest.mark.gpu, needs_folding, pytest.mark.usefixtures("nan_filled_memory")]

Split = tuple[int, int, int]

SPLIT = (3072, 832, 192)
KERNEL = "folded_mm_rows_kernel"


def kernels() -> TritonFolded:
    """Of the GPU that is here."""
    found = target_of(torch.device("cuda")).folded
    assert isinstance(found, TritonFolded)
    return found


def tiles() -> GluonTiles:
    found = kernels().tiles.gluon
    assert found is not None, "the image's Triton compiles the kernel"
    return found


TABLE = gluon_sm_90(132).table
each_tile = pytest.mark.parametrize("timed", TABLE, ids=lambda one: f"{one.tile.BLOCK_M}x{one.tile.BLOCK_N}")


def plans(timed: TimedTile, rows: int, columns: Sequence[int], split: Split) -> list[Plan]:
    """All ways to share the tiles of a product."""
    options = timed.options(timed.tile.count(rows, columns), steps_of(split), tiles().processors)
    return [plan for _, plan in options]


def multiply(x: FoldedActivation, weights: Sequence[FoldedWeight], fp6: str, plan: Plan) -> Tensor:
    """The products side by side."""
    outs = gluon.multiply(x, weights, fp6, torch.bfloat16, OnePlan(plan))
    assert outs is not None
    assert all(out.is_contiguous() for out in outs)
    assert not x.locks.any(), "locks are left"
    return torch.cat(outs, 1)


@each_tile
@pytest.mark.parametrize(
    ("rows", "columns", "split", "fp6", "bias"),
    [
        (1, [16], (0, 64, 0), "e2m3", False), (65, [272], (0, 0, 160), "e2m3", False),
        (513, [264], (256, 0, 0), "e2m3", False), (300, [400], SPLIT, "e2m3", False),
        (130, [8], (32, 64, 32), "e2m3", False), (70, [136, 64, 8], (32, 128, 32), "e3m2", True),
        (259, [264, 512, 40], (288, 64, 96), "e3m2", True),
    ],
)  # fmt: skip
def test_products_of_integers_are_exact_however_tiles_are_shared(
    timed: TimedTile, rows: int, columns: list[int], split: Split, fp6: str, bias: bool
) -> None:
    x, weights = integers(rows, columns, split, fp6, bias=bias, device="cuda")
    want = exact_integers(x, weights, fp6)
    for plan in plans(timed, rows, columns, split):
        assert_equal_but_for_one_rounding(multiply(x, weights, fp6, plan), want)


@each_tile
def test_products_stay_within_the_derived_bound(timed: TimedTile) -> None:
    for rows, columns, split in ((129, [408], (2080, 1152, 864)), (70, [136], (96, 64, 32))):
        x = folded_rows(rows, split, "e2m3", device="cuda")
        weights = [random_weight(n, split, "e2m3", device="cuda") for n in columns]
        for plan in plans(timed, rows, columns, split):
            got = multiply(x, weights, "e2m3", plan)
            assert_folded_product_is_exact(got, x, weights, "e2m3", mma_channels=x.q.shape[1])


@each_tile
@pytest.mark.parametrize(
    ("activations", "rotated"), [("same", 0), ("same", 288), ("mxfp6", 288), ("fp8", 0), ("fp8", 288)]
)
def test_every_kind_of_activation_is_multiplied_as_it_was_quantized(
    timed: TimedTile, activations: str, rotated: int
) -> None:
    split: Split = (288, 64, 96)
    x = torch.randn(131, sum(split), dtype=torch.bfloat16, device="cuda")
    perm = torch.randperm(sum(split), device="cuda").to(torch.int16)
    folded = kernels().quantize(
        "none", x, None, 0.0, perm, split, "e2m3", "rceil", w_fp4=False, activations=activations, rotated=rotated
    )
    weights = [random_weight(n, split, "e2m3", device="cuda") for n in (136, 64)]
    for plan in plans(timed, 131, [136, 64], split):
        got = multiply(folded, weights, "e2m3", plan)
        assert_folded_product_is_exact(got, folded, weights, "e2m3", mma_channels=folded.q.shape[1])


@each_tile
def test_a_row_without_a_scale_is_nan_in_the_product_and_no_other(timed: TimedTile) -> None:
    x, weight = folded_rows(69, (64, 64, 32), "e2m3", device="cuda"), random_weight(72, (64, 64, 32), "e2m3")
    weight = type(weight)(*(None if part is None else part.cuda() for part in weight))
    x.row_scale[[3, 68]] = torch.nan
    weight.row_scale[70] = torch.nan
    want = torch.zeros(69, 72, dtype=torch.bool, device="cuda")
    want[[3, 68]], want[:, 70] = True, True
    for plan in plans(timed, 69, [72], (64, 64, 32)):
        assert torch.equal(multiply(x, [weight], "e2m3", plan).isnan(), want)


@each_tile
def test_shared_tiles_are_the_same_every_time_while_others_crowd_the_memory(timed: TimedTile) -> None:
    """Without a fence before a stage goes back to the copy engine some of these were wrong, differently each time."""
    x = folded_rows(777, SPLIT, "e2m3", device="cuda")
    weights = [random_weight(6144, SPLIT, "e2m3", device="cuda")]
    noise, side = torch.randn(64, 2**20, device="cuda"), torch.cuda.Stream()
    plan = plans(timed, 777, [6144], SPLIT)[-1]
    first = multiply(x, weights, "e2m3", plan)
    for _ in range(8):
        with torch.cuda.stream(side):
            noise.add_(1)
        assert torch.equal(multiply(x, weights, "e2m3", plan), first)
    whole = multiply(x, weights, "e2m3", plans(timed, 777, [6144], SPLIT)[0])
    assert float((first.double() - whole.double()).norm()) <= 2.0**-8 * float(whole.double().norm())


@pytest.mark.parametrize("rows", [65, 200, 1024])
def test_the_operation_takes_the_kernel_and_the_next_rows_do_not(rows: int) -> None:
    x = folded_rows(rows, SPLIT, "e2m3", device="cuda")
    weights = [random_weight(n, SPLIT, "e2m3", device="cuda") for n in (512, 256)]
    names = launches(lambda: kernels().multiply(x, weights, "e2m3", torch.bfloat16))
    assert sum(KERNEL in name for name in names) == 1
    more = folded_rows(1025, SPLIT, "e2m3", device="cuda")
    names = launches(lambda: kernels().multiply(more, weights, "e2m3", torch.bfloat16))
    assert not any(KERNEL in name for name in names)


def test_memory_where_tma_does_not_take_it_goes_the_other_way() -> None:
    x, weight = folded_rows(100, SPLIT, "e2m3", device="cuda"), random_weight(256, SPLIT, "e2m3", device="cuda")
    room = torch.empty(weight.w8.numel() + 8, dtype=torch.uint8, device="cuda")
    moved = weight._replace(w8=room[8:].view_as(weight.w8).copy_(weight.w8))
    (want,) = kernels().multiply(x, [weight], "e2m3", torch.bfloat16)
    (got,) = kernels().multiply(x, [moved], "e2m3", torch.bfloat16)
    assert float((got.double() - want.double()).norm()) <= 0.01 * float(want.double().norm())


def test_weights_and_activations_are_read_anew_in_a_cuda_graph_and_out_of_it() -> None:
    x, weight = folded_rows(256, SPLIT, "e2m3", device="cuda"), random_weight(4096, SPLIT, "e2m3", device="cuda")
    other_x, other = folded_rows(256, SPLIT, "e2m3", device="cuda"), random_weight(4096, SPLIT, "e2m3", device="cuda")

    def run() -> Tensor:
        return kernels().multiply(x, [weight], "e2m3", torch.bfloat16)[0]

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    for source_x, source in ((x, weight), (other_x, other)):
        for mine, its in zip(
            (x.q, x.row_scale, *weight[:5]), (source_x.q, source_x.row_scale, *source[:5]), strict=True
        ):
            mine.copy_(its)
        want = kernels().multiply(source_x, [source], "e2m3", torch.bfloat16)[0].clone()
        assert torch.equal(run(), want)
        captured.fill_(torch.nan)
        graph.replay()
        assert torch.equal(captured, want)


def test_two_streams_multiply_with_one_weight_at_a_time() -> None:
    weight = random_weight(4096, SPLIT, "e2m3", device="cuda")
    inputs = [folded_rows(256 - 32 * (i % 3), SPLIT, "e2m3", device="cuda") for i in range(8)]
    alone = [kernels().multiply(x, [weight], "e2m3", torch.bfloat16)[0] for x in inputs]
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for i, x in enumerate(inputs):
        with torch.cuda.stream(streams[i % 2]):
            torch.cuda._sleep(100_000)
            outs.append(kernels().multiply(x, [weight], "e2m3", torch.bfloat16)[0])
    torch.cuda.synchronize()
    assert all(torch.equal(got, want) for got, want in zip(outs, alone, strict=True))


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_one_compiled_graph_serves_all_rows_that_the_kernel_takes(mode: str) -> None:
    net = nn.Sequential(nn.Linear(1024, 256), nn.Linear(256, 512)).to(torch.bfloat16).cuda().eval()
    x = torch.randn(300, 1024, dtype=torch.bfloat16, device="cuda")
    config = micromix.MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", skip=())
    recipe = micromix.calibrate(net, [x, x[:7]], config)
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    fast = compiled(net, recipe, exact=False, mode=mode)
    counters.clear()
    with torch.no_grad():
        for rows in (300, 65, 128, 1024, 513):
            some = torch.randn(rows, 1024, dtype=torch.bfloat16, device="cuda")
            got, want = fast(some).clone(), packed(some)
            assert float((got - want).float().abs().mean()) <= 0.02 * float(want.float().abs().max())
        assert counters["stats"]["unique_graphs"] == 1


def test_the_image_has_the_kernel() -> None:
    assert FOLDS
    assert tiles().processors == torch.cuda.get_device_properties(0).multi_processor_count

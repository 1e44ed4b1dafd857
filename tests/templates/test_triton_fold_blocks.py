"""Many rows of which a thread has whole blocks, against plain PyTorch, byte for byte: interpreted, or on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.covering import part
from support.folded_rows import assert_folds, check_fold
from support.products import INTERPRETED, SEGMENTS, one_format
from support.rows import gates_of_one_rounding, rows_of_every_size, rows_with_an_exact_mean
from torch import Tensor
from torch.nn.functional import silu

from micromix_compile import ops
from micromix_compile.numerics import folding
from micromix_compile.numerics.folding import FoldedActivation
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding
from micromix_compile.targets import quantizers
from micromix_compile.targets.folded_tiles import FOLDED_SM_90
from micromix_compile.targets.hopper import TritonFolded, reorder_fold_call
from micromix_compile.targets.kernels import Residual

if TYPE_CHECKING:
    from micromix_compile.targets.launch import KernelCall

    Split = tuple[int, int, int]

pytestmark = [pytest.mark.usefixtures("nan_filled_memory", "many_rows"), *INTERPRETED]

CHANNELS = 4096
SPLIT = (2048, 1440, 608)  # an odd number of MXFP6 blocks: zeros in the place of the next, and to whole lines
ROTATIONS = (0, 2048, CHANNELS)


@pytest.fixture
def many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """However few there are."""
    monkeypatch.setattr(quantizers, "FEW_ROWS", 0)


def order(channels: int) -> Tensor:
    padding = torch.full((-channels % BLOCK_SIZE,), -1)
    return torch.cat((torch.randperm(channels), padding))[torch.randperm(channels + len(padding))].to(torch.int16)


def launch_of(
    x: Tensor, perm: Tensor, other: Tensor | None = None, *, producer: str = "none", activations: str = "fp8",
    rotated: int = 0,
) -> KernelCall:  # fmt: skip
    out = FoldedActivation(*(torch.empty(0) for _ in range(3)))
    return reorder_fold_call(
        producer, x, other, 0.0, perm, (len(perm), 0, 0), out, fp6="e2m3", scale_rounding="fit", w_fp4=False,
        activations=activations, rotated=rotated, tiles=FOLDED_SM_90,
    )  # fmt: skip


def test_rows_go_by_blocks_where_a_thread_has_whole_ones_and_pairs_of_channels() -> None:
    def goes(
        rows: int = 9, dtype: torch.dtype = torch.bfloat16, index: torch.dtype = torch.int16, **options: Any
    ) -> bool:
        x, perm = torch.empty(rows, CHANNELS, dtype=dtype), torch.arange(CHANNELS, dtype=index)
        return bool(launch_of(x, perm, **options).constexprs["BY_BLOCKS"])

    assert goes()
    assert goes(producer="rms_norm", other=torch.empty(CHANNELS, dtype=torch.bfloat16))
    assert goes(activations="mxfp6", rotated=32)
    assert not goes(activations="mxfp6")
    assert not goes(producer="rms_norm", other=torch.empty(CHANNELS))
    assert not goes(dtype=torch.float16)
    assert not goes(index=torch.int32)
    x, perm = torch.empty(9, 2048, dtype=torch.bfloat16), torch.arange(2048, dtype=torch.int16)
    assert not launch_of(x, perm).constexprs["BY_BLOCKS"]


@pytest.mark.parametrize("scale_rounding", list(ScaleRounding))
@pytest.mark.parametrize("rotated", ROTATIONS)
def test_magnitudes_of_the_whole_range_with_specials_in_some_rows(
    device: str, scale_rounding: str, rotated: int
) -> None:
    rows = list(rows_of_every_size(4, CHANNELS, CHANNELS, torch.bfloat16))
    for index, (center, x, perm) in enumerate(part(rows, 2, device, ROTATIONS.index(rotated))):
        x[:2] = torch.where(x[:2].abs().float() <= 2.0 ** min(center + 4, 127), x[:2], 0.0)
        x[2] = torch.where(x[2].isfinite(), x[2], 0.0)  # with the dtype's largest value
        check_fold(
            device, x, perm.to(torch.int16), SPLIT, "e2m3", scale_rounding, w_fp4=index % 2 == 1, activations="fp8",
            rotated=rotated,
        )  # fmt: skip


@pytest.mark.parametrize("fmt", SEGMENTS)
@pytest.mark.parametrize("rotated", ROTATIONS)
def test_every_segment_of_every_kind_of_weights(device: str, fmt: str, rotated: int) -> None:
    split, fp6 = one_format(fmt, CHANNELS)
    x = torch.randn(3, CHANNELS).bfloat16()
    check_fold(device, x, order(CHANNELS), split, fp6, "rceil", activations="fp8", rotated=rotated)


@pytest.mark.parametrize(
    ("channels", "rotated"), [(4097, 4128), (8190, 64), (14336, 10752), (28679, 12800), (33007, 33024)]
)
def test_padded_and_wide_rows(device: str, channels: int, rotated: int) -> None:
    """With several blocks a thread, or several parts and chunks; all programs of a row have its scale."""
    x = torch.randn(2, channels).bfloat16()
    x[0, 3], x[1, -1] = 1000.0, -777.0
    perm = order(channels) if channels < 32768 else order(32768)
    if channels > 32768:
        perm = torch.cat((torch.arange(channels), torch.full((-channels % BLOCK_SIZE,), -1)))
    split = (len(perm) - 2048, 1056, 992)
    check_fold(device, x, perm, split, "e2m3", "fit", activations="fp8", rotated=rotated)


def test_an_order_may_be_longer_than_a_row_that_fills_a_tile(device: str) -> None:
    """There is no zero behind the row, to which -1 could point."""
    perm = torch.cat((torch.full((BLOCK_SIZE,), -1), torch.randperm(2 * CHANNELS))).to(torch.int16)
    x = torch.randn(2, 2 * CHANNELS).bfloat16()
    check_fold(device, x, perm, (len(perm), 0, 0), "e2m3", "fit", activations="fp8", rotated=64)


def test_a_special_value_takes_its_rows_scale_alone(device: str) -> None:
    x = -torch.rand(5, CHANNELS).bfloat16()
    x[0, 5], x[2, CHANNELS - 1], x[3, 7] = torch.nan, torch.inf, -torch.inf
    for rotated in ROTATIONS:
        check_fold(device, x, order(CHANNELS), SPLIT, "e2m3", "fit", activations="fp8", rotated=rotated)


def test_every_bfloat16_beside_one_that_fixes_the_row(device: str) -> None:
    values = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    values = values[values.abs() <= 384]
    values = torch.cat((values, torch.zeros(-len(values) % (CHANNELS - 1)).bfloat16())).reshape(-1, CHANNELS - 1)
    x = torch.cat((values, torch.full((len(values), 1), 384.0).bfloat16()), 1)
    for rounding in ScaleRounding:
        check_fold(device, x, torch.arange(CHANNELS).to(torch.int16), SPLIT, "e2m3", rounding, activations="fp8")


def test_only_the_outputs_are_written(device: str) -> None:
    x, perm = torch.randn(3, CHANNELS, device=device).bfloat16(), order(CHANNELS).to(device)
    want = TritonFolded().quantize(
        "none", x, None, 0.0, perm, SPLIT, "e2m3", "fit", w_fp4=False, activations="fp8", rotated=2048
    )
    q = torch.full((5, folding.fold_width(SPLIT, w_fp4=False)), 0xA5, dtype=torch.uint8, device=device)
    row_scale, locks = torch.full((5,), 7.0, device=device), torch.full((folding.LOCKS + 2,), 7, device=device).int()
    inner = FoldedActivation(q[1:4], row_scale[1:4], locks[1:-1])
    reorder_fold_call(
        "none", x, None, 0.0, perm, SPLIT, inner, fp6="e2m3", scale_rounding="fit", w_fp4=False, activations="fp8",
        rotated=2048, tiles=FOLDED_SM_90,
    ).launch()  # fmt: skip
    assert all(torch.equal(got, wanted) for got, wanted in zip(inner, want, strict=True))
    assert bool((q[[0, 4]] == 0xA5).all())
    assert row_scale[[0, 4]].tolist() == [7.0, 7.0]
    assert locks[[0, -1]].tolist() == [7, 7]


@pytest.mark.parametrize("activations", ["same", "fp8", "mxfp6"])
@pytest.mark.parametrize("rotated", ROTATIONS)
def test_a_sum_and_a_norm_before_it(device: str, activations: str, rotated: int) -> None:
    x, residual = (torch.randint(-7, 8, (3, CHANNELS), device=device).bfloat16() for _ in range(2))
    _, weight, _, split = rows_with_an_exact_mean(1, CHANNELS, torch.bfloat16)
    weight, perm = weight.to(device), order(CHANNELS)
    added = Residual(residual, torch.full_like(x, torch.nan))
    layout = (perm.to(device), split, "e2m3", "fit")
    got = TritonFolded().quantize(
        "rms_norm", x, weight, 1e-5, *layout, w_fp4=False, residual=added, activations=activations, rotated=rotated
    )
    assert torch.equal(added.total, x + residual)
    want = ops.rms_norm(x + residual, weight, 1e-5).cpu()
    assert_folds(got, want, perm, *layout[1:], w_fp4=False, activations=activations, rotated=rotated)


@pytest.mark.parametrize("activations", ["fp8", "mxfp6"])
def test_silu_mul_before_it(device: str, activations: str) -> None:
    gate, up = (
        torch.cat((one[::2][:11], one[1::2][:11]), 1) for one in gates_of_one_rounding(torch.bfloat16)
    )  # of 4096 channels
    layout = (order(CHANNELS), SPLIT, "e2m3", "fit")
    got = TritonFolded().quantize(
        "silu_mul", gate.to(device), up.to(device), 0.0, layout[0].to(device), *layout[1:], w_fp4=False,
        activations=activations, rotated=2048,
    )  # fmt: skip
    assert_folds(got, silu(gate) * up, *layout, w_fp4=False, activations=activations, rotated=2048)

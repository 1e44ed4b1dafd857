"""The Triton product against float64, by the kernel's own source: interpreted on a CPU, compiled on a GPU."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.products import assert_product_is_exact, packed_rows, quantized_rows

from micromix_compile import ops
from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.formats import BLOCK_SIZE, FP6_FORMATS
from micromix_compile.numerics.layout import PackedWeight
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets.exact import TritonExact
from micromix_compile.targets.target import target_of
from micromix_compile.targets.tiles import MIXED_TILES, MixedTiles, Tile

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = pytest.mark.usefixtures("nan_filled_memory")

Split = tuple[int, int, int]
Packed = tuple["Tensor", "Tensor", "Tensor", "Tensor"]

# Small, so that the interpreter runs several programs and several steps along K; both operand orders.
TILES = (Tile(16, 32, 64, 4, 2), Tile(32, 16, 128, 4, 2, SWAP=True))
UNIT = {"cpu": 2.0**-24, "cuda": 2.0**-23}


def tiles_on(device: str) -> MixedTiles:
    """What serves the device: the GPU's own tiles, or the interpreter's float32 arithmetic."""
    if device == "cpu":
        return replace(MIXED_TILES["bf16"], mode="f32")
    tiles = target_of(torch.device(device)).exact.tiles
    assert tiles is not None
    return tiles


def multiply(
    tiles: MixedTiles, operands: list[Tensor], bias: Tensor | None, out_dtype: torch.dtype = torch.float32, *,
    fp6: str = "e2m3", tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    x, w = QuantizedActivation(*operands[:4]), PackedWeight(*operands[4:])
    return TritonExact(tiles).multiply(x, w, bias, fp6, out_dtype, tile=tile)


def check(
    device: str, x: QuantizedActivation, w: Packed, bias: Tensor | None, fp6: str, tile: Tile | None, **changes: Any
) -> None:
    """Multiply on `device`, from memory that is NaN where nobody wrote, and compare."""
    operands = [tensor.to(device) for tensor in (*x, *w)]
    moved = None if bias is None else bias.to(device)
    out = multiply(replace(tiles_on(device), **changes), operands, moved, fp6=fp6, tile=tile).cpu()
    assert_product_is_exact(out, x, w, bias, fp6, unit=UNIT[device])


def kinds_of_operands(split: Split) -> list[tuple[Split, Split]]:
    """Splits of activations and of weights that a product takes: alike, weights all MXFP4, activations all E4M3."""
    channels = sum(split)
    return [(split, split), (split, (channels, 0, 0)), ((0, 0, channels), split)]


@settings(max_examples=150, deadline=None)
@given(
    st.data(),
    st.tuples(*[st.integers(0, 6).map(lambda n: n * BLOCK_SIZE)] * 3),
    st.sampled_from(FP6_FORMATS),
    st.sampled_from(TILES),
)
def test_product_of_any_shape(device: str, data: st.DataObject, split: Split, fp6: str, tile: Tile) -> None:
    rows, columns = data.draw(st.integers(0, 40)), data.draw(st.integers(0, 70))
    torch.manual_seed(data.draw(st.integers(0, 2**32 - 1)))
    magnitude = 2.0 ** data.draw(st.sampled_from((-100, 0, 100)))
    x_split, w_split = data.draw(st.sampled_from(kinds_of_operands(split)))
    widen_fp4 = data.draw(st.booleans())
    x, w = quantized_rows(rows, x_split, fp6, magnitude), packed_rows(columns, w_split, fp6)
    bias = torch.randn(columns) if data.draw(st.booleans()) else None
    check(device, x, w, bias, fp6, tile, widen_fp4=widen_fp4)


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("split", [(32, 0, 0), (0, 32, 0), (0, 0, 32)])
@pytest.mark.parametrize("tile", TILES)
def test_every_code_is_decoded_under_every_scale(device: str, split: Split, fp6: str, tile: Tile) -> None:
    """Every code meets every scale, as far up as the sums stay below float32's overflow."""
    scales = torch.arange(230, dtype=torch.uint8)
    for first in range(0, 256, 32):
        x = quantized_rows(len(scales), split, fp6)
        x.scale[:, 0] = scales
        write_codes(x, torch.arange(first, first + 32, dtype=torch.uint8).expand(len(scales), 32), split, fp6)
        check(device, x, packed_rows(16, split, fp6), None, fp6, tile)


def write_codes(x: QuantizedActivation, codes: Tensor, split: Split, fp6: str) -> None:
    """Overwrite the one block of each row of x by 32 codes, those of all bits that the format has."""
    if split[0]:
        x.q4.copy_(17 * torch.arange(16, dtype=torch.uint8).expand(len(codes), 16))  # each of the 16 in both nibbles
    elif split[1]:
        aligned, _ = packing.align_fp6(codes & 0x3F, torch.zeros_like(x.scale), fp6)
        x.q6.copy_(aligned)
    else:
        x.q8.copy_(torch.where(codes & 0x7F == 0x7F, 0, codes))


@pytest.mark.parametrize("segment", [0, 1, 2])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize(("x_split", "w_split"), kinds_of_operands((32, 32, 32)))
def test_a_nan_scale_reaches_its_row_or_column_and_no_other(
    device: str, segment: int, tile: Tile, x_split: Split, w_split: Split
) -> None:
    x, w = quantized_rows(21, x_split, "e3m2"), packed_rows(20, w_split, "e3m2")
    x.scale[20, segment] = 255
    w[3][7, segment] = 255
    check(device, x, w, None, "e3m2", tile, widen_fp4=True)


@pytest.mark.parametrize("tile", TILES)
def test_the_nan_code_of_e4m3_decodes_to_nan(device: str, tile: Tile) -> None:
    x, w = quantized_rows(3, (0, 0, 64), "e2m3"), packed_rows(5, (0, 0, 64), "e2m3")
    w[2][3, 40] = 0x7F
    x.q8[0, 1] = 0xFF
    check(device, x, w, None, "e2m3", tile)


@pytest.mark.parametrize(("swizzle_x", "swizzle_w"), [(True, False), (False, True), (True, True)])
@pytest.mark.parametrize("swap", [False, True])
def test_swizzled_scales_give_the_same_product(device: str, swizzle_x: bool, swizzle_w: bool, swap: bool) -> None:
    split = (160, 224, 32)  # 5, 7 and 1 blocks: no segment is a whole number of tiles
    x, w = quantized_rows(140, split, "e2m3"), packed_rows(150, split, "e2m3")
    tiles, tile = tiles_on(device), Tile(128, 128, 128, 8, 1, SWAP=swap)
    operands = [tensor.to(device) for tensor in (*x, *w)]
    plain = multiply(tiles, operands, None, tile=tile)
    for index, swizzle in ((3, swizzle_x), (7, swizzle_w)):
        if swizzle:
            operands[index] = packing.swizzle_scale(operands[index], split)
    assert torch.equal(multiply(tiles, operands, None, tile=tile), plain)


@pytest.mark.parametrize("swap", [False, True])
def test_swizzled_scales_of_weights_meet_activations_of_one_format_whose_own_must_be_plain(
    device: str, swap: bool
) -> None:
    split = (160, 224, 32)
    x, w = quantized_rows(140, (0, 0, 416), "e2m3"), packed_rows(150, split, "e2m3")
    tiles, tile = tiles_on(device), Tile(128, 128, 128, 8, 1, SWAP=swap)
    operands = [tensor.to(device) for tensor in (*x, *w)]
    plain = multiply(tiles, operands, None, tile=tile)
    operands[7] = packing.swizzle_scale(operands[7], split)
    assert torch.equal(multiply(tiles, operands, None, tile=tile), plain)
    operands[3] = packing.swizzle_scale(operands[3], (0, 0, 416))
    with pytest.raises(ValueError, match=r"x_scale must not be swizzled .* weights are split \(160, 224, 32\)"):
        multiply(tiles, operands, None, tile=tile)


@pytest.mark.parametrize("activations", ["fp8", "mxfp6"])
@pytest.mark.parametrize("tile", TILES)
def test_activations_of_their_own_format_meet_weights_of_any(device: str, activations: str, tile: Tile) -> None:
    """As quantizers make them: rotated, and of one row with a NaN, which is the row's alone."""
    split, perm = (96, 64, 32), torch.randperm(192)
    rows = torch.randn(19, 192) * torch.exp2(torch.randint(-6, 3, (19, 1)))
    rows[4, 7] = torch.nan
    x = reference.reorder_quantize(rows, perm, split, fp6="e2m3", activations=activations, rotated=96)
    check(device, x, packed_rows(37, split, "e2m3"), torch.randn(37), "e2m3", tile)
    check(device, x, packed_rows(37, (192, 0, 0), "e2m3"), None, "e2m3", tile, widen_fp4=True)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.gpu
def test_the_sum_is_rounded_once(out_dtype: torch.dtype) -> None:
    split = (96, 64, 64)
    x, w, bias = quantized_rows(33, split, "e2m3"), packed_rows(50, split, "e2m3"), torch.randn(50)
    *operands, moved = [tensor.cuda() for tensor in (*x, *w, bias)]
    wide = multiply(tiles_on("cuda"), operands, moved)
    assert torch.equal(multiply(tiles_on("cuda"), operands, moved, out_dtype), wide.to(out_dtype))


def sweep() -> list[tuple[int, int, Split]]:
    """40 products: odd and even extents, K from 64 to 28,672, real models' shapes, and every kind of split."""
    shapes = [(1, 1, 64), (1, 127, 64), (3, 5, 96), (7, 999, 160), (16, 576, 576), (17, 1536, 576), (1, 576, 1536)]
    shapes += [(33, 49, 1088), (1, 6144, 4096), (16, 4096, 4096), (63, 4097, 4096), (2, 28672, 4096)]
    shapes += [(129, 257, 8192), (5, 4096, 14336), (255, 513, 14336), (1, 8192, 28672), (31, 1025, 28672)]
    shapes += [(1000, 1000, 2048), (4999, 129, 1024), (300, 152, 18944)]
    shares = ((0.75, 0.2), (0.5, 0.35), (0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (0.4, 0.0))
    cases = []
    for index, (rows, columns, k) in enumerate(shapes * 2):
        share4, share6 = shares[index % len(shares)]
        k4, k6 = (int(k * share) // BLOCK_SIZE * BLOCK_SIZE for share in (share4, share6))
        cases.append((rows, columns, (k4, k6, k - k4 - k6)))
    return cases


@pytest.mark.gpu
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize(("rows", "columns", "split"), sweep())
def test_no_shape_is_special(rows: int, columns: int, split: Split, wide: bool) -> None:
    fp6 = FP6_FORMATS[rows % 2]
    x = quantized_rows(rows, (0, 0, sum(split)) if wide else split, fp6)
    check("cuda", x, packed_rows(columns, split, fp6), torch.randn(columns), fp6, None)


def every_tile() -> list[Any]:
    """All tiles of all families: those of Blackwell run here with `tl.dot_scaled` emulated, which is their logic."""
    return [
        pytest.param(name, tile, id=f"{name}-{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}-{most.bit_length()}")
        for name, family in MIXED_TILES.items()
        for most, tiles in family.tiles
        for tile in tiles
    ]


@pytest.mark.gpu
@pytest.mark.parametrize(("x_split", "w_split"), kinds_of_operands((352, 160, 96)))
@pytest.mark.parametrize(("name", "tile"), every_tile())
def test_every_tile_of_every_family(name: str, tile: Tile, x_split: Split, w_split: Split) -> None:
    for rows, fp6 in product((1, 150), FP6_FORMATS):
        x, w = quantized_rows(rows, x_split, fp6), packed_rows(300, w_split, fp6)
        own = MIXED_TILES[name]
        check("cuda", x, w, None, fp6, tile, mode=own.mode, widen_fp4=own.widen_fp4)


def test_product_of_operands_that_fit_no_kernel_is_refused(device: str) -> None:
    x, w = quantized_rows(3, (64, 0, 32), "e2m3"), packed_rows(4, (32, 32, 32), "e2m3")
    operands = [tensor.to(device) for tensor in (*x, *w)]
    with pytest.raises(ValueError, match=r"\(64, 0, 32\), or all MXFP4, or meet MXFP8 alone, got \(32, 32, 32\)"):
        multiply(tiles_on(device), operands, None)


def meta(*shape: int, dtype: torch.dtype = torch.uint8) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def test_operands_that_do_not_fit_are_refused_where_a_graph_is_traced() -> None:
    """What is compiled launches without a look at its arguments, so tracing must look."""
    good = [meta(3, 16), meta(3, 32), meta(3, 0), meta(3, 2), meta(5, 16), meta(3, 5, 8), meta(5, 0), meta(5, 2)]
    assert ops.mixed_mx_mm(*good, meta(5), "e2m3", torch.float32).shape == (3, 5)
    for index, bad in ((1, meta(1, 32)), (3, meta(3, 1)), (5, meta(3, 5, 16)), (7, meta(4, 2))):
        with pytest.raises(ValueError, match=r"must have shape|channels"):
            ops.mixed_mx_mm(*good[:index], bad, *good[index + 1 :], None, "e2m3", torch.float32)
    with pytest.raises(ValueError, match=r"bias must have shape \(5,\)"):
        ops.mixed_mx_mm(*good, meta(1), "e2m3", torch.float32)
    with pytest.raises(ValueError, match="fp6 must be one of"):
        ops.mixed_mx_mm(*good, None, "e9m9", torch.float32)
    x, perm = meta(3, 64, dtype=torch.bfloat16), meta(64, dtype=torch.int32)
    layout = (perm, 32, 0, 32, "e2m3", "rceil", "same", 0)
    with pytest.raises(ValueError, match="sums to 96"):
        ops.reorder_quantize(x, perm, 32, 32, 32, "e2m3", "rceil", "same", 0)
    with pytest.raises(ValueError, match="activations must be one of same, fp8, mxfp6, got 'bf16'"):
        ops.reorder_quantize(x, *layout[:6], "bf16", 0)
    with pytest.raises(ValueError, match="rotated must be a multiple of 32 from 0 to 64, got 96"):
        ops.reorder_quantize(x, *layout[:6], "fp8", 96)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.rms_norm_reorder_quantize(x, meta(32, dtype=torch.bfloat16), 1e-6, *layout)
    with pytest.raises(TypeError, match="up must have gate's dtype"):
        ops.silu_mul_reorder_quantize(x, x.float(), *layout)

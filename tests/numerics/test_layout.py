"""From splits to shapes and back."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.products import packed_rows, quantized_rows
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from micromix_compile.numerics import layout, packing
from micromix_compile.numerics.formats import FP6_FORMATS

splits = st.tuples(*[st.integers(0, 9).map(lambda blocks: 32 * blocks)] * 3)


def meta(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.empty(shape, device="meta")


@given(splits, st.integers(0, 40))
def test_shapes_hold_the_split_that_they_were_made_from(split: layout.Split, rows: int) -> None:
    x = [meta(shape) for shape in layout.activation_shapes(rows, split)]
    w = [meta(shape) for shape in layout.packed_shapes(rows, split)]
    assert layout.split_of_activation(*x[:3]) == layout.split_of_weight(*w[:3]) == split
    for scale in (x[3], w[3]):
        assert [part.shape[1] for part in layout.split_scale(scale, split)] == list(layout.block_counts(split))
    assert len(layout.block_formats(split, "e3m2")) == sum(layout.block_counts(split)) == sum(split) // 32


@pytest.mark.parametrize("fp6", FP6_FORMATS)
@pytest.mark.parametrize("split", [(96, 64, 32), (0, 32, 0), (0, 0, 0)])
def test_shapes_and_bytes_are_those_of_what_is_quantized_and_packed(split: layout.Split, fp6: str) -> None:
    x, w = quantized_rows(5, split, fp6), packed_rows(7, split, fp6)
    assert tuple(part.shape for part in x) == layout.activation_shapes(5, split)
    assert tuple(part.shape for part in w) == layout.packed_shapes(7, split)
    assert sum(part.numel() for part in w) == 7 * layout.row_bytes(split, fp6)
    assert layout.block_formats(split, fp6) == ["e2m1"] * (split[0] // 32) + [fp6] * (split[1] // 32) + ["e4m3"] * (
        split[2] // 32
    )


def test_rows_may_be_symbolic_and_stay_free() -> None:
    environment, plain = ShapeEnv(), torch.empty(7, 64)
    with FakeTensorMode(shape_env=environment) as mode:
        any_rows = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC, DimDynamic.STATIC])
        x = mode.from_tensor(plain, symbolic_context=any_rows)
        parts = [x.new_empty(shape) for shape in layout.activation_shapes(x.shape[0], (32, 0, 32))]
        assert layout.split_of_activation(*parts[:3]) == (32, 0, 32)
    assert not isinstance(parts[0].shape[0], int)
    assert not environment.guards


def test_weights_that_are_split_otherwise_are_refused() -> None:
    assert layout.weights_are_fp4((64, 0, 32), (96, 0, 0))
    assert not layout.weights_are_fp4((64, 0, 32), (64, 0, 32))
    assert not layout.weights_are_fp4((0, 0, 96), (32, 32, 32))
    assert layout.activations_are_wide((0, 0, 96), (32, 32, 32))
    assert not layout.activations_are_wide((0, 0, 96), (0, 0, 96))
    assert not layout.activations_are_wide((0, 0, 96), (96, 0, 0))  # all weights are MXFP4
    message = r"split like the activations, \(64, 0, 32\), or all MXFP4, or meet MXFP8 alone, got \(32, 32, 32\)"
    for check in (layout.weights_are_fp4, layout.activations_are_wide):
        with pytest.raises(ValueError, match=message):
            check((64, 0, 32), (32, 32, 32))


def test_swizzled_scales_keep_their_segments_apart() -> None:
    scale = torch.arange(4, dtype=torch.uint8).expand(128, 4)
    tiles = packing.swizzle_scale(scale, (32, 64, 32))
    assert tiles.shape == (1, 3, 512)
    assert tiles[0, :, :4].tolist() == [[0, 0, 0, 0], [1, 2, 0, 0], [3, 0, 0, 0]]


def test_a_product_goes_through_the_segments_of_weights_where_activations_have_one() -> None:
    mixed, wide, fp4 = (64, 0, 32), (0, 0, 96), (96, 0, 0)
    assert layout.product_split(wide, mixed) == mixed
    for x, w in ((mixed, mixed), (mixed, fp4), (wide, fp4), (wide, wide), (fp4, fp4)):
        assert layout.product_split(x, w) == x

"""Orders that ranks cut: what a rank takes is its share of the whole, and the shares make up the whole."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import fp6_formats, permutations, splits
from torch import Tensor

from micromix_compile.numerics import packing, reference, rotation
from micromix_compile.numerics.layout import PackedWeight, Split
from micromix_compile.numerics.shards import Cut, check_cut, check_ranks, joined_order, total

FP32_UNIT = 2.0**-24


class Case(NamedTuple):
    """An order that is cut into shards, how many ranks share them, and a linear with its input."""

    perm: Tensor
    shards: tuple[Split, ...]
    ranks: int
    rotated: int
    fp6: str
    x: Tensor
    weight: Tensor

    def packed(self, *, w_fp4: bool) -> PackedWeight:
        """The weight, packed whole."""
        split = total(self.shards)
        w_split = (sum(split), 0, 0) if w_fp4 else split
        ordered = rotation.rotate_weight(self.weight[:, self.perm.long()], self.rotated)
        q4, q6, q8, scale = reference.reorder_quantize(ordered, torch.arange(sum(split)), w_split, fp6=self.fp6)
        return PackedWeight(q4, packing.pack_fp6(q6, self.fp6), q8, scale)

    def cuts(self, *, w_fp4: bool = False) -> list[Cut]:
        return [Cut(self.shards, rank, self.ranks, w_fp4=w_fp4) for rank in range(self.ranks)]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    ranks, each = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    width = 32 * draw(st.integers(1, 3))
    shards = tuple(draw(splits(width)) for _ in range(ranks * each))
    orders = [draw(permutations(width)) for _ in shards]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    channels = width * len(shards)
    scale = torch.exp2(torch.randint(-6, 7, (channels,), generator=generator))
    return Case(
        perm=joined_order(orders, shards).int(),
        shards=shards,
        ranks=ranks,
        rotated=32 * draw(st.integers(0, channels // 32)),
        fp6=draw(fp6_formats),
        x=torch.randn(3, channels, generator=generator) * scale,
        weight=torch.randn(5, channels, generator=generator),
    )


@given(case=cases(), w_fp4=st.booleans(), activations=st.sampled_from(("same", "mxfp6")))
def test_partial_products_of_the_ranks_sum_to_the_whole(case: Case, w_fp4: bool, activations: str) -> None:
    """Every element of either side is one of the whole's, so that only the order of the sums differs.

    Each float32 sum of at most K + R terms errs by n u / (1 - n u) of |X| |W|^T (Higham, section 3.1).
    """
    whole = case.packed(w_fp4=w_fp4)
    layout = {"fp6": case.fp6, "activations": activations}
    one = reference.reorder_quantize(case.x, case.perm, total(case.shards), rotated=case.rotated, **layout)
    weights, x_values, products, places = [], [], [], []
    width = case.x.shape[1] // case.ranks
    for rank, cut in enumerate(case.cuts(w_fp4=w_fp4)):
        own = case.x[:, rank * width : (rank + 1) * width]
        rotated = cut.rotated(case.rotated)
        part = reference.reorder_quantize(own, cut.order(case.perm), cut.split, rotated=rotated, **layout)
        weights.append(cut.weight(whole))
        x_values.append(reference.dequantize_activation(*part))
        products.append(reference.mixed_mx_mm(part, *weights[-1], None, fp6=case.fp6, out_dtype=torch.float32))
        places += [case.perm.tolist().index(channel + rank * width) for channel in cut.order(case.perm).tolist()]
    w_values = [reference.dequantize_weight(*weight, case.fp6) for weight in weights]
    x_whole, w_whole = reference.dequantize_activation(*one), reference.dequantize_weight(*whole, case.fp6)
    assert torch.equal(torch.cat(x_values, 1), x_whole[:, places])
    assert torch.equal(torch.cat(w_values, 1), w_whole[:, places])
    got = reference.mixed_mx_mm(one, *whole, None, fp6=case.fp6, out_dtype=torch.float32)
    additions = 2 * (case.perm.numel() + case.ranks) * FP32_UNIT
    bound = additions / (1 - additions) * (x_whole.double().abs() @ w_whole.double().abs().T)
    assert bool(((torch.stack(products).sum(0).double() - got.double()).abs() <= bound).all())


@given(case=cases())
def test_each_rank_orders_its_own_channels(case: Case) -> None:
    width = case.perm.numel() // case.ranks
    for cut in case.cuts():
        assert cut.order(case.perm).sort().values.tolist() == list(range(width))
        assert sum(cut.split) == width
    assert [sum(counts) for counts in zip(*(cut.split for cut in case.cuts()), strict=True)] == list(total(case.shards))


@pytest.mark.parametrize(("channels", "shards"), list(itertools.product((32, 64, 96, 576), (1, 2, 3, 4, 8))))
def test_channels_are_cut_into_whole_blocks_or_refused_with_both_numbers(channels: int, shards: int) -> None:
    if channels % (32 * shards) == 0:
        check_cut(channels, shards, "down")
        return
    with pytest.raises(ValueError, match=f"^down has {channels} input channels, which shards={shards} do not cut"):
        check_cut(channels, shards, "down")


@pytest.mark.parametrize(("shards", "ranks"), list(itertools.product((1, 2, 4, 6), (1, 2, 3, 4))))
def test_ranks_that_do_not_divide_the_shards_are_refused_with_both_numbers(shards: int, ranks: int) -> None:
    if shards % ranks == 0:
        check_ranks(shards, ranks, "down")
        return
    with pytest.raises(ValueError, match=f"^down is ordered for shards={shards}, which {ranks} ranks do not divide"):
        check_ranks(shards, ranks, "down")

"""What weights become is kept as long as they live and do not change."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING
from weakref import ref

import pytest
import torch
from torch import Tensor

from micromix_compile.numerics import packing, reference
from micromix_compile.numerics.formats import ELEM_FORMATS
from micromix_compile.ops import prepared

if TYPE_CHECKING:
    from collections.abc import Callable

Split = tuple[int, int, int]

E4M3 = ELEM_FORMATS["e4m3"]


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

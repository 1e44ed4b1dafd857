"""Keys and values to write to a cache of bytes, as hypothesis draws them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile.numerics.kv_cache import CACHE_FORMATS, block_of
from support.strategies import blocks, float_dtypes, matrices, scale_roundings


@dataclass(frozen=True)
class KvCase:
    """Keys and values (B, H, T, D), of a D each, where they go in a cache of `length` tokens, and its blocks."""

    states: tuple[Tensor, Tensor]
    position: Tensor
    length: int
    block_sizes: tuple[int, int]
    rounding: str

    def cache(self, device: str = "cpu") -> list[Tensor]:
        """One that holds other things: codes and scales of keys, then of values."""
        parts = []
        for x, block_size in zip(self.states, self.block_sizes, strict=True):
            for fill, last in ((3, x.shape[3]), (5, x.shape[3] // block_size)):
                parts.append(torch.full((*x.shape[:2], self.length, last), fill, dtype=torch.uint8, device=device))
        return parts


@st.composite
def states(draw: st.DrawFn, front: tuple[int, int, int], head_dim: int, dtype: torch.dtype, *, turned: bool) -> Tensor:
    """(B, H, T, D); turned: as models have them, with tokens before heads in memory."""
    batch, heads, tokens = front
    rows = st.just(batch * heads * tokens)
    x = draw(matrices(blocks, rows=rows, channels=st.just(head_dim))).to(dtype)
    return x.view(batch, tokens, heads, head_dim).transpose(1, 2) if turned else x.view(*front, head_dim)


@st.composite
def kv_cases(draw: st.DrawFn) -> KvCase:
    """Every format, dtype and rounding, heads that are no power of two, positions in any order and of either dtype."""
    cache_format, dtype = draw(st.sampled_from(CACHE_FORMATS)), draw(float_dtypes)
    front = (draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3)))
    sizes = st.sampled_from((32, 64, 96) if cache_format == "mxfp8" else (16, 48, 64, 80))
    dims = (draw(sizes), draw(sizes))
    length = front[2] + draw(st.integers(0, 3))
    order = draw(st.permutations(range(length)))
    key, value = (draw(states(front, dim, dtype, turned=draw(st.booleans()))) for dim in dims)
    return KvCase(
        states=(key, value),
        position=torch.tensor(order[: front[2]], dtype=draw(st.sampled_from((torch.int32, torch.int64)))),
        length=length,
        block_sizes=(block_of(cache_format, dims[0]), block_of(cache_format, dims[1])),
        rounding=str(draw(scale_roundings)),
    )

"""Hypothesis strategies for MX data: every test that draws tensors, permutations or splits draws them from here.

Bulk data is drawn as bytes, one draw a block: a hundred times faster than an element at a time, and it still shrinks
towards zeros. Blocks are float32 numpy arrays of 32; matrices are float32 tensors.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from micromix_compile.numerics.checks import FLOAT_DTYPES, INDEX_DTYPES
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS, FP6_FORMATS, ScaleRounding
from micromix_compile.numerics.layout import ACTIVATIONS

Block = np.ndarray[tuple[int], np.dtype[np.float32]]

elem_formats = st.sampled_from(tuple(ELEM_FORMATS))
fp6_formats = st.sampled_from(FP6_FORMATS)
scale_roundings = st.sampled_from(tuple(ScaleRounding))
float_dtypes = st.sampled_from(FLOAT_DTYPES)
index_dtypes = st.sampled_from(INDEX_DTYPES)
activation_formats = st.sampled_from(ACTIVATIONS)

NAN_AND_INF_BITS = (0x7FC00000, 0xFFC00000, 0x7F800001, 0xFFFFFFFF, 0x7F800000, 0xFF800000)
"""float32 NaNs (quiet, signalling, both signs) and both infinities."""


def _boundaries() -> Block:
    """Values where formats, float32 or the scale change behaviour, with their float32 neighbours, in both signs."""
    inner = [0.0, 2.0**-149, 2.0**-126, 2.0**-127, 1.0, 2.0**127, float(np.finfo(np.float32).max)]
    for fmt in ELEM_FORMATS.values():
        smallest = 2.0 ** (fmt.min_exponent - fmt.mantissa_bits)
        inner += [smallest, smallest / 2, 2.0**fmt.min_exponent, 2.0**fmt.emax, 2.0 ** (fmt.emax + 1), fmt.max_value]
    middle = np.array(inner, dtype=np.float32)
    bits = middle.view(np.int32)[:, None] + np.array([-1, 0, 1], dtype=np.int32)
    values = bits[(bits >= 0) & (bits < 0x7F800000)].view(np.float32)
    return np.concatenate((values, -values))


BOUNDARIES = _boundaries()


def _bytes(count: int, dtype: type[np.generic]) -> st.SearchStrategy[np.ndarray]:
    size = count * np.dtype(dtype).itemsize
    return st.binary(min_size=size, max_size=size).map(lambda data: np.frombuffer(data, dtype=dtype))


@st.composite
def lattice_blocks(draw: st.DrawFn, min_exponent: int = -149, max_exponent: int = 120) -> Block:
    """Small integers times a power of two, some moved by one float32 ulp: rounding ties and what lies beside them."""
    counts = draw(_bytes(BLOCK_SIZE, np.int8)) >> draw(st.integers(0, 7))
    values = np.ldexp(counts.astype(np.float32), draw(st.integers(min_exponent, max_exponent)))
    ulps = draw(_bytes(BLOCK_SIZE, np.uint8)) % 3 - np.int8(1)
    moved = (values.view(np.int32) + ulps.astype(np.int32)).view(np.float32)
    return np.where(values == 0, values, moved)


@st.composite
def bell_blocks(draw: st.DrawFn) -> Block:
    """Full mantissas with exponents in a window of 16, as weights and activations have."""
    bits = draw(_bytes(BLOCK_SIZE, np.uint32))
    exponent = np.maximum(draw(st.integers(0, 254)) - (bits >> 23 & 15).astype(np.int32), 0)
    return (bits & np.uint32(0x807FFFFF) | exponent.astype(np.uint32) << 23).view(np.float32)


def _finite(bits: np.ndarray) -> Block:
    is_special = bits & np.uint32(0x7F800000) == 0x7F800000
    return np.where(is_special, bits & np.uint32(0xBFFFFFFF), bits).view(np.float32)


wide_blocks = _bytes(BLOCK_SIZE, np.uint32).map(_finite)
"""Any finite float32 anywhere: subnormals beside the largest."""

boundary_blocks = _bytes(BLOCK_SIZE, np.uint16).map(lambda index: BOUNDARIES[index % len(BOUNDARIES)])

zero_blocks = _bytes(BLOCK_SIZE, np.uint8).map(lambda b: np.where(b & 1, np.float32(-0.0), np.float32(0.0)))

finite_blocks = st.one_of(lattice_blocks(), bell_blocks(), boundary_blocks, wide_blocks, zero_blocks)


@st.composite
def poisoned_blocks(draw: st.DrawFn) -> Block:
    """A block with one to three NaNs or infinities."""
    block = draw(finite_blocks).copy()
    for position in draw(st.lists(st.integers(0, BLOCK_SIZE - 1), min_size=1, max_size=3)):
        block.view(np.uint32)[position] = draw(st.sampled_from(NAN_AND_INF_BITS))
    return block


blocks = st.one_of(finite_blocks, finite_blocks, poisoned_blocks())

moderate_blocks = lattice_blocks(min_exponent=-20, max_exponent=10)
"""Blocks whose products and sums stay far from float32's range ends."""


@st.composite
def matrices(
    draw: st.DrawFn,
    of: st.SearchStrategy[Block] = blocks,
    rows: st.SearchStrategy[int] = st.integers(0, 4),  # noqa: B008 - strategies are immutable
    channels: st.SearchStrategy[int] = st.integers(0, 4).map(lambda n: n * BLOCK_SIZE),  # noqa: B008
) -> Tensor:
    """A float32 (M, C) matrix made of `of`; by default 0 to 4 rows and blocks. C need not be a multiple of 32."""
    m, c = draw(rows), draw(channels)
    per_row = -(-c // BLOCK_SIZE)
    drawn = [draw(of) for _ in range(m * per_row)]
    values = np.array(drawn, dtype=np.float32).reshape(m, per_row * BLOCK_SIZE)
    return torch.from_numpy(values)[:, :c].contiguous()


@st.composite
def permutations(draw: st.DrawFn, channels: int) -> Tensor:
    """int32 (K,): the channels in any order, with as many -1 among them as fill K up to a multiple of 32."""
    length = -(-channels // BLOCK_SIZE) * BLOCK_SIZE
    entries = np.full(length, -1, dtype=np.int32)
    entries[:channels] = np.arange(channels)
    order = np.argsort(draw(_bytes(length, np.uint16)), kind="stable")
    return torch.from_numpy(entries[order])


@st.composite
def splits(draw: st.DrawFn, channels: int) -> tuple[int, int, int]:
    """(k4, k6, k8): multiples of 32 that sum to `channels`, any of them possibly 0."""
    count = channels // BLOCK_SIZE
    none_empty = count >= 3 and draw(st.booleans())  # rare by chance alone
    low = draw(st.integers(1, count - 2) if none_empty else st.integers(0, count))
    high = draw(st.integers(low + 1, count - 1) if none_empty else st.integers(low, count))
    return low * BLOCK_SIZE, (high - low) * BLOCK_SIZE, channels - high * BLOCK_SIZE


class ReorderCase(NamedTuple):
    """The arguments of `reorder_quantize`. x: (M, C) float32; C is not always a multiple of 32."""

    x: Tensor
    channel_perm: Tensor
    split: tuple[int, int, int]
    fp6: str
    scale_rounding: ScaleRounding


@st.composite
def reorder_cases(draw: st.DrawFn, of: st.SearchStrategy[Block] = blocks, max_rows: int = 4) -> ReorderCase:
    """A matrix, an order of its channels padded to a multiple of 32, and a split with possibly empty parts."""
    widths = st.integers(1, 2 * BLOCK_SIZE) | st.integers(2 * BLOCK_SIZE + 1, 5 * BLOCK_SIZE)
    x = draw(matrices(of, rows=st.integers(0, max_rows), channels=widths))
    channel_perm = draw(permutations(x.shape[1]))
    split = draw(splits(channel_perm.shape[0]))
    return ReorderCase(x, channel_perm, split, draw(fp6_formats), draw(scale_roundings))


class MatmulCase(NamedTuple):
    """Unquantized operands of a mixed product. x: (M, K), weight: (N, K), bias: (N,) or None, all float32."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    split: tuple[int, int, int]
    fp6: str


@st.composite
def matmul_cases(draw: st.DrawFn) -> MatmulCase:
    """Operands of moderate size, M = 0, N = 0 and empty segments included."""
    channels = draw(st.integers(1, 4)) * BLOCK_SIZE
    x = draw(matrices(moderate_blocks, channels=st.just(channels)))
    weight = draw(matrices(moderate_blocks, channels=st.just(channels)))
    elements = st.floats(-100.0, 100.0, width=32)
    row = st.lists(elements, min_size=weight.shape[0], max_size=weight.shape[0])
    bias = draw(st.none() | row.map(lambda values: torch.tensor(values, dtype=torch.float32)))
    return MatmulCase(x, weight, bias, draw(splits(channels)), draw(fp6_formats))


class Routing(NamedTuple):
    """Which row of an activation each output row reads, and where each expert's output rows end: int32 both."""

    rows: Tensor
    offs: Tensor


@st.composite
def routings(draw: st.DrawFn, tokens: int, experts: int) -> Routing:
    """Any: experts without rows, all rows to one, tokens that go to several or to none, rows behind the last expert."""
    counts = draw(st.lists(st.integers(0, 5), min_size=experts, max_size=experts))
    behind = draw(st.integers(0, 2))
    rows = draw(st.lists(st.integers(0, tokens - 1), min_size=sum(counts) + behind, max_size=sum(counts) + behind))
    offs = torch.tensor(counts, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return Routing(torch.tensor(rows, dtype=torch.int32), offs)


def hostile_rows(rows: int, channels: int, dtype: torch.dtype, seed: int, center: int) -> Tensor:
    """(rows, channels) of magnitudes around 2**center, with zeros, ties, subnormals, NaN and infinities among them."""
    generator = torch.Generator().manual_seed(seed)

    def chance(probability: float) -> Tensor:
        return torch.rand(rows, channels, generator=generator) < probability

    exponent = center + torch.randint(-9, 4, (rows, channels), generator=generator)
    mantissa = 1 + torch.randint(0, 64, (rows, channels), generator=generator) / 64  # often exactly between two codes
    x = torch.where(chance(0.5), mantissa, -1 - torch.rand(rows, channels, generator=generator))
    x = torch.ldexp(x, exponent).to(dtype)
    x[chance(0.05)] = 0.0
    x[chance(0.05)] = -0.0
    x[chance(0.02)] = torch.finfo(dtype).smallest_normal / 4
    for special in (torch.finfo(dtype).max, torch.nan, torch.inf, -torch.inf):
        x[chance(0.002)] = special
    return x

"""What the persistent kernel's loaders copy and its consumers then read: the kernel's own functions, in Python.

Shared memory is a tensor here and its layout nobody's business. Descriptors are those that a launch encodes.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from support.folded import random_weight
from torch import Tensor

from micromix_compile.numerics.layout import block_counts
from micromix_compile.targets import gluon
from micromix_compile.targets.gluon_tiles import GluonKernel, gluon_sm_90
from micromix_compile.targets.groups import MAX_GROUP
from micromix_compile.templates.gluon import load, unpack

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from micromix_compile.targets.gluon_kernels import Box
    from micromix_compile.targets.kernels import FoldedWeight

Split = tuple[int, int, int]

TILES = [tile for tile in gluon_sm_90(132).tiles if tile.BLOCK_M == 128 or tile.BLOCK_N == 128]


class Descriptor(NamedTuple):
    """A matrix of int32 and what is copied of it at a time."""

    matrix: Tensor
    box: Box
    layout: None = None


class Memory(NamedTuple):
    """Of a stage: words that nobody wrote are -1."""

    words: Tensor

    def index(self, i: int) -> Memory:
        return Memory(self.words[i])

    def slice(self, start: int, length: int, dim: int = 0) -> Memory:
        return Memory(self.words.narrow(dim, start, length))

    def load(self, layout: Any) -> Tensor:
        return self.words.clone()

    def _reinterpret(self, dtype: Any, shape: Sequence[int], layout: Any) -> Memory:
        assert self.words.is_contiguous()
        return Memory(self.words.view(-1)[: torch.Size(shape).numel()].view(list(shape)))


class Landed:
    """A barrier: bytes that are expected, bytes that came."""

    def __init__(self) -> None:
        self.expected = self.came = 0


def copy(descriptor: Descriptor, where: list[int], landed: Landed, memory: Memory) -> None:
    """As TMA does: what lies outside reads as zeros."""
    (matrix, box, _), (row, column) = descriptor, where
    assert memory.words.shape == (box.rows, box.columns)
    assert min(where) >= 0
    inside = matrix[row : row + box.rows, column : column + box.columns]
    memory.words.zero_()
    memory.words[: inside.shape[0], : inside.shape[1]] = inside
    landed.came += 4 * memory.words.numel()


def expect(landed: Landed, count: int) -> None:
    landed.expected += count


GL = SimpleNamespace(
    where=lambda condition, a, b: a if condition else b, static_range=range, int32=None,
    permute=lambda values, order: values.permute(order), reshape=lambda values, shape: values.reshape(shape),
    convert_layout=lambda values, layout, assert_trivial: values,
)  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def in_python() -> Iterator[None]:
    """The functions call each other, and what stands for Gluon."""
    stands = {
        "gl": GL,
        "tma": SimpleNamespace(async_copy_global_to_shared=copy),
        "mbarrier": SimpleNamespace(expect=expect),
    }
    stands |= {name: getattr(load, name).fn for name in ("_load_fp6", "_load_factors", "_load_slot")}
    patch = pytest.MonkeyPatch()
    for module in (load, unpack):
        for name, value in stands.items():
            if hasattr(module, name) and not (module is unpack and name == "mbarrier"):
                patch.setattr(module, name, value)
    patch.setattr(gluon, "_encode", encode)
    yield
    patch.undo()


def encode(tensor: Tensor, shape: tuple[int, int], box: Box) -> Descriptor:
    words = tensor.view(-1).view(torch.int32)
    return Descriptor(words[: shape[0] * shape[1]].view(shape), box)


def words_of(part: Tensor) -> Tensor:
    return part.view(torch.int32) if part.numel() else part.int()


def constants(kernel: GluonKernel) -> SimpleNamespace:
    return SimpleNamespace(BLOCK_N=kernel.tile.BLOCK_N, ALIGN_N=kernel.ALIGN_N, ODD_FP6=kernel.ODD_FP6)


def check_slots(kernel: GluonKernel, weight: FoldedWeight, n: int) -> None:
    """All slots of the weights from n on: each word where its row's consumer reads it, each factor too."""
    columns, blocks = weight.row_scale.shape[0], block_counts(weight.split)
    values: dict[str, Any] = gluon._values_of(kernel, [weight] * kernel.GROUPS)
    descs = tuple(values[f"{name}_0"] for name in ("w4", "w6", "w8", "w_factor"))
    slots = tuple(-(-count // per) for count, per in zip(blocks, (8, 4, 4), strict=True))
    sizes, of_plane, factors = (0, 0, 0, 0, 0, *slots, *blocks[:2]), words_of(weight.w6), weight.factor
    c, seen = constants(kernel), min(kernel.tile.BLOCK_N, columns - n)
    for slot in range(sum(slots)):
        packed, lines = (torch.full((rows, 32), -1, dtype=torch.int32) for rows in (c.BLOCK_N, c.BLOCK_N // 16))
        landed, lines = Landed(), lines.view(2, c.BLOCK_N)
        load._load_slot(descs, n, columns, slot, sizes, Memory(packed), Memory(lines), landed, c)
        assert landed.came == landed.expected
        behind = slot - slots[0]
        word = 2 * slot if behind < 0 else -(-blocks[0] // 4) + behind
        got = lines[:, :seen].view(torch.uint8).view(2, seen, 4)
        count = min(2 if behind < 0 else 1, len(factors) - word)
        assert torch.equal(got[:count], factors[word : word + count, n : n + seen])
        if 0 <= behind < slots[1]:
            words = min(8, 2 * blocks[1] - 8 * behind)
            for plane in range(3):
                consumers = [unpack._plane_of.fn(Memory(packed), plane, c, me) for me in range(c.BLOCK_N // 64)]
                read = torch.cat(consumers)[:seen, :words]
                assert torch.equal(read, of_plane[plane, n : n + seen, 8 * behind : 8 * behind + words])
            assert bool((factors[word, :, words // 2 :] == 0).all()), "what lies behind the row's end counts nothing"
        else:
            source = words_of(weight.w4 if behind < 0 else weight.w8)
            first = 32 * (slot if behind < 0 else behind - slots[1])
            want = torch.nn.functional.pad(source[n : n + seen, first : first + 32], (0, 32))[:, :32]
            assert torch.equal(packed[:seen], want)


@given(
    st.integers(1, 150), st.tuples(st.integers(0, 17), st.integers(0, 11), st.integers(0, 9)).filter(any),
    st.sampled_from(TILES), st.integers(1, MAX_GROUP),
)  # fmt: skip
@example(130, (9, 5, 3), TILES[0], 1)
@example(146, (8, 7, 1), TILES[1], 1)
@example(77, (5, 2, 3), TILES[0], 2)
@example(149, (0, 4, 0), TILES[1], 1)
def test_every_word_lands_where_its_consumer_reads_it(
    columns: int, blocks: tuple[int, int, int], tile: Any, groups: int
) -> None:
    if blocks[1] % 2:
        columns += columns % 2
    split = tuple(32 * count for count in blocks)
    weight = random_weight(columns, split, "e2m3")  # type: ignore[arg-type]
    kernel = GluonKernel.of(tile, [weight] * groups, "e2m3")
    for n in range(0, columns, tile.BLOCK_N):
        check_slots(kernel, weight, n)

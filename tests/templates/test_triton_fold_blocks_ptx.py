"""The inline PTX of rows that go by blocks, run instruction by instruction: it says what the branch beside it says."""

from __future__ import annotations

import operator
import re
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.strategies import finite_blocks

from micromix_compile.numerics import reference, rotation
from micromix_compile.numerics.formats import BLOCK_SIZE, ELEM_FORMATS
from micromix_compile.templates.triton import fold_blocks

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

FLOATS: dict[str, Callable[..., float]] = {
    "mul.rn.f32": operator.mul,
    "add.rn.f32": operator.add,
    "sub.rn.f32": operator.sub,
    "neg.f32": operator.neg,
    "mov.f32": lambda a: a,
    "fma.rn.f32": lambda a, b, c: a * b + c,
}
"""In float64, then rounded: exact before it for all but sums of numbers far apart, of which the larger has few bits."""


def float_of(word: int) -> float:
    return float(np.uint32(word).view(np.float32))


def word_of(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def e4m3(value: float) -> int:
    """The byte of a float32 rounded to E4M3, to nearest even, saturating."""
    return int(reference.encode(torch.tensor([value], dtype=torch.float32), ELEM_FORMATS["e4m3"]))


def run(ptx: str, inputs: list[int], outputs: int) -> list[int]:
    """The words that a piece of PTX whose branches lead ahead leaves in $0 and the following registers."""
    registers = {f"${outputs + i}": word for i, word in enumerate(inputs)}

    def value(name: str) -> int:
        if name.startswith("0f"):
            return int(name[2:], 16)
        return int(name, 0) if name[0].isdigit() else registers[name]

    waited_for = None
    with np.errstate(over="ignore", under="ignore"):
        for statement in re.split(r";|(?<=[A-Z]):", ptx.strip("{} ")):
            code = statement.split(maxsplit=1)
            if not code or code[0] == ".reg":
                continue
            if waited_for is not None:
                waited_for = None if code[0] == waited_for else waited_for
            elif code[0] == "@plain":
                waited_for = code[1].split()[1] if registers["plain"] else None
            elif len(code) == 2:
                step(registers, value, code[0], [part for part in re.split(r"[,\s{}]+", code[1]) if part])
    return [registers[f"${i}"] for i in range(outputs)]


def step(registers: dict[str, int], value: Callable[[str], int], name: str, names: list[str]) -> None:
    """One instruction. names: of the result, then of the operands."""
    result, operands = names[0], [value(operand) for operand in names[1:]]
    if name in FLOATS:
        registers[result] = word_of(FLOATS[name](*map(float_of, operands)))
    elif name == "shl.b32":
        registers[result] = operands[0] << operands[1] & 0xFFFFFFFF
    elif name == "and.b32":
        registers[result] = operands[0] & operands[1]
    elif name == "setp.eq.b32":
        registers[result] = int(operands[0] == operands[1])
    elif name == "cvt.rn.satfinite.e4m3x2.f32":
        registers[result] = e4m3(float_of(operands[0])) << 8 | e4m3(float_of(operands[1]))
    else:
        assert name == "mov.b32", name
        registers[result] = operands[0] if len(operands) == 1 else operands[0] | operands[1] << 16


def words(block: Tensor, exponent: int, ptx: str, *, is_rotated: bool, keep: int) -> list[int]:
    """What becomes of 32 bfloat16, times 2**exponent."""
    halves = block.view(torch.uint16).tolist()
    pairs = [low | high << 16 for low, high in zip(halves[::2], halves[1::2], strict=True)]
    return run(ptx, [*pairs, word_of(2.0**exponent), int(is_rotated), keep], 8)


@pytest.mark.parametrize("kernel", ["that rotates", "that does not"])
@given(finite_blocks, st.integers(-120, 126), st.booleans())
def test_a_block_is_rotated_scaled_and_rounded(kernel: str, block: np.ndarray, exponent: int, is_rotated: bool) -> None:
    x = torch.from_numpy(block.copy()).bfloat16()
    x = torch.where(x.isfinite() & (x.float().abs() * 2.0**exponent < 2.0**20), x, 0)  # as the scale of a row makes it
    source = fold_blocks._ROTATED_WORDS_PTX if kernel == "that rotates" else fold_blocks._WORDS_PTX
    got = words(x, exponent, source.value, is_rotated=is_rotated, keep=0xFFFFFFFF)
    rotated = BLOCK_SIZE if is_rotated and kernel == "that rotates" else 0
    want = reference.encode(rotation.rotate_activation(x.float()[None], rotated) * 2.0**exponent, ELEM_FORMATS["e4m3"])
    assert got == want.numpy().view(np.uint32)[0].tolist()


def test_pairs_are_added_from_those_16_apart_to_neighbours() -> None:
    """In the order of `rotation`: another would round otherwise now and then."""
    source = fold_blocks._ROTATED_WORDS_PTX.value
    assert re.findall(r"fma\.rn\.f32 g(\d+), f0, 0f3D000000, minus", source) == ["0", "16"]
    assert re.findall(r"add\.rn\.f32 \w0, \w0, \w(\d+);", source) == ["8", "4", "2", "1"]


def test_a_row_without_a_scale_is_zeros() -> None:
    x = torch.tensor([torch.nan, torch.inf, 1.0, -1.0] * 8).bfloat16()
    assert words(x[2:4].repeat(16), 0, fold_blocks._WORDS_PTX.value, is_rotated=False, keep=0) == [0] * 8

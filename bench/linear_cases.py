"""The linears that are measured, by models, and how their channels are split."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, NamedTuple

import torch
from linear_rows import Row

from micromix_compile.numerics.formats import BLOCK_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from gpu_timing import Times
    from torch import Tensor

    from micromix_compile.numerics.layout import Split

MODELS: dict[str, dict[str, tuple[tuple[int, ...], int]]] = {
    "llama-8b": {
        "qkv": ((4096, 1024, 1024), 4096),
        "o": ((4096,), 4096),
        "gate_up": ((14336, 14336), 4096),
        "down": ((4096,), 14336),
    },
    "qwen2.5-7b": {
        "qkv": ((3584, 512, 512), 3584),
        "o": ((3584,), 3584),
        "gate_up": ((18944, 18944), 3584),
        "down": ((3584,), 18944),
    },
    "qwen3-32b": {
        "qkv": ((8192, 1024, 1024), 5120),
        "o": ((5120,), 8192),
        "gate_up": ((25600, 25600), 5120),
        "down": ((5120,), 25600),
    },
    "llama-70b": {"down": ((8192,), 28672)},
}
"""(columns of each weight of the group, K) of a model's linears."""
SPLITS = ("75/20/5", "50/35/15")
"""Channels in MXFP4, MXFP6 and MXFP8, percent."""
FP6 = "e2m3"
CUDA = torch.device("cuda")
BF16, E4M3 = torch.bfloat16, torch.float8_e4m3fn


@dataclass(frozen=True, slots=True)
class Case:
    """A group of linears that read one activation."""

    name: str
    columns: tuple[int, ...]
    K: int

    @property
    def N(self) -> int:  # noqa: N802 - the field's name
        """All columns."""
        return sum(self.columns)

    def row(self, what: str, rows: int, times: Times, floor_bytes: int, split: str = "") -> Row:
        """A measurement with what follows from it."""
        flops = 2 * rows * self.N * self.K
        return Row(
            self.name, rows, self.N, self.K, split, what, times.us, times.p20, times.p80, floor_bytes,
            floor_bytes / times.us / 1e6, flops / times.us / 1e6,
        )  # fmt: skip


def split_of(channels: int, split: str) -> Split:
    """Whole blocks of K in each format, of MXFP6 an even number, as the budget has it. split: as in `SPLITS`."""
    _, share6, share8 = map(int, split.split("/"))
    k8 = round(channels * share8 / 100 / BLOCK_SIZE) * BLOCK_SIZE
    pairs = round(channels * share6 / 100 / BLOCK_SIZE / 2)
    k6 = min(pairs, (channels - k8) // BLOCK_SIZE // 2) * 2 * BLOCK_SIZE
    return channels - k6 - k8, k6, k8


def split_argument(text: str) -> str:
    """A split from the command line."""
    shares = text.split("/")
    if len(shares) != 3 or not all(share.isdecimal() for share in shares) or sum(map(int, shares)) != 100:
        raise argparse.ArgumentTypeError(f"three shares like 75/20/5 that add up to 100, got {text!r}")
    return text


class Contender(NamedTuple):
    """Another project's linear. bits: of a weight, without scales. make: from a weight (N, K) and a bias, in BF16."""

    bits: int
    make: Callable[[Tensor, Tensor], Callable[[Tensor], Tensor]]


class Mode(NamedTuple):
    """How activations are quantized: a row of `layout.ACTIVATIONS`, and whether MXFP4's blocks are rotated before."""

    activations: str = "same"
    rotates: bool = False

    def behind(self, text: str) -> str:
        """The text with what is unusual."""
        parts = (text, self.activations * (self.activations != "same"), "rotated" * self.rotates)
        return " ".join(part for part in parts if part)

    def rotated(self, split: Split) -> int:
        """Channels."""
        return split[0] if self.rotates else 0


def modes_of(activations: Sequence[str], *, rotates: bool) -> list[Mode]:
    """Each kind as it is, and rotated too if that is asked for."""
    return [Mode(*one) for one in product(activations, (False, True)[: 1 + rotates])]


def cases_of(models: Sequence[str]) -> list[Case]:
    """All linears of some models."""
    return [Case(f"{model} {name}", *shape) for model in models for name, shape in MODELS[model].items()]

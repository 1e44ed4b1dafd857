"""Layers of experts with one routing at a time: ours on sm_90, BF16 and FP8 with torch's grouped products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from fp8_linears import compiled_fp8_quantize, fp8_quantize
from gpu_timing import size
from linear_cases import BF16, CUDA, E4M3, FP6, split_of

from micromix_compile.lowering.torch_private.operators import GROUPED_MM, scaled_grouped_mm
from micromix_compile.numerics import folding, packing, reference
from micromix_compile.targets.expansion import ExpandedWeights, expand_weights
from micromix_compile.targets.grouped import TritonGrouped
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer: `experts` of which a token has `active`, gated; hidden channels in and out, `inner` between."""

    experts: int
    active: int
    hidden: int
    inner: int


SHAPES = {"qwen3-30b-a3b": Shape(128, 8, 2048, 768), "mixtral-8x7b": Shape(8, 2, 4096, 14336)}
SMALL = Shape(5, 2, 256, 96)


class Routing(NamedTuple):
    """rows: (R,) int32, the token of each row, sorted by expert. offs: (E,) int32. own: (R,) int32, 0, 1, and so on.

    place: (T, active) int64, where a token's rows are. weights: (T, active) bfloat16; row_weights: (R,), those of rows.
    """

    rows: Tensor
    offs: Tensor
    own: Tensor
    place: Tensor
    weights: Tensor
    row_weights: Tensor


def random_routing(shape: Shape, tokens: int) -> Routing:
    """Each token's experts are drawn alike."""
    chosen = torch.rand(tokens, shape.experts, device=CUDA).topk(shape.active).indices
    flat, order = chosen.flatten().sort(stable=True)
    ends = torch.bincount(flat, minlength=shape.experts).cumsum(0).int()
    weights = torch.rand(tokens, shape.active, device=CUDA).softmax(1).to(BF16)
    own = torch.arange(len(order), dtype=torch.int32, device=CUDA)
    place = order.argsort().view_as(chosen)
    return Routing((order // shape.active).int(), ends, own, place, weights, weights.flatten()[order])


def combine(down: Tensor, place: Tensor, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows."""
    return (down[place] * weights[:, :, None]).sum(1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """The activation of a gated expert."""
    gate, up = gate_up.chunk(2, 1)
    return torch.nn.functional.silu(gate) * up


compiled_combine: Callable[[Tensor, Tensor, Tensor], Tensor] = torch.compile(combine, dynamic=False)
compiled_silu_mul: Callable[[Tensor], Tensor] = torch.compile(silu_mul, dynamic=False)
compiled_silu_quantize: Callable[[Tensor], tuple[Tensor, Tensor]] = torch.compile(
    lambda gate_up: fp8_quantize(silu_mul(gate_up)), dynamic=False
)
compiled_gather: Callable[..., tuple[Tensor, Tensor]] = torch.compile(
    lambda q, scale, rows: (q.view(torch.uint8)[rows].view(E4M3), scale[rows, 0]), dynamic=False
)


class Layer(Protocol):
    """One way to compute a layer."""

    @property
    def bytes(self) -> int:
        """Of its weights."""

    def parts(self, x: Tensor, routing: Routing) -> dict[str, Callable[[], object]]:
        """Its steps one by one, each on what the one before it gave."""

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """(T, hidden) -> (T, hidden)."""


class Bf16Layer:
    """torch's grouped product in BF16. gate_up: (E, 2 inner, hidden). down: (E, hidden, inner)."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = gate_up, down

    @property
    def bytes(self) -> int:
        """See `Layer`."""
        return size(self.gate_up, self.down)

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Layer`."""
        inner = GROUPED_MM(x[routing.rows], self.gate_up.transpose(1, 2), routing.offs)
        down = GROUPED_MM(compiled_silu_mul(inner), self.down.transpose(1, 2), routing.offs)
        return compiled_combine(down, routing.place, routing.weights)

    def parts(self, x: Tensor, routing: Routing) -> dict[str, Callable[[], object]]:
        """See `Layer`."""
        rows = x[routing.rows]
        gate_up = GROUPED_MM(rows, self.gate_up.transpose(1, 2), routing.offs)
        inner = compiled_silu_mul(gate_up)
        return {
            "gate_up": lambda: GROUPED_MM(rows, self.gate_up.transpose(1, 2), routing.offs),
            "down": lambda: GROUPED_MM(inner, self.down.transpose(1, 2), routing.offs),
        }


class Fp8Layer:
    """torch's grouped product in E4M3 with a scale a row on both sides."""

    def __init__(self, gate_up: Tensor, down: Tensor) -> None:
        self.gate_up, self.down = (self._quantize(w) for w in (gate_up, down))

    @staticmethod
    def _quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
        """(E, N, K) and (E, N)."""
        each = [fp8_quantize(one) for one in weight]
        return torch.stack([q.view(torch.uint8) for q, _ in each]).view(E4M3), torch.stack([s[:, 0] for _, s in each])

    @property
    def bytes(self) -> int:
        """See `Layer`."""
        return size(*self.gate_up, *self.down)

    @staticmethod
    def _multiply(q: Tensor, scale: Tensor, weight: tuple[Tensor, Tensor], offs: Tensor) -> Tensor:
        return scaled_grouped_mm(
            q, weight[0].transpose(1, 2), scale, weight[1], offs=offs, out_dtype=BF16, use_fast_accum=True
        )

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Layer`."""
        q, scale = compiled_gather(*compiled_fp8_quantize(x), routing.rows)
        inner, inner_scale = compiled_silu_quantize(self._multiply(q, scale, self.gate_up, routing.offs))
        down = self._multiply(inner, inner_scale[:, 0], self.down, routing.offs)
        return compiled_combine(down, routing.place, routing.weights)

    def parts(self, x: Tensor, routing: Routing) -> dict[str, Callable[[], object]]:
        """See `Layer`."""
        q, scale = compiled_gather(*compiled_fp8_quantize(x), routing.rows)
        inner, inner_scale = compiled_silu_quantize(self._multiply(q, scale, self.gate_up, routing.offs))
        return {
            "gate_up": lambda: self._multiply(q, scale, self.gate_up, routing.offs),
            "down": lambda: self._multiply(inner, inner_scale[:, 0], self.down, routing.offs),
        }


def folded_experts(weight: Tensor, split: tuple[int, int, int]) -> FoldedWeight:
    """(E, N, K) quantized, packed, with factors and row scales."""
    each = []
    for one in weight:
        q = reference.reorder_quantize(one, torch.arange(one.shape[1], device=CUDA), split, fp6=FP6)
        packed = (q.q4, packing.pack_fp6(q.q6, FP6), q.q8)
        row_scale = folding.weight_row_scale(*packed, q.scale, FP6)
        each.append((*packed, folding.weight_factor(*packed, q.scale, row_scale), row_scale))
    w4, w6, w8, factor, row_scale = (torch.stack(part) for part in zip(*each, strict=True))
    return FoldedWeight(w4, w6, w8, factor, row_scale)


class OurLayer:
    """Experts packed in three formats, activations of E4M3 with a scale a row."""

    def __init__(self, gate_up: Tensor, down: Tensor, shares: str) -> None:
        target = target_of(CUDA)
        if not isinstance(target.folded, TritonFolded) or not isinstance(target.grouped, TritonGrouped):
            raise SystemExit("this benchmark needs a GPU of sm_90")
        self.quantizers, self.kernels = target.folded, target.grouped
        self.splits = split_of(gate_up.shape[2], shares), split_of(down.shape[2], shares)
        self.weights = folded_experts(gate_up, self.splits[0]), folded_experts(down, self.splits[1])
        self.perms = tuple(torch.arange(sum(split), device=CUDA).to(torch.int16) for split in self.splits)

    @property
    def bytes(self) -> int:
        """See `Layer`. Scales are there twice: as in a checkpoint, and as factors."""
        scales = sum(w.row_scale.numel() * (sum(w.split) // 32) for w in self.weights)
        return sum(size(*weight) for weight in self.weights) + scales

    def fold(self, producer: str, x: Tensor, other: Tensor | None, which: int) -> folding.FoldedActivation:
        """One of the two quantizers."""
        return self.quantizers.quantize(
            producer, x, other, 0.0, self.perms[which], self.splits[which], FP6, "rceil", w_fp4=False, activations="fp8"
        )

    def multiply(self, x: folding.FoldedActivation, rows: Tensor, offs: Tensor, which: int) -> Tensor:
        """One of the two products."""
        return self.kernels.multiply_folded(x.q, x.row_scale, rows, offs, self.weights[which], FP6, BF16)

    def multiply_expanded(self, x: folding.FoldedActivation, rows: Tensor, offs: Tensor, which: int) -> Tensor:
        """The same by way of all weights expanded in memory, and torch's grouped product in FP8: an experiment."""
        w = self.weights[which]
        expanded, scale = x.q.new_empty((*w.row_scale.shape, x.q.shape[1])), torch.empty_like(w.row_scale)
        for expert in range(len(offs)):
            one = FoldedWeight(*(part[expert] for part in w if part is not None))
            expand_weights([one], ExpandedWeights(expanded[expert], scale[expert], None), fp6=FP6)
        return scaled_grouped_mm(
            x.q[rows].view(E4M3), expanded.view(E4M3).transpose(1, 2), x.row_scale[rows], scale, offs=offs,
            out_dtype=BF16, use_fast_accum=True,
        )  # fmt: skip

    def __call__(self, x: Tensor, routing: Routing) -> Tensor:
        """See `Layer`."""
        gate, up = self.multiply(self.fold("none", x, None, 0), routing.rows, routing.offs, 0).chunk(2, 1)
        down = self.multiply(self.fold("silu_mul", gate, up, 1), routing.own, routing.offs, 1)
        return self.kernels.weighted_sum(down, routing.row_weights, routing.place, BF16)

    def parts(self, x: Tensor, routing: Routing) -> dict[str, Callable[[], object]]:
        """See `Layer`."""
        q = self.fold("none", x, None, 0)
        gate, up = self.multiply(q, routing.rows, routing.offs, 0).chunk(2, 1)
        inner = self.fold("silu_mul", gate, up, 1)
        down = self.multiply(inner, routing.own, routing.offs, 1)
        return {
            "quantize": lambda: self.fold("none", x, None, 0),
            "gate_up": lambda: self.multiply(q, routing.rows, routing.offs, 0),
            "silu, quantize": lambda: self.fold("silu_mul", gate, up, 1),
            "down": lambda: self.multiply(inner, routing.own, routing.offs, 1),
            "sum": lambda: self.kernels.weighted_sum(down, routing.row_weights, routing.place, BF16),
            "sum, Inductor's": lambda: compiled_combine(down, routing.place, routing.weights),
        }

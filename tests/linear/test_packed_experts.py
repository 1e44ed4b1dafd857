"""Packed experts by themselves: how tokens are sorted, gradients, what is no expert."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.grouped import packed_experts
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.experts import (
    INTERFACE,
    ExpertsWeight,
    MicroMixExperts,
    is_experts,
    sorted_by_expert,
    why_not_packed,
)
from micromix_compile.linear.gradient import grouped_product
from micromix_compile.numerics.grouped import expert_of
from micromix_compile.numerics.layout import RowLayout

SPLIT = (32, 0, 32)
CONFIG = MicroMixConfig(activations="fp8")


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=9))
def test_pairs_come_by_expert_then_by_token_and_those_of_no_expert_last(chosen: list[tuple[int, int]]) -> None:
    """There are four experts."""
    top_k_index = torch.tensor(chosen, dtype=torch.int64).reshape(-1, 2)
    order, rows, offs = sorted_by_expert(top_k_index, 4)
    pairs = sorted((expert, token, k) for token, both in enumerate(chosen) for k, expert in enumerate(both))
    assert [min(expert, 4) for expert, _, _ in pairs].count(4) == len(rows) - int(offs[-1])
    assert rows.tolist() == [token for _, token, _ in pairs]
    assert order.tolist() == [2 * token + k for _, token, k in pairs]
    assert offs.tolist() == [sum(expert <= e for expert, _, _ in pairs) for e in range(4)]
    assert rows.dtype == offs.dtype == torch.int32


def test_gradients_are_those_of_the_dequantized_weights() -> None:
    w, perm = packed_experts(3, 24, SPLIT, "e2m3"), torch.randperm(64).int()
    layout = RowLayout(*SPLIT, "e2m3", "rceil", "fp8", 32)
    rows = torch.tensor([0, 4, 4, 1, 2, 0], dtype=torch.int32)
    offs = torch.tensor([2, 2, 5], dtype=torch.int32)
    x = torch.randn(5, 64, requires_grad=True)
    bias = torch.randn(3, 24, requires_grad=True)
    slope = torch.randn(6, 24)
    out = grouped_product(x, rows, offs, bias, perm, w, layout)
    got = torch.autograd.grad(out, (x, bias), slope)
    parts = []
    for expert, run in ((0, slice(0, 2)), (2, slice(2, 5))):
        weight = ops.dequantize_weight(*expert_of(w, expert), perm, 64, "e2m3", 32, torch.float32)
        parts.append((x[rows[run].long()] @ weight.T + bias[expert]) * slope[run])
    want = torch.autograd.grad(torch.cat(parts).sum(), (x, bias))
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other)
    assert not out[5:].any()


class Experts(nn.Module):
    """Two experts of 64 channels, 96 inside, as transformers would have them."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        flags = {"has_gate": True, **dict.fromkeys(INTERFACE - {"has_gate"}, False), **changes}
        for name, value in flags.items():
            setattr(self, name, value)
        self.gate_up_proj = nn.Parameter(torch.randn(2, 192, 64))
        self.down_proj = nn.Parameter(torch.randn(2, 64, 96))
        self.config = SimpleNamespace()

    def _apply_gate(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return torch.tanh(gate) * up


WEIGHTS = {"gate_up_proj": ExpertsWeight(192, 64, SPLIT), "down_proj": ExpertsWeight(64, 96, (32, 32, 32))}


def test_what_goes_to_no_expert_is_zero_under_autocast_and_with_parameters_too() -> None:
    made = MicroMixExperts(Experts(), WEIGHTS, CONFIG)
    for name, weight in WEIGHTS.items():
        packed = packed_experts(2, weight.out_features, weight.split, "e2m3")
        made.load_packed(name, packed, torch.randperm(weight.in_features).int())
    x, index = torch.randn(3, 64), torch.tensor([[0, 1], [1, 2], [2, 2]])
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = made(x, index, torch.ones(3, 2))
    assert out.dtype == torch.float32
    assert out[0].any()
    assert out[1].any()
    assert not out[2].any()
    shown = repr(made)
    assert "2 x (192, mxfp4=32, mxfp6=0 (e2m3), mxfp8=32" in shown
    micromix.packed_as_parameters_(made)
    assert repr(made) == shown
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(made(x, index, torch.ones(3, 2)), out)
        assert made(x[:0], index[:0], torch.ones(0, 2)).shape == (0, 64)


def test_bytes_that_mean_something_else_are_not_loaded() -> None:
    def made(**options: Any) -> MicroMixExperts:
        config = MicroMixConfig(**{"activations": "same", **options})
        return MicroMixExperts(Experts(), WEIGHTS, config).to_empty(device="cpu")

    state = made().state_dict()
    with pytest.raises(RuntimeError, match=r"the packed weight down_proj is laid out as .*'fp6': 'e2m3'") as raised:
        made(fp6="e3m2").load_state_dict(state)
    assert "gate_up_proj" not in str(raised.value)  # which has no MXFP6
    same = made(activations="fp8")
    same.load_state_dict(state)
    assert torch.equal(same.down_proj_q6, state["down_proj_q6"])


def test_experts_without_a_gate_apply_their_activation_function_and_their_norm() -> None:
    """Against the sum over each token's experts, of what the operations give for it alone."""
    original = Experts(has_gate=False, has_post_expert_norm=True, has_bias=True)
    del original.gate_up_proj
    original.up_proj = nn.Parameter(torch.randn(2, 96, 64))
    original.up_proj_bias, original.down_proj_bias = nn.Parameter(torch.randn(2, 96)), nn.Parameter(torch.randn(2, 64))
    original.act_fn, original.post_expert_norm = nn.Tanh(), nn.LayerNorm(64)
    weights = {"up_proj": ExpertsWeight(96, 64, SPLIT), "down_proj": WEIGHTS["down_proj"]}
    made = MicroMixExperts(original, weights, CONFIG)
    for name, weight in weights.items():
        packed = packed_experts(2, weight.out_features, weight.split, "e2m3")
        made.load_packed(name, packed, torch.arange(weight.in_features).int())
    x, index, share = torch.randn(3, 64), torch.tensor([[0, 1], [1, 0], [1, 1]]), torch.rand(3, 2)
    with torch.no_grad():
        got, want = made(x, index, share), torch.zeros(3, 64)
        for token, expert, weight in zip([0, 0, 1, 1, 2, 2], index.flatten(), share.flatten(), strict=True):
            one = x[token : token + 1]
            for name in weights:
                layout, packed = made.layouts[name], expert_of(made.packed(name), int(expert))
                quantized = ops.reorder_quantize(one, torch.arange(one.shape[1]), *layout)
                bias = made.get_parameter(f"{name}_bias")[expert]
                one = ops.mixed_mx_mm(*quantized, *packed, bias, "e2m3", torch.float32)
                one = original.act_fn(one) if name == "up_proj" else original.post_expert_norm(one)
            want[token] += weight * one[0]
    torch.testing.assert_close(got, want)


def test_experts_are_known_by_their_attributes_and_refused_by_name() -> None:
    experts = Experts()
    assert is_experts(experts)
    assert why_not_packed(experts) is None
    assert not is_experts(nn.Linear(2, 2))
    assert not is_experts(None)
    assert why_not_packed(Experts(has_gate=False)) == "its weights are not the Parameters up_proj and down_proj"
    experts.forward = lambda x: x  # type: ignore[method-assign,assignment]
    assert why_not_packed(experts) == "its forward is overridden on the instance"
    with pytest.raises(
        ValueError, match=r"down_proj must be \(E, N, C\) with \(N, C\) = \(64, 64\), got \(2, 64, 96\)"
    ):
        MicroMixExperts(Experts(), {**WEIGHTS, "down_proj": ExpertsWeight(64, 64, SPLIT)}, CONFIG)

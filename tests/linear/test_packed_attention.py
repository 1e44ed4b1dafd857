"""Packed attention: that of torch.nn, with packed linears."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.attention import MicroMixAttention

NEAREST = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
HEADS, BATCH, TIME = 4, 2, 6
PADDING = torch.tensor([[False] * TIME, [False] * 4 + [True] * 2])
CAUSAL = torch.triu(torch.ones(TIME, TIME, dtype=torch.bool), 1)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "each head's weights": {"average_attn_weights": False},
    "no weights": {"need_weights": False},
    "padded": {"key_padding_mask": PADDING},
    "causal": {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False},
    "both masks": {"attn_mask": CAUSAL, "key_padding_mask": PADDING, "need_weights": False},
    "numbers": {"attn_mask": torch.linspace(-1, 1, TIME * TIME).view(TIME, TIME), "key_padding_mask": -9.0 * PADDING},
    "a mask a head": {"attn_mask": torch.linspace(-1, 1, BATCH * HEADS * TIME * TIME).view(-1, TIME, TIME)},
}


class Attending(nn.Module):
    """Attention of a sequence to itself, or to another."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(64, HEADS, **{"batch_first": True, **options})
        for parameter in self.attention.parameters():
            nn.init.normal_(parameter, std=0.2)

    def forward(self, x: Tensor, other: Tensor | None = None, **call: Any) -> tuple[Tensor, Tensor | None]:
        """(output, weights)."""
        other = x if other is None else other
        return self.attention(x, other, other, **call)


def packed(model: Attending, x: Tensor) -> Attending:
    """A copy, packed by what its attention to itself shows."""
    made = copy.deepcopy(model)
    micromix.quantize_(made, micromix.calibrate(model, [x], NEAREST, progress=False))
    return made


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask:UserWarning")  # torch's, of its own
def test_with_the_linears_that_torch_has_it_computes_what_torch_does(batch_first: bool) -> None:
    model = Attending(batch_first=batch_first).eval()
    x = torch.randn(BATCH, TIME, 64)
    x = x if batch_first else x.transpose(0, 1)
    made, own = packed(model, x).attention, model.attention
    assert isinstance(made, MicroMixAttention)
    with torch.no_grad():
        want = own(x, x, x)[0]
        assert 0 < (made(x, x, x)[0] - want).norm() < 0.1 * want.norm()
        made.in_proj = nn.Linear(64, 3 * 64)  # type: ignore[assignment]
        made.in_proj.weight, made.in_proj.bias, made.out_proj = own.in_proj_weight, own.in_proj_bias, own.out_proj  # type: ignore[assignment]
        for name, call in CALLS.items():
            for key in (x, x.flip(0 if batch_first else 1)):
                (out, weights), (want, wanted) = made(x, key, key, **call), own(x, key, key, **call)
                torch.testing.assert_close(out, want, msg=name)
                torch.testing.assert_close(weights, wanted, msg=name)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_sequence_without_a_batch_is_one() -> None:
    model, x = Attending().eval(), torch.randn(BATCH, TIME, 64)
    made = packed(model, x)
    with torch.no_grad():
        (out, weights), (want, wanted) = made(x[0]), made(x[:1])
        assert torch.equal(out, want[0])
        assert weights is not None
        assert wanted is not None
        assert torch.equal(weights, wanted[0])
        fast, _ = torch.compile(made, backend="micromix")(x)
        torch.testing.assert_close(fast, made(x)[0])
    assert made.state_dict().keys() >= {"attention.in_proj.weight", "attention.out_proj.weight"}
    with pytest.raises(ValueError, match="is_causal needs attn_mask, which it describes: got None"):
        made(x, is_causal=True)


def test_attention_that_is_the_whole_model_stays_and_is_named() -> None:
    model, x = nn.MultiheadAttention(64, HEADS, batch_first=True).eval(), torch.randn(BATCH, TIME, 64)
    recipe = micromix.calibrate(model, [{"query": x, "key": x, "value": x}], NEAREST, progress=False)
    micromix.quantize_(model, recipe)
    reason = "its attention is the model itself, which nothing can stand in for"
    assert model.micromix_refused == dict.fromkeys(("in_proj_weight", "out_proj"), reason)


class Special(nn.MultiheadAttention):
    """A class of a user's."""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"add_zero_attn": True}, "its attention has add_bias_kv or add_zero_attn"),
        ({"add_bias_kv": True}, "its attention has add_bias_kv or add_zero_attn"),
        ({"class": Special}, "it is of a Special, not of an nn.MultiheadAttention"),
        ({"skip": ("*out_proj",)}, "out_proj, the other weight of the same attention, stays as it is"),
        ({"save_pretrained": None}, "a checkpoint of transformers could not be loaded with it"),
    ],
)
def test_attention_that_is_not_torchs_own_stays_and_is_named(change: dict[str, Any], reason: str) -> None:
    options = {name: value for name, value in change.items() if name.startswith("add")}
    model, x = Attending(**options).eval(), torch.randn(BATCH, TIME, 64)
    model.attention.__class__ = change.get("class", nn.MultiheadAttention)
    if "save_pretrained" in change:
        model.save_pretrained = None  # type: ignore[assignment]
    config = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False, skip=change.get("skip", ()))
    recipe = micromix.calibrate(model, [x], config, progress=False)
    micromix.quantize_(model, recipe)
    assert type(model.attention) is not MicroMixAttention
    assert [why.startswith(reason) for why in model.micromix_refused.values()] == [True] * len(recipe.linears)

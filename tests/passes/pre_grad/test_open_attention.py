"""torch.nn's attention and Transformer: their fused operations hide no linear."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NEAREST = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
PADDING = torch.tensor([[False] * 6, [False] * 4 + [True] * 2])
CAUSAL = nn.Transformer.generate_square_subsequent_mask(6)


def make_encoder(*, batch_first: bool = True, **options: Any) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=batch_first, **options)
    nested = batch_first and not options
    encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=nested).eval()
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


def on_slow_path(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        return module(*args, **kwargs)
    finally:
        torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize(
    ("options", "call"),
    [
        ({}, {}),
        ({}, {"src_key_padding_mask": PADDING}),
        ({"norm_first": True, "activation": "gelu"}, {"mask": CAUSAL, "is_causal": True}),
        ({"batch_first": False}, {}),
    ],
    ids=["plain", "padded", "causal", "time first"],
)
def test_all_linears_of_an_encoder_are_calibrated_and_run_quantized(
    options: dict[str, Any], call: dict[str, Any]
) -> None:
    encoder = make_encoder(**options)
    x = torch.randn(2, 6, 64)
    x = x if options.get("batch_first", True) else x.transpose(0, 1)
    recipe = micromix.calibrate(encoder, [{"src": x, **call}], NEAREST)
    names = ("self_attn.in_proj_weight", "self_attn.out_proj", "linear1", "linear2")
    assert set(recipe.linears) == {f"layers.0.{name}" for name in names}
    assert not recipe.refused
    with torch.no_grad():
        plain = on_slow_path(encoder, x, **call)
        fast = torch.compile(encoder, backend="micromix", options={"recipe": recipe, "strict": True})(x, **call)
    kept = ~call["src_key_padding_mask"] if "src_key_padding_mask" in call else slice(None)
    distance = float((fast - plain)[kept].norm() / plain[kept].norm())
    assert 0.001 < distance < 0.15


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_self_attention_is_calibrated_and_runs_quantized(batch_first: bool, need_weights: bool) -> None:
    attention = nn.MultiheadAttention(64, 2, batch_first=batch_first).eval()
    nn.init.normal_(attention.out_proj.weight, std=0.2)

    class SelfAttention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = attention

        def forward(self, x: torch.Tensor) -> Any:
            return self.attention(x, x, x, need_weights=need_weights)

    model, x = SelfAttention().eval(), torch.randn(4, 6, 64)
    recipe = micromix.calibrate(model, [x], NEAREST)
    assert set(recipe.linears) == {"attention.in_proj_weight", "attention.out_proj"}
    with torch.no_grad():
        plain = on_slow_path(model, x)
        fast = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})(x)
    assert 0.001 < (fast[0] - plain[0]).norm() / plain[0].norm() < 0.15
    assert (fast[1] is None) == (not need_weights)
    if need_weights:
        assert (fast[1] - plain[1]).abs().max() < 0.05


def test_parts_of_a_weight_that_cross_attention_makes_are_linears() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(64, 2, batch_first=True)

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:
            return self.attention(x, y, y, need_weights=False)[0]

    model = Cross().eval()
    batch = {"x": torch.randn(2, 5, 64), "y": torch.randn(2, 7, 64)}
    recipe = micromix.calibrate(model, [batch], NEAREST)
    parts = ["attention.in_proj_weight[0:64]", "attention.in_proj_weight[64:192]"]
    assert set(recipe.linears) == {*parts, "attention.out_proj"}
    assert not recipe.refused
    with torch.no_grad():
        plain = on_slow_path(model, **batch)
        fast = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})(**batch)
    assert 0.001 < (fast - plain).norm() / plain.norm() < 0.15
    packed = micromix.quantize_(model, recipe)
    assert set(packed.micromix_refused) == {*parts, "attention.out_proj"}
    assert "it is a part of attention.in_proj_weight, and no module of its own" in packed.micromix_refused[parts[0]]


def test_what_can_not_be_opened_is_named_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    """Under autocast, where torch.nn's fused attention casts by rules of its own."""
    encoder = make_encoder(batch_first=False).bfloat16()
    head = nn.Linear(64, 64).bfloat16()
    model, x = nn.Sequential(encoder, head).eval(), torch.randn(6, 2, 64).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        recipe = micromix.calibrate(model, [x], NEAREST)
        reason = recipe.refused["0.layers.0.self_attn.in_proj_weight"]
        assert reason == "torch.nn's fused attention runs under autocast here"
        assert f"0.layers.0.self_attn.out_proj runs unquantized: {reason}" in caplog.text
        strict = MicroMixConfig(policy="mxfp8", strict=True)
        with pytest.raises(ValueError, match=r"strict=True: 0.layers.0.self_attn.\w+ runs unquantized"):
            micromix.calibrate(model, [x], strict)

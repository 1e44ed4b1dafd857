"""`quantize_` drops nothing of the modules that it replaces: it keeps it, or leaves the module and says so."""

from __future__ import annotations

import copy
import functools
import logging
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear import packed
from micromix_compile.linear.attention import MicroMixAttention
from micromix_compile.verbs import quantize

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.recipe.types import Recipe

NEAREST = MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)


def make_pair(first: nn.Module | None = None) -> tuple[nn.Sequential, Recipe]:
    """Two linears, and their recipe."""
    net = nn.Sequential(first or nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    return net, micromix.calibrate(net, [torch.randn(2, 6, 64)], NEAREST)


def test_hooks_move_to_the_packed_linear_in_order_and_can_be_removed() -> None:
    net, recipe = make_pair()
    calls: list[str] = []

    def before(module: nn.Module, args: tuple[Tensor], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        calls.append("before")
        return (2 * args[0],), kwargs

    def after(name: str, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        calls.append(name)
        return output + 1

    net[0].register_forward_pre_hook(before, with_kwargs=True)
    handle = net[0].register_forward_hook(functools.partial(after, "first"))
    net[0].register_forward_hook(functools.partial(after, "second"), always_call=True)
    net[0].note = "kept"
    plain = micromix.quantize_(copy.deepcopy(net), recipe)
    micromix.quantize_(net, recipe)
    for one in (net, plain):
        assert isinstance(one[0], micromix.MicroMixLinear)
        assert one[0].note == "kept"
    x = torch.randn(3, 64)
    with torch.no_grad():
        hooked = net[0](x)
        assert calls == ["before", "first", "second"]
        handle.remove()
        assert torch.allclose(net[0](x), hooked - 1)
        net[0]._forward_hooks.clear()
        net[0]._forward_pre_hooks.clear()
        assert torch.allclose(net[0](2 * x) + 2, hooked)


def test_backward_hooks_move_and_are_called() -> None:
    net, recipe = make_pair()
    seen: list[Tensor] = []
    net[0].register_full_backward_hook(lambda module, grad_input, grad_output: seen.extend(grad_input))
    micromix.quantize_(net, recipe)
    x = torch.randn(3, 64, requires_grad=True)
    net[0](x).sum().backward()
    assert torch.equal(seen[0], x.grad)


def override(linear: nn.Linear) -> None:
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) + 100  # type: ignore[method-assign]


def parametrize_bias(linear: nn.Linear) -> None:
    parametrize.register_parametrization(linear, "bias", nn.ReLU())


def add_buffer(linear: nn.Linear) -> None:
    linear.register_buffer("scale", torch.ones(1))


def add_state_hook(linear: nn.Linear) -> None:
    linear.register_state_dict_pre_hook(lambda module, prefix, keep_vars: None)


def compile_alone(linear: nn.Linear) -> None:
    linear.compile(backend="eager")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (override, "its forward is overridden on the instance"),
        (parametrize_bias, "it is parametrized"),
        (add_buffer, "it holds more than a weight and a bias: scale"),
        (add_state_hook, "it has hooks on its state dict"),
        (compile_alone, "it is compiled by itself"),
    ],
)
def test_a_linear_that_would_lose_something_stays_and_is_named(
    change: Callable[[nn.Linear], None], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    net, recipe = make_pair()
    change(net[0])
    original = net[0]
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        micromix.quantize_(net, recipe)
    assert net[0] is original
    assert isinstance(net[1], micromix.MicroMixLinear)
    assert net.micromix_refused["0"].startswith(reason)
    assert f"0 stays as it is: {reason}" in caplog.text


def test_a_strict_recipe_refuses_the_whole_model_unchanged() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)], MicroMixConfig(policy="mxfp8", strict=True))
    override(net[1])
    with pytest.raises(ValueError, match=r"strict=True: 1 stays as it is: its forward is overridden"):
        micromix.quantize_(net, recipe)
    assert type(net[0]) is nn.Linear


@pytest.mark.parametrize("norm", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_weight_is_not_calibrated_and_stays(norm: Callable[[nn.Linear], nn.Linear]) -> None:
    net, recipe = make_pair(norm(nn.Linear(64, 64)))
    assert list(recipe.linears) == ["1"]
    original = net[0]
    micromix.quantize_(net, recipe)
    assert net[0] is original


class Conv1D(nn.Module):
    """A user's: not that of GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(64, 64))
        self.bias = nn.Parameter(torch.randn(64))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * (x @ self.weight + self.bias)


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


@pytest.mark.parametrize("kind", [Conv1D, lambda: Scaled(64, 64)])
def test_a_users_class_is_no_linear(kind: Callable[[], nn.Module]) -> None:
    net, recipe = make_pair(kind())
    micromix.quantize_(net, recipe)
    assert "not an nn.Linear" in net.micromix_refused["0"]
    assert type(net[0]).__name__ in net.micromix_refused["0"]


def test_linears_with_one_weight_keep_their_own_biases() -> None:
    net = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64)).eval()
    net[1].weight = net[0].weight
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)], NEAREST)
    biases = [linear.bias.detach().clone() for linear in net]
    micromix.quantize_(net, recipe)
    assert all(torch.equal(linear.bias, bias) for linear, bias in zip(net, biases, strict=True))
    assert net[0].weight_q8 is net[1].weight_q8


def test_an_error_half_way_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    net, recipe = make_pair()
    modules = list(net)
    pack = quantize.packed_weight

    def fail(weight: Tensor, linear: Any, recipe: Recipe) -> Any:
        if linear.fqn == "1":
            raise RuntimeError("out of memory")
        return pack(weight, linear, recipe)

    monkeypatch.setattr(quantize, "packed_weight", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        micromix.quantize_(net, recipe)
    assert list(net) == modules


def test_a_module_that_refuses_a_child_keeps_all_its_others() -> None:
    class Fussy(nn.Sequential):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "1" and isinstance(value, micromix.MicroMixLinear):
                raise TypeError("no")
            super().__setattr__(name, value)

    net = Fussy(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)], NEAREST)
    modules = list(net)
    with pytest.raises(TypeError, match="no"):
        micromix.quantize_(net, recipe)
    assert list(net) == modules


# torch.nn's Transformer


def make_encoder(*, batch_first: bool = True) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(64, 2, 96, batch_first=batch_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=batch_first).eval()


def packed_encoder() -> nn.TransformerEncoder:
    encoder = make_encoder()
    return micromix.quantize_(encoder, micromix.calibrate(encoder, [torch.randn(2, 6, 64)], NEAREST))


def padding(rows: int) -> Tensor:
    mask = torch.zeros(2, 6, dtype=torch.bool)
    mask[1, 6 - rows :] = True
    return mask


@pytest.mark.parametrize("mask", [None, padding(2)], ids=["plain", "padded"])
def test_a_packed_encoder_runs_its_packed_linears(mask: Tensor | None, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = packed_encoder()
    assert isinstance(encoder.layers[0].linear1, micromix.MicroMixLinear)
    assert isinstance(encoder.layers[0].self_attn, MicroMixAttention)
    assert not encoder.micromix_refused
    calls: list[int] = []
    product = packed.packed_product
    monkeypatch.setattr(packed, "packed_product", lambda *args: (calls.append(1), product(*args))[1])
    with torch.no_grad():
        encoder(torch.randn(2, 6, 64), src_key_padding_mask=mask)
    assert len(calls) == 2 * 4


@pytest.mark.parametrize("mask", [None, padding(2)], ids=["plain", "padded"])
def test_a_compiled_packed_encoder_has_its_packed_linears_in_the_graph(mask: Tensor | None) -> None:
    encoder = packed_encoder()
    targets: list[str] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        targets.extend(str(node.target) for node in gm.graph.nodes)
        return gm.forward

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(encoder, backend=backend)(torch.randn(2, 6, 64), src_key_padding_mask=mask)
    torch._dynamo.reset()
    assert sum("mixed_mx_mm" in target for target in targets) == 2 * 4
    assert not any("_transformer_encoder_layer_fwd" in target for target in targets)

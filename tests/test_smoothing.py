"""Smoothing: outputs keep their bits, channels become more alike, and what other places read stays as it is."""

from __future__ import annotations

import copy
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Net, RMSNorm, make_net
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GemmaConfig, GPT2Config, LlamaConfig, MixtralConfig, Qwen2Config

import micromix_compile as micromix
from micromix_compile.smoothing import smoothing_factors

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.usefixtures("fresh_compiler")

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 256,
}
ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "input_layernorm")
MLP = ("mlp.gate_proj", "mlp.up_proj", "post_attention_layernorm")
alphas = st.floats(0, 1, width=32)


class Mlp(nn.Module):
    """LayerNorm, SiLU(gate) * up and down, all with biases, and a residual; `norm` may be another."""

    def __init__(self, norm: nn.Module | None = None, *, channels: int = 64, hidden: int = 96) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels) if norm is None else norm
        self.gate = nn.Linear(channels, hidden)
        self.up = nn.Linear(channels, hidden)
        self.down = nn.Linear(hidden, channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return x + self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y))


class GemmaNorm(nn.Module):
    """Its weight is what is added to 1."""

    def __init__(self, channels: int = 64) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = x.float()
        return (h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight.float())).type_as(x)


def uneven(model: nn.Module) -> nn.Module:
    """`model` in eval mode, no Parameter zero and its channels of many sizes, all far from under- and overflow."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.02 * torch.randn_like(parameter))
            parameter.mul_(torch.exp(torch.randn(parameter.shape[-1:])))
    return model.eval()


def changed_by(model: nn.Module, batches: list[Any], **options: Any) -> set[str]:
    """Names of the Parameters that smoothing changes; checks that no bit of the first batch's output does."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        expected = _tensor(model(batches[0]))
        assert micromix.smooth_(model, batches, **options) is model
        assert torch.equal(_tensor(model(batches[0])), expected)
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


def _tensor(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def inputs(channels: int = 64, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    return [torch.randn(2, 5 + i, channels).to(dtype) for i in range(2)]


def tokens() -> list[Tensor]:
    return [torch.randint(0, 256, (2, 16 + 8 * i)) for i in range(2)]


def input_max(model: nn.Module, name: str, batches: list[Tensor]) -> Tensor:
    """Largest magnitude of each channel of a linear's input."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(
        lambda _, args: seen.append(args[0].abs().flatten(0, -2).amax(0))
    )
    with torch.no_grad():
        for batch in batches:
            model(batch)
    handle.remove()
    return torch.stack(seen).amax(0)


# Equivalence. x / s and w * s are exact for powers of two, and so is their product: every sum adds the same numbers, in
# the same order, because shapes do not change. The bound on the difference is therefore zero.


@settings(max_examples=12)
@given(
    st.integers(1, 2),
    st.integers(1, 80),
    st.integers(1, 80),
    alphas,
    st.sampled_from((torch.float32, torch.bfloat16)),
    st.integers(0, 99),
)
def test_no_bit_of_the_output_changes(
    layers: int, channels: int, hidden: int, alpha: float, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    net = uneven(Net(layers=layers, channels=channels, hidden=hidden)).to(dtype)
    changed = changed_by(net, inputs(channels, dtype), alpha=alpha)
    assert not any(name.startswith("lm_head") or name.endswith("down.bias") for name in changed)


def test_biases_of_the_norm_and_of_the_linear_before_are_scaled_too() -> None:
    names = ("norm.weight", "norm.bias", "gate.weight", "up.weight", "up.bias", "down.weight")
    assert changed_by(uneven(Mlp()), inputs()) == set(names)


def test_torchs_own_rms_norm_is_scaled() -> None:
    names = ("norm.weight", "gate.weight", "up.weight", "up.bias", "down.weight")
    assert changed_by(uneven(Mlp(nn.RMSNorm(64))), inputs()) == set(names)


@pytest.mark.parametrize(
    ("config", "per_layer"),
    [
        (LlamaConfig(**SIZES), (*ATTENTION, *MLP, "mlp.down_proj")),
        (Qwen2Config(**SIZES), (*ATTENTION, *MLP, "mlp.down_proj")),
        (GemmaConfig(**SIZES, head_dim=32), ("mlp.up_proj", "mlp.down_proj")),
        (MixtralConfig(**SIZES, num_local_experts=2, num_experts_per_tok=1), ATTENTION),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_of_transformers_are_smoothed_without_edits(config: Any, per_layer: tuple[str, ...]) -> None:
    """A router reads the norm before the experts, and the values of attention leave the graph in a cache."""
    model = uneven(AutoModelForCausalLM.from_config(config))
    expected = {f"model.layers.{i}.{name}.weight" for i in range(2) for name in per_layer}
    assert changed_by(model, tokens()) == expected


def test_gpt2s_norms_and_transposed_weights_are_smoothed() -> None:
    model = uneven(AutoModelForCausalLM.from_config(GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=256)))
    norms = {f"transformer.h.0.ln_{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    linears = {"transformer.h.0.attn.c_attn.weight", "transformer.h.0.mlp.c_fc.weight"}
    assert changed_by(model, tokens()) == norms | linears


def test_layers_that_share_one_graph_get_factors_of_their_own() -> None:
    """The break between up and down lets the product's factor leave the graph."""
    net = uneven(Net(breaks=True))
    names = ("norm.weight", "gate.weight", "up.weight")
    assert changed_by(net, inputs()) == {f"layers.{i}.{name}" for i in range(2) for name in names}
    first, second = (layer.norm.weight for layer in net.layers)
    assert not torch.equal(first, second)


def test_a_smoothed_model_calibrates_and_packs() -> None:
    net, batches = micromix.smooth_(make_net(), inputs()), inputs()
    packed = micromix.quantize_(copy.deepcopy(net), micromix.calibrate(net, batches))
    with torch.no_grad():
        expected = net(batches[0])
        assert 0 < (packed(batches[0]) - expected).abs().max() < 0.5 * expected.abs().max()


# Factors


@given(
    st.lists(st.tuples(st.floats(2**-40, 2**40, width=32), st.floats(2**-40, 2**40, width=32)), min_size=1),
    alphas,
)
def test_factors_are_powers_of_two_that_leave_at_most_a_factor_of_two(
    sizes: list[tuple[float, float]], alpha: float
) -> None:
    """What is left of x ** alpha / w ** (1 - alpha) differs by 2 at the most, but for float32's error in logarithms."""
    x, w = torch.tensor(sizes).T
    factors = smoothing_factors(x, w, alpha)
    assert torch.equal(torch.frexp(factors).mantissa, torch.full_like(x, 0.5))
    left = alpha * x.double().log2() - (1 - alpha) * w.double().log2() - factors.double().log2()
    assert left.max() - left.min() <= 1 + 2**-15
    assert (factors == 1).any()


def test_factors_are_nearest_and_one_where_a_channel_says_nothing() -> None:
    zero, inf = 0.0, float("inf")
    x, w = torch.tensor([4.0, 1.0, zero, 64.0, 64.0, inf]), torch.tensor([1.0, 1.0, 9.0, zero, inf, 1.0])
    assert smoothing_factors(x, w, 1.0).tolist() == [4.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert smoothing_factors(torch.tensor([1.0, 1.3, 3.1]), torch.ones(3), 1.0).tolist() == [1.0, 1.0, 4.0]
    assert smoothing_factors(torch.zeros(3), torch.ones(3), 0.5).tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("name", ["gate", "down"])
def test_channels_become_more_alike(name: str) -> None:
    """All of the difference goes where alpha says; the exponent's rounding leaves a factor of two."""
    for alpha in (0.0, 0.5, 1.0):
        model, batches = uneven(Mlp()), inputs()
        plain = copy.deepcopy(model)
        micromix.smooth_(model, batches, alpha=alpha)
        x, w = input_max(model, name, batches), _weight_max(model, name)
        old_x, old_w = input_max(plain, name, batches), _weight_max(plain, name)
        left = x**alpha / w ** (1 - alpha)
        before = old_x**alpha / old_w ** (1 - alpha)
        assert left.max() / left.min() <= 2 * (1 + 2**-15) < before.max() / before.min()


def _weight_max(model: nn.Module, name: str) -> Tensor:
    """Largest magnitude of each column of all weights that read the input of `name`."""
    names = ("gate", "up") if name == "gate" else (name,)
    return torch.cat([model.get_submodule(member).weight.detach() for member in names]).abs().amax(0)


def test_smoothing_again_changes_nothing_and_copies_get_the_same() -> None:
    model, batches = uneven(Mlp()), inputs()
    other = copy.deepcopy(model)
    assert changed_by(model, batches)
    assert not changed_by(model, batches)
    micromix.smooth_(other, batches)
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


class Masked(Mlp):
    """Leaves the mask to attention, which it has not."""

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return super().forward(x)


def test_padding_does_not_count() -> None:
    model, x, mask = uneven(Masked()), torch.randn(2, 6, 64), torch.ones(2, 6, dtype=torch.int64)
    mask[1, 2:] = 0
    other = copy.deepcopy(model)
    loud = torch.where(mask.bool().unsqueeze(-1), x, 100 * torch.randn_like(x))
    micromix.smooth_(model, [{"x": x, "attention_mask": mask}])
    micromix.smooth_(other, [{"x": loud, "attention_mask": mask}])
    for first, second in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(first, second)


def test_channels_that_a_weight_could_not_hold_exactly_stay() -> None:
    model, batches = uneven(Mlp()), inputs()
    with torch.no_grad():
        model.norm.weight[3], model.norm.bias[3] = 2.0**-60, 0.0  # the weights are to become as much smaller
        model.gate.weight[0, 3] = 2.0**-100
        before = model.gate.weight.clone()
    assert "gate.weight" in changed_by(model, batches, alpha=1.0)
    assert torch.equal(model.gate.weight[:, 3], before[:, 3])
    assert model.norm.weight[3] == 2.0**-60


# What must stay


class Reads(nn.Module):
    """A norm, a linear, and a second reader of the norm's output."""

    def __init__(self, read: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.norm = RMSNorm(64)
        self.up = nn.Linear(64, 64)
        self.down = nn.Linear(64, 64)
        self.router = nn.Linear(64, 64)
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        u = self.up(y)
        return self.down(torch.sigmoid(x) * u) + self.read(self, y, u)  # type: ignore[call-arg, arg-type]


@pytest.mark.parametrize(
    ("read", "changes"),
    [
        (lambda self, y, u: 0, {"norm.weight", "up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: y.shape[0], {"norm.weight", "up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: self.router(y.view(-1, 64)).view(y.shape), {"up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: y, {"up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: y.view(-1).float().sum(), {"up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: u, {"norm.weight", "up.weight"}),
        (lambda self, y, u: u.mul_(1.0), {"norm.weight", "up.weight"}),
        (lambda self, y, u: self.norm.weight, {"up.weight", "up.bias", "down.weight"}),
        (lambda self, y, u: self.up.bias, {"norm.weight", "up.weight"}),
        (lambda self, y, u: self.up.weight.sum(), set()),
        (lambda self, y, u: self.up(x_of(y)), set()),
    ],
    ids=["nothing", "shape", "router", "residual", "view", "factor", "in-place", "norm", "bias", "weight", "twice"],
)
def test_what_something_else_reads_stays(read: Any, changes: set[str]) -> None:
    model = uneven(Reads(read))
    if not changes:
        with pytest.raises(ValueError, match="Reads has no input of linears that can be smoothed"):
            micromix.smooth_(model, inputs(), skip=["router"])
        return
    assert changed_by(model, inputs(), skip=["router"]) == changes


def x_of(y: Tensor) -> Tensor:
    return torch.tanh(y)


@pytest.mark.parametrize("read", [lambda y, w: y @ w, lambda y, w: w.abs().sum(), lambda y, w: 0])
def test_a_weight_whose_transpose_something_else_reads_stays(read: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Transposes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.other = RMSNorm(64), RMSNorm(64)
            self.weight = nn.Parameter(torch.randn(64, 64))

        def forward(self, x: Tensor) -> Tensor:
            w = self.weight.T
            return self.norm(x) @ w + read(self.other(x), w)

    model = uneven(Transposes())
    if not isinstance(read(torch.ones(1, 64), model.weight), Tensor):
        assert changed_by(model, inputs()) == {"norm.weight", "weight"}
        return
    with pytest.raises(ValueError, match="Transposes has no input of linears that can be smoothed"):
        micromix.smooth_(model, inputs())


def test_a_norm_that_adds_one_to_its_weight_stays() -> None:
    assert changed_by(uneven(Mlp(GemmaNorm())), inputs()) == {"up.weight", "up.bias", "down.weight"}


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mlp(), Mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))


@pytest.mark.parametrize("shares_memory", [False, True])
def test_tied_weights_stay(shares_memory: bool) -> None:
    """Both as one Parameter in two places, and as two Parameters in one memory."""
    model = uneven(TwoLayers())
    weight = model.first.down.weight
    model.second.down.weight = nn.Parameter(weight.detach()) if shares_memory else weight
    changed = changed_by(model, inputs())
    own = ("norm.weight", "norm.bias", "gate.weight", "up.weight")
    assert changed == {f"{layer}.{name}" for layer in ("first", "second") for name in own}


def test_a_module_that_is_used_by_two_layers_stays() -> None:
    model = uneven(TwoLayers())
    model.second.norm = model.first.norm
    assert changed_by(model, inputs()) == {
        f"{layer}.{name}" for layer in ("first", "second") for name in ("up.weight", "up.bias", "down.weight")
    }


class Branches(nn.Module):
    """Two graphs: which of two linears reads the norm depends on the input's size."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm(64)
        self.short, self.long = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return self.short(y) if x.shape[1] < 6 else self.long(y)


def test_a_norm_that_different_graphs_give_to_different_linears_stays() -> None:
    model = uneven(Branches())
    with pytest.raises(ValueError, match="Branches has no input of linears that can be smoothed"):
        micromix.smooth_(model, inputs())
    assert changed_by(model, inputs()[:1]) == {"norm.weight", "short.weight"}


def test_linears_that_no_batch_reached_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        micromix.smooth_(uneven(Branches()), inputs()[:1])
    assert "smoothing did not reach 1 linears of Branches (long, ...)" in caplog.text


class Square(nn.Module):
    """A product of a node with itself."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = RMSNorm(64), nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        u = self.up(self.norm(x))
        return self.down(u * u)


def test_what_is_multiplied_by_itself_stays() -> None:
    assert changed_by(uneven(Square()), inputs()) == {"norm.weight", "up.weight"}


def test_weights_that_share_a_storage_stay() -> None:
    model = uneven(Square())
    both = torch.cat((model.up.weight, model.down.weight)).detach()  # type: ignore[arg-type]
    model.up.weight, model.down.weight = nn.Parameter(both[:64]), nn.Parameter(both[64:])
    with pytest.raises(ValueError, match="Square has no input of linears that can be smoothed"):
        micromix.smooth_(model, inputs())


def test_smoothing_keeps_no_weight_alive() -> None:
    model = uneven(Mlp())
    micromix.smooth_(model, inputs(), progress=False)
    weight = weakref.ref(model.up.weight)
    micromix.quantize_(model, micromix.calibrate(model, inputs(), progress=False))
    gc.collect()
    assert weight() is None


def test_linears_that_are_skipped_stay() -> None:
    names = {"up.weight", "up.bias", "down.weight"}
    assert changed_by(uneven(Mlp()), inputs(), skip=["gate"]) == names


# Errors


def test_wrong_uses_say_what_is_accepted(caplog: pytest.LogCaptureFixture) -> None:
    model = uneven(Mlp())
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 1.5"):
        micromix.smooth_(model, inputs(), alpha=1.5)
    with pytest.raises(ValueError, match="Mlp is in training mode"):
        micromix.smooth_(model.train(), inputs())
    with pytest.raises(ValueError, match="Mlp has no input of linears that can be smoothed, or no batch reached it"):
        micromix.smooth_(model.eval(), [])
    with caplog.at_level(logging.DEBUG, "micromix_compile"), pytest.raises(ValueError, match="can be smoothed"):
        micromix.smooth_(nn.Sequential(nn.ReLU(), nn.Linear(64, 64)).eval(), inputs())
    assert "the input of 1 can't be smoothed" in caplog.text


def test_an_activation_with_a_nan_is_an_error_that_names_the_linear() -> None:
    batches = inputs()
    batches[1][0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"^calibration batch 1: the input of gate holds a NaN or an infinity"):
        micromix.smooth_(uneven(Mlp()), batches)

"""Packed linears as other code meets them: a weight to read, a gradient, adapters around them."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, T5Config, T5ForConditionalGeneration

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics import reference

if TYPE_CHECKING:
    from pathlib import Path

    from micromix_compile.numerics.layout import Split

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks

NEAREST = MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False)


def packed_linear(
    channels: int = 64, dtype: torch.dtype = torch.float32, *, bias: bool = True, config: MicroMixConfig = NEAREST
) -> tuple[micromix.MicroMixLinear, Tensor]:
    """One packed linear of `channels` inputs and 48 outputs, and the weight that it was packed from."""
    net = nn.Sequential(nn.Linear(channels, 48, bias=bias, dtype=dtype)).eval()
    weight = net[0].weight.detach()
    recipe = micromix.calibrate(net, [torch.randn(2, 6, channels, dtype=dtype)], config)
    return micromix.quantize_(net, recipe)[0], weight


# The state dict


def empty(split: Split = (0, 64, 0), rotated: int = 0, **options: Any) -> nn.Module:
    config = MicroMixConfig(**{"activations": "same", **options})
    packed = micromix.MicroMixLinear(
        in_features=64, out_features=8, split=split, rotated=rotated, config=config, bias=None
    )
    return nn.Sequential(packed)


@pytest.mark.parametrize("other", [{"fp6": "e3m2"}, {"rotated": 64}, {"split": (32, 32, 0)}])
def test_bytes_that_mean_something_else_are_not_loaded(other: dict[str, Any], tmp_path: Path) -> None:
    source, target = empty(), empty(**other)
    for part in ("weight_q4", "weight_q6", "weight_q8", "weight_scale"):
        target.get_buffer(f"0.{part}").zero_()
    torch.save(source.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    with pytest.raises(RuntimeError, match=r"the packed weight 0\.weight is laid out as .*'fp6': 'e2m3', 'rotated': 0"):
        target.load_state_dict(state)
    assert not target.get_buffer("0.weight_q6").any()
    same = empty(activations="fp8", scale_rounding="floor")  # of activations alone
    same.load_state_dict(state)
    assert torch.equal(same.get_buffer("0.weight_q6"), source.get_buffer("0.weight_q6"))
    target = empty()
    target.load_state_dict(dict(state))  # as of a file that has no metadata
    assert torch.equal(target.get_buffer("0.weight_q6"), source.get_buffer("0.weight_q6"))


# The weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels", [64, 50])
def test_the_weight_is_dequantized_in_the_models_order(channels: int, dtype: torch.dtype) -> None:
    linear, original = packed_linear(channels, dtype)
    weight = linear.weight
    assert weight.shape == (48, channels) == (linear.out_features, linear.in_features)
    assert (weight.dtype, weight.device, weight.requires_grad) == (dtype, original.device, False)
    parts = (linear.weight_q4, linear.weight_q6, linear.weight_q8, linear.weight_scale)
    values = reference.dequantize_weight(*parts, linear.layout.fp6).to(dtype)
    assert torch.equal(reference.reorder(weight + 0, linear.order.channel_perm), values)
    assert (weight - original).norm() < 0.15 * original.norm()


@pytest.mark.parametrize("channels", [64, 50])
def test_the_weight_of_rotated_blocks_is_rotated_back(channels: int) -> None:
    config = dataclasses.replace(NEAREST, policy="mxfp8", activations="fp8", rotate="all")
    linear, original = packed_linear(channels, config=config)
    assert linear.layout.rotated == 64
    assert (linear.weight - original).norm() < 0.03 * original.norm()
    x = torch.randn(7, channels, requires_grad=True)
    y = linear(x)
    assert (y - (x @ linear.weight.T + linear.bias)).norm() < 0.04 * y.norm()  # x alone is rounded
    y.sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, (linear.weight + 0).sum(0).expand(7, -1), atol=1e-5)


def test_the_weight_is_no_parameter_and_what_is_saved_as_it_are_the_scales() -> None:
    linear, _ = packed_linear()
    assert [name for name, _ in linear.named_parameters()] == ["bias"]
    assert torch.equal(linear.state_dict()["weight"], linear.weight_scale)
    assert isinstance(copy.deepcopy(linear).weight, Tensor)


def test_the_weights_dtype_follows_the_module() -> None:
    linear, _ = packed_linear()
    assert linear.half().weight.dtype is torch.float16
    assert linear.to(torch.bfloat16).weight.dtype is (linear.weight + 0).dtype is torch.bfloat16
    assert linear.to("meta").weight.device.type == "meta"


def test_reading_shape_and_dtype_of_a_weight_dequantizes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    linear, _ = packed_linear()
    monkeypatch.setattr(micromix.MicroMixLinear, "_dequantize", lambda self: pytest.fail("dequantized"))
    assert (linear.weight.dtype, linear.weight.shape[0], linear.weight.numel()) == (torch.float32, 48, 48 * 64)
    assert linear.weight.data.detach().dtype.is_floating_point


def test_the_weight_reads_like_a_tensor() -> None:
    linear, _ = packed_linear()
    weight, plain = linear.weight, linear.weight + 0
    assert torch.equal(weight, plain)
    assert weight.tolist() == plain.tolist()
    assert repr(weight) == repr(plain)
    assert (weight.numpy() == plain.numpy()).all()
    x = torch.randn(3, 64, requires_grad=True)
    nn.functional.linear(x, weight).sum().backward()
    assert torch.allclose(x.grad, plain.sum(0).expand(3, -1), atol=1e-5)


def test_a_write_to_the_weight_is_refused() -> None:
    linear, _ = packed_linear()
    with pytest.raises(RuntimeError, match="can't be written to"):
        linear.weight.add_(1)
    with pytest.raises(RuntimeError, match="can't be written to"):
        linear.weight.data += 1
    with pytest.raises(RuntimeError, match="can't be written to"):
        linear.weight.data = torch.zeros(48, 64)
    with pytest.raises(RuntimeError, match="can't be written to"):
        linear.reset_parameters()
    with pytest.raises(AttributeError, match="can't be set"):
        linear.weight = nn.Parameter(torch.zeros(48, 64))


def test_a_weight_that_is_being_loaded_goes_first() -> None:
    linear, _ = packed_linear()
    loading = torch.zeros(48, 64)
    linear.register_buffer("weight", loading, persistent=False)
    assert linear.weight is loading
    del linear._buffers["weight"]
    vars(linear)["weight"] = loading
    assert linear.weight is loading


def test_a_loaded_checkpoint_has_the_dtype_of_its_weights(tmp_path: Path) -> None:
    model, _ = tiny_llama(torch.bfloat16)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype is torch.bfloat16


def test_t5_runs_packed_and_compiled() -> None:
    """Its feed-forward part asks for `wo.weight.dtype`."""
    config = T5Config(d_model=64, d_kv=16, d_ff=96, num_layers=1, num_heads=4, vocab_size=64)
    model = T5ForConditionalGeneration(config).eval()
    ids = {"input_ids": torch.randint(0, 64, (2, 8)), "decoder_input_ids": torch.randint(0, 64, (2, 5))}
    recipe = micromix.calibrate(model, [ids], NEAREST)
    assert any(name.endswith("DenseReluDense.wo") for name in recipe.linears)
    packed = micromix.quantize_(model, recipe)
    torch._dynamo.reset()
    with torch.no_grad():
        expected = packed(**ids).logits
        actual = torch.compile(packed, backend="micromix", fullgraph=True)(**ids).logits
    torch._dynamo.reset()
    assert (actual - expected).norm() < 0.05 * expected.norm()


# The gradient


def dequantized_twin(packed: nn.Module) -> nn.Module:
    """Packed linears as plain ones of their weights."""
    twin = copy.deepcopy(packed)
    for name, module in packed.named_modules():
        if isinstance(module, micromix.MicroMixLinear):
            plain = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            plain.weight = nn.Parameter(module.weight + 0)
            plain.bias = module.bias
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, plain)
    return twin


@pytest.mark.parametrize("channels", [64, 50])
def test_the_gradient_is_that_of_the_dequantized_weight(channels: int) -> None:
    linear, _ = packed_linear(channels)
    linear.bias.requires_grad_()
    x = torch.randn(2, 5, channels, requires_grad=True)
    grad = torch.randn(2, 5, 48)
    linear(x).backward(grad)
    assert torch.allclose(x.grad, grad @ (linear.weight + 0), atol=1e-5)
    assert torch.allclose(linear.bias.grad, grad.sum((0, 1)), atol=1e-5)
    with torch.no_grad():
        assert torch.equal(linear(x), linear(x.detach()))
        assert not linear(x).requires_grad
    assert torch.equal(linear(x), linear(x.detach()))


def test_under_autocast_the_gradient_has_the_inputs_dtype() -> None:
    linear, _ = packed_linear()
    x = torch.randn(3, 64, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x)
    out.sum().backward()
    want = (linear.weight + 0).sum(0).expand(3, -1)
    assert (out.dtype, x.grad.dtype) == (torch.bfloat16, torch.float32)
    assert torch.allclose(x.grad, want, atol=0.05 * float(want.abs().max()))


@pytest.mark.parametrize("backend", ["aot_eager", "micromix"])
def test_a_compiled_packed_model_has_the_gradient_of_eager(backend: str) -> None:
    net = nn.Sequential(nn.Linear(64, 96), nn.SiLU(), nn.Linear(96, 64)).eval()
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 6, 64)], NEAREST))
    inputs = [torch.randn(2, 6, 64, requires_grad=True) for _ in range(2)]
    inputs[1].data.copy_(inputs[0].data)
    torch._dynamo.reset()
    fast = torch.compile(packed, backend=backend)
    for run, x in zip((packed, fast), inputs, strict=True):
        run(x).square().sum().backward()
    eager, compiled = (x.grad for x in inputs)
    assert (compiled - eager).norm() < 0.05 * eager.norm()
    with torch.no_grad():
        assert (fast(inputs[0]) - packed(inputs[0])).norm() < 0.05 * packed(inputs[0]).norm()
    torch._dynamo.reset()


# Adapters


def tiny_llama(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64), dtype=dtype)
    ids = torch.randint(0, 64, (4, 12))
    return micromix.quantize_(model.eval(), micromix.calibrate(model, [ids], NEAREST)), ids


def train(model: nn.Module, ids: Tensor, *, steps: int = 20) -> list[float]:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


@pytest.mark.parametrize("targets", [["q_proj", "v_proj", "down_proj"], "all-linear"])
def test_lora_trains_on_a_packed_model(targets: Any) -> None:
    base, ids = tiny_llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert adapters
    assert all("lora_" in name for name in adapters)
    assert {p.dtype for p in adapters.values()} == {torch.float32}
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    losses = train(model, ids)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


def test_the_gradient_of_lora_is_that_around_plain_linears_of_the_dequantized_weights() -> None:
    base, ids = tiny_llama()
    torch.manual_seed(0)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    twin = dequantized_twin(model)
    gradients = []
    for one in (model, twin):
        one(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for name, p in one.named_parameters() if "lora_" in name]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.97


def test_adapters_have_the_models_dtype() -> None:
    base, ids = tiny_llama(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"]), autocast_adapter_dtype=False)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.bfloat16}
    assert train(model, ids, steps=1)[0] > 0


def test_prompt_tuning_trains_on_a_packed_model() -> None:
    base, ids = tiny_llama()
    model = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4))
    losses = train(model, ids)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("safe", [False, True])
def test_merging_lora_into_a_packed_linear_is_refused(safe: bool) -> None:
    base, _ = tiny_llama()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(RuntimeError, match=r"the weight of a packed linear can't be written to"):
        model.merge_adapter(safe_merge=safe)

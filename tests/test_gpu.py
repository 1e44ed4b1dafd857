"""Whole models on a GPU: the same bytes as on a CPU, few launches, CUDA graphs, streams, any number of rows."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from support.gpu import compiled, generate, launches, norm_free
from support.llama import LAYERS, llama, token_batches
from support.models import make_net
from support.targets import served_by
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.recipe.fingerprint import Checksums
from micromix_compile.targets.target import Target
from micromix_compile.verbs import quantized

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp6", ["e2m3", "e3m2"])
@pytest.mark.parametrize("scale_rounding", ["rceil", "floor", "even", "fit"])
@pytest.mark.parametrize(
    ("activations", "rotated"), [("same", 0), ("same", 96), ("fp8", 0), ("fp8", 256), ("mxfp6", 64)]
)
def test_quantized_bytes_equal_those_of_the_cpu(
    dtype: torch.dtype, fp6: str, scale_rounding: str, activations: str, rotated: int
) -> None:
    x = (torch.randn(33, 250) * torch.exp(6 * torch.randn(250))).to(dtype)
    x[3, 7], x[5, 11], x[6] = float("nan"), float("inf"), 0.0
    perm = torch.cat((torch.full((6,), -1), torch.randperm(250))).int()
    layout = (96, 96, 64, fp6, scale_rounding, activations, rotated)
    on_cpu = ops.reorder_quantize(x, perm, *layout)
    on_gpu = ops.reorder_quantize(x.cuda(), perm.cuda(), *layout)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(cpu, gpu.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_checksums_equal_those_of_the_cpu(dtype: torch.dtype) -> None:
    weight = (torch.randn(300, 1000) * torch.logspace(-9, 9, 1000)).to(dtype)
    assert Checksums.of(weight.cuda()) == Checksums.of(weight)


def test_a_model_calibrates_and_runs_on_the_gpu_natively(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net()
    batches = [torch.randn(2, 5 + i, 64) for i in range(3)]
    recipe = micromix.calibrate(net, batches)
    on_gpu = copy.deepcopy(net).cuda()
    again = micromix.calibrate(on_gpu, [batch.cuda() for batch in batches])
    for fqn, linear in recipe.linears.items():
        torch.testing.assert_close(
            linear.group.statistics.abs_mean, again.linears[fqn].group.statistics.abs_mean, rtol=1e-5, atol=1e-6
        )
    x = torch.randn(2, 9, 64)
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        expected = compiled(net, recipe)(x)
        actual = compiled(on_gpu, recipe, strict=True)(x.cuda()).cpu()
    # A producer may differ by an ulp between devices and move a code; a wrong weight or order moves everything.
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().max()
    assert "plain PyTorch" not in caplog.text


def test_a_gpu_without_kernels_is_said_once_and_refused_when_strict(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net(layers=1).cuda()
    x = torch.randn(2, 5, 64, device="cuda")
    recipe = micromix.calibrate(net, [x])
    with torch.no_grad():
        expected = compiled(net, recipe)(x)
    poor = Target(name="a GPU", emulated="no bfloat16 MMA")
    quantized._said.clear()
    torch._dynamo.reset()
    served = served_by(poor, "cuda")
    with served, caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        actual = compiled(net, recipe, fx_graph_cache=False)(x)
    assert caplog.text.count("plain PyTorch operations") == 1
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().max()
    torch._dynamo.reset()
    refused = pytest.raises(BackendCompilerFailed, match=r"strict=True.*no bfloat16 MMA")
    with served_by(poor, "cuda"), refused:
        compiled(net, recipe, strict=True)(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["same", "mxfp4"])
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_compiled_equals_eager_to_the_bit(dtype: torch.dtype, weights: str, mode: str) -> None:
    net = norm_free(make_net(dtype)).cuda()
    config = micromix.MicroMixConfig(weights=weights)
    recipe = micromix.calibrate(net, [torch.randn(2, 7, 64, dtype=dtype, device="cuda")], config)
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    fast = compiled(net, recipe, mode=mode)
    with torch.no_grad():
        for _ in range(4):  # a CUDA graph records in the second and replays from the third on
            x = torch.randn(3, 11, 64, dtype=dtype, device="cuda")
            assert torch.equal(fast(x).clone(), packed(x))


def test_rows_from_1_to_5000_recompile_once(recwarn: pytest.WarningsRecorder) -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    packed = micromix.quantize_(copy.deepcopy(net), recipe)
    fast = compiled(net, recipe)
    counters.clear()
    with torch.no_grad():
        for rows in (7, 64, 1, 5000, 2, 63, 65, 128, 129, 1000, 3333, 17, 0):
            x = torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
            assert torch.equal(fast(x), packed(x)), rows
    # 7 rows, any number of rows, and at most the two that Dynamo compiles for themselves: 1 and 0.
    assert counters["stats"]["unique_graphs"] <= 4


def test_two_streams_do_not_disturb_each_other() -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    packed, fast = micromix.quantize_(copy.deepcopy(net), recipe), compiled(net, recipe)
    inputs = [torch.randn(1, 256, 64, dtype=torch.bfloat16, device="cuda") for _ in range(16)]
    with torch.no_grad():
        expected = [packed(x) for x in inputs]
        fast(inputs[0])
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        outputs: list[Tensor] = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(100_000)
                outputs.append(fast(x) if i % 4 < 2 else packed(x))
        torch.cuda.synchronize()
    for got, want in zip(outputs, expected, strict=True):
        assert torch.equal(got, want)


# On one GPU the device guard that this is about has nothing to do.
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_model_on_the_second_gpu_runs_there() -> None:
    net = norm_free(make_net(torch.bfloat16))
    x = torch.randn(2, 7, 64, dtype=torch.bfloat16)
    recipe = micromix.calibrate(net, [x])
    results = []
    for device in ("cuda:0", "cuda:1"):
        fast = compiled(copy.deepcopy(net).to(device), recipe)
        packed = micromix.quantize_(copy.deepcopy(net), recipe).to(device)
        with torch.no_grad():
            assert torch.equal(fast(x.to(device)), packed(x.to(device)))
            results.append(packed(x.to(device)).cpu())
    assert torch.equal(*results)


def test_a_decoder_layer_quantizes_in_4_launches_and_multiplies_in_7() -> None:
    model = llama(torch.bfloat16).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    fast = compiled(model, recipe)
    ids = torch.randint(0, 256, (2, 12), device="cuda")
    with torch.no_grad():
        fast(ids)
        names = launches(fast, ids)
    assert sum("reorder_quantize" in name for name in names) == 4 * LAYERS
    assert sum("mixed_mx_mm" in name for name in names) == 7 * LAYERS
    assert not any("silu" in name and "mixed_mx_mm" not in name for name in names)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_generate_gives_the_tokens_of_the_eager_packed_model(mode: str) -> None:
    model = llama(torch.float32).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    expected = generate(packed)
    model.forward = compiled(model.forward, recipe, mode=mode)
    assert torch.equal(generate(model), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_eager_s_to_the_bit_where_all_but_linears_is_called_as_eager_does(dtype: torch.dtype) -> None:
    model = llama(dtype).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    fast = compiled(model, recipe, fallback_by_default=True)
    ids = torch.randint(0, 256, (2, 12), device="cuda")
    with torch.no_grad():
        assert torch.equal(fast(ids).logits, packed(ids).logits)
        names = launches(fast, ids)
    assert sum(name.startswith("triton_tem") for name in names) == 7 * LAYERS  # a call of the op is another kernel


def test_packed_modules_move_between_devices() -> None:
    net = make_net(layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 5, 64)]))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = packed(x)
        actual = packed.cuda()(x.cuda()).cpu()
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().max()
    assert packed.layers[0].gate.order.channel_perm is packed.layers[0].up.order.channel_perm


# ---- The folded path of sm_90

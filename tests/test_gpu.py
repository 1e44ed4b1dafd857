"""Whole models on a GPU: the same bytes as on a CPU, few launches, CUDA graphs, streams, any number of rows."""

from __future__ import annotations

import copy
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from support.llama import LAYERS, llama, token_batches
from support.models import make_net
from support.targets import served_by
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.numerics import reference
from micromix_compile.recipe.fingerprint import Checksums
from micromix_compile.targets.target import Target, target_of
from micromix_compile.verbs import quantized

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


def launches(run: object, *arguments: object) -> list[str]:
    """Names of the kernels that a call runs on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run(*arguments)  # type: ignore[operator]
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return [event.name for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]


def compiled(model: nn.Module, recipe: micromix.Recipe, *, exact: bool = True, **options: object) -> nn.Module:
    return torch.compile(model, backend="micromix", options={"recipe": recipe, "exact": exact, **options})


def generate(model: nn.Module) -> Tensor:
    """Sixteen tokens with a static cache.

    It is made before the first call: a cache made inside a CUDA graph lies in the graph's memory, and plain Inductor
    of torch 2.11 ends in a segmentation fault at the second step.
    """
    config = model.config
    cache = StaticCache(config=config, max_cache_len=32)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, heads, width, model.dtype, model.device)
    ids = torch.arange(3, 12, device=model.device)[None]
    tokens: Tensor = model.generate(
        ids, max_new_tokens=16, do_sample=False, pad_token_id=0, past_key_values=cache, disable_compile=True
    )
    return tokens


FOLDS = torch.cuda.is_available() and target_of(torch.device("cuda")).takes == "folded"
needs_folding = pytest.mark.skipif(torch.cuda.is_available() and not FOLDS, reason="needs a GPU of sm_90")


def norm_free(net: nn.Module) -> nn.Module:
    """Without sums whose order is each compiler's own (norms, the plain head), compiled equals eager to the bit."""
    for layer in net.layers:  # type: ignore[union-attr]
        layer.norm = nn.Identity()
    net.lm_head = nn.Identity()
    return net


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp6", ["e2m3", "e3m2"])
@pytest.mark.parametrize("scale_rounding", ["rceil", "floor", "even", "fit"])
def test_quantized_bytes_equal_those_of_the_cpu(dtype: torch.dtype, fp6: str, scale_rounding: str) -> None:
    x = (torch.randn(33, 250) * torch.exp(6 * torch.randn(250))).to(dtype)
    x[3, 7], x[5, 11], x[6] = float("nan"), float("inf"), 0.0
    perm = torch.cat((torch.full((6,), -1), torch.randperm(250))).int()
    layout = (96, 96, 64, fp6, scale_rounding)
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


@needs_folding
@pytest.mark.parametrize("rows", [1, 16, 40, 64, 100, 300])
@pytest.mark.parametrize("weights", ["same", "mxfp4"])
def test_a_folded_linear_is_near_the_exact_one(rows: int, weights: str) -> None:
    # Operands differ by what folding rounds, at most 2**-9 of a row's largest value, which these hardly reach. FP8 MMA
    # keeps 13 bits below the largest of the summands of an instruction: with 32 of them an error of at most 2**-8 of
    # the sum of magnitudes. Where one sum runs over all of K (from 33 rows on) each of 33 instructions errs, but by
    # 2**-8 of a sum that is some 20 times smaller than that of magnitudes, and by half of it on average. Then one
    # rounding to bfloat16.
    net = nn.Linear(1056, 208, dtype=torch.bfloat16, device="cuda").eval()
    x = torch.randn(rows, 1056, dtype=torch.bfloat16, device="cuda") * torch.exp(torch.randn(1056, device="cuda"))
    x = x.bfloat16()
    config = micromix.MicroMixConfig(weights=weights, policy="mxfp8-anchor", weight_rounding="nearest", skip=())
    recipe = micromix.calibrate(net, [x], config)
    sequence = nn.Sequential(net).eval()
    packed = micromix.quantize_(copy.deepcopy(sequence), micromix.calibrate(sequence, [x], config))
    with torch.no_grad():
        fast = compiled(net, recipe, exact=False)
        got, want = fast(x).double(), packed(x).double()
        layer = packed[0]
        q = ops.reorder_quantize(x, layer.order.channel_perm, *layer.split, layer.fp6, layer.scale_rounding)
        left = reference.dequantize_activation(*q).abs()
        parts = (layer.weight_q4, layer.weight_q6, layer.weight_q8, layer.weight_scale)
        right = reference.dequantize_weight(*parts, layer.fp6).abs()
    bound = 2.0**-8 * (left @ right.T).double() + 2.0**-7 * want.abs()
    assert bool(((got - want).abs() <= bound).all())
    assert not torch.equal(fast(x), torch.zeros_like(fast(x)))


@needs_folding
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_folded_models_give_the_same_bits_every_time(mode: str) -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(2, 7, 64, dtype=torch.bfloat16, device="cuda")])
    first, fast = compiled(net, recipe, exact=False), compiled(copy.deepcopy(net), recipe, exact=False, mode=mode)
    with torch.no_grad():
        for _ in range(4):
            x = torch.randn(3, 11, 64, dtype=torch.bfloat16, device="cuda")
            assert torch.equal(fast(x).clone(), first(x))


def decoded(fast: nn.Module, config: PretrainedConfig, steps: int) -> list[Tensor]:
    """Logits of `steps` tokens one after the other, with a static cache."""
    cache = StaticCache(config=config, max_cache_len=steps)
    cache.early_initialization(
        1, config.num_key_value_heads, config.hidden_size // config.num_attention_heads, torch.bfloat16, "cuda"
    )
    position = torch.zeros((1, 1), dtype=torch.int64, device="cuda")
    logits = []
    for _ in range(steps):
        logits.append(fast(5 * position + 3, past_key_values=cache, position_ids=position).logits.clone())
        position += 1
    return logits


@needs_folding
def test_a_model_decodes_to_the_same_bits_where_inductor_s_kernels_start_early_too() -> None:
    model = llama(torch.bfloat16).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    options = {"exact": False, "mode": "reduce-overhead"}
    usual = compiled(copy.deepcopy(model), recipe, **options)
    early = compiled(copy.deepcopy(model), recipe, **options, **{"triton.enable_pdl": True})
    with torch.no_grad():
        want, got = (decoded(fast, model.config, 40) for fast in (usual, early))
    assert all(torch.equal(*pair) for pair in zip(got, want, strict=True))


@needs_folding
def test_folded_models_take_any_rows_on_two_streams() -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    packed, fast = micromix.quantize_(copy.deepcopy(net), recipe), compiled(net, recipe, exact=False)
    inputs = [
        torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
        for rows in (7, 64, 1, 5000, 2, 65, 128, 129, 257, 3333, 0, 256, 256, 256, 256, 256)
    ]
    with torch.no_grad():
        alone = [fast(x) for x in inputs]
        for x, y in zip(inputs, alone, strict=True):
            expected = packed(x)
            assert y.shape == expected.shape
            if y.numel():
                assert (y - expected).float().abs().mean() <= 0.02 * expected.float().abs().max()
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        outputs = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(100_000)
                outputs.append(fast(x))
        torch.cuda.synchronize()
    for got, want in zip(outputs, alone, strict=True):
        assert torch.equal(got, want)


@needs_folding
def test_many_rows_of_any_number_are_one_graph_and_few_another() -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    packed, fast = micromix.quantize_(copy.deepcopy(net), recipe), compiled(net, recipe, exact=False)
    counters.clear()
    with torch.no_grad():
        # Calibrating has seen another number of rows, so it is any number from the first graph on.
        for rows, graphs in ((300, 1), (301, 1), (5000, 1), (20, 2), (33, 2), (400, 2)):
            x = torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
            got, want = fast(x), packed(x)
            assert (got - want).float().abs().mean() <= 0.02 * want.float().abs().max()
            assert counters["stats"]["unique_graphs"] == graphs, rows
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
                fast(x)
            decides = any(event.name == "micromix::folded_mm" for event in profile.events())
            assert decides == (rows < 257), rows


@needs_folding
def test_a_folded_decoder_layer_is_4_quantizers_and_4_products() -> None:
    model = llama(torch.bfloat16).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    fast = compiled(model, recipe, exact=False, strict=True)
    ids = torch.randint(0, 256, (2, 12), device="cuda")
    with torch.no_grad():
        fast(ids)
        names = launches(fast, ids)
    assert sum("reorder_fold" in name for name in names) == 4 * LAYERS
    assert sum("folded_mm" in name for name in names) == 4 * LAYERS
    assert not any("mixed_mx_mm" in name or "reorder_quantize" in name for name in names)


@needs_folding
def test_a_decoder_layer_of_many_rows_expands_its_weights_4_times() -> None:
    model = llama(torch.bfloat16).cuda()
    recipe = micromix.calibrate(model, [ids.cuda() for ids in token_batches()])
    fast = compiled(model, recipe, exact=False, strict=True)
    ids = torch.randint(0, 256, (3, 100), device="cuda")
    with torch.no_grad():
        fast(ids)
        names = launches(fast, ids)
    assert sum("reorder_fold_kernel" in name for name in names) == 4 * LAYERS
    assert sum("expand_weights_kernel" in name for name in names) == 4 * LAYERS
    assert not any("folded_mm_kernel" in name or "mixed_mx_mm" in name for name in names)


@torch.library.custom_op("micromix_test::negate_", mutates_args=("x",))
def negate_(x: Tensor) -> None:
    """Changes its argument where it lies."""
    x.neg_()


def negate_elsewhere(x: Tensor) -> Tensor:
    negate_(x.unflatten(-1, (2, -1)))
    return x + 0


class Fork(nn.Module):
    """Three linears of one activation; what happens to their results is `then`."""

    def __init__(self, then: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Linear(1056, n, dtype=torch.bfloat16) for n in (208, 64, 64))
        self.then = then

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        first, second, third = (linear(x) for linear in self.linears)
        return self.then(first), second.unflatten(-1, (2, 32)).transpose(-2, -3) + 1, self.then(third)


@needs_folding
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
@pytest.mark.parametrize(
    "then",
    [torch.neg, torch.Tensor.neg_, negate_elsewhere, lambda out: out],
    ids=["out of place", "in place", "in place by another's operator", "nothing"],
)
def test_products_of_many_rows_lie_in_memory_as_eager_s_and_are_near_them(
    then: Callable[[Tensor], Tensor], mode: str
) -> None:
    """Within 1 % of the norm, as in `test_triton_folded`: another product's columns err by as much as the product."""
    net = Fork(then).cuda().eval()
    x = torch.randn(3, 100, 1056, dtype=torch.bfloat16, device="cuda")
    config = micromix.MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", skip=())
    recipe = micromix.calibrate(net, [x], config)
    packed, fast = micromix.quantize_(copy.deepcopy(net), recipe), compiled(net, recipe, exact=False, mode=mode)
    with torch.no_grad():
        for _ in range(3):
            for got, want in zip(fast(x), packed(x), strict=True):
                assert got.stride() == want.stride()
                assert float((got.double() - want.double()).norm()) <= 0.01 * float(want.double().norm())


@needs_folding
def test_packed_models_fold_too_and_generate() -> None:
    model = llama(torch.bfloat16).cuda()
    packed = micromix.quantize_(model, micromix.calibrate(model, [ids.cuda() for ids in token_batches()]))
    ids = torch.randint(0, 256, (1, 9), device="cuda")
    packed.forward = torch.compile(packed.forward, backend="micromix", mode="reduce-overhead")
    with torch.no_grad():
        names = launches(packed, ids)
    assert any("folded_mm" in name for name in names)
    assert torch.equal(generate(packed), generate(packed))

"""The folded path on a GPU that has it (sm_90): models as a whole."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
from support.gpu import compiled, generate, launches, needs_folding, norm_free
from support.llama import LAYERS, llama, token_batches
from support.models import make_net
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile import ops
from micromix_compile.numerics import reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PretrainedConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


@needs_folding
@pytest.mark.parametrize("rows", [1, 16, 40, 64, 100, 300, 1100])
@pytest.mark.parametrize("weights", ["same", "mxfp4"])
@pytest.mark.parametrize(
    ("activations", "rotate"), [("same", "none"), ("fp8", "none"), ("fp8", "all"), ("mxfp6", "all")]
)
def test_a_folded_linear_is_near_the_exact_one(rows: int, weights: str, activations: str, rotate: str) -> None:
    # Operands differ by what folding rounds, at most 2**-9 of a row's largest value, which these hardly reach. FP8 MMA
    # keeps 13 bits below the largest of the summands of an instruction: with 32 of them an error of at most 2**-8 of
    # the sum of magnitudes. Where one sum runs over all of K (from 33 rows on) each of 33 instructions errs, but by
    # 2**-8 of a sum that is some 20 times smaller than that of magnitudes, and by half of it on average. Then one
    # rounding to bfloat16.
    net = nn.Linear(1056, 208, dtype=torch.bfloat16, device="cuda").eval()
    x = torch.randn(rows, 1056, dtype=torch.bfloat16, device="cuda") * torch.exp(torch.randn(1056, device="cuda"))
    x = x.bfloat16()
    config = micromix.MicroMixConfig(
        weights=weights, policy="mxfp8-anchor", weight_rounding="nearest", skip=(), activations=activations,
        rotate=rotate,
    )  # fmt: skip
    recipe = micromix.calibrate(net, [x], config)
    sequence = nn.Sequential(net).eval()
    packed = micromix.quantize_(copy.deepcopy(sequence), micromix.calibrate(sequence, [x], config))
    with torch.no_grad():
        fast = compiled(net, recipe, exact=False)
        got, want = fast(x).double(), packed(x).double()
        layer = packed[0]
        q = ops.reorder_quantize(x, layer.order.channel_perm, *layer.layout)
        left = reference.dequantize_activation(*q).abs()
        parts = (layer.weight_q4, layer.weight_q6, layer.weight_q8, layer.weight_scale)
        right = reference.dequantize_weight(*parts, layer.layout.fp6).abs()
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
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_weights_that_are_kept_expanded_are_never_expanded_again_until_they_change(mode: str) -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    other = copy.deepcopy(net)
    usual = compiled(other, recipe, exact=False)
    kept = compiled(net, recipe, exact=False, keep_expanded=True, mode=mode)
    with torch.no_grad():
        for rows in (1300, 257, 16, 1300):
            if rows == 16:
                for parameter in (*net.parameters(), *other.parameters()):
                    parameter.mul_(0.5)
            x = torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
            got, want = kept(x).clone(), usual(x)
            assert (got - want).float().abs().mean() <= 0.02 * want.float().abs().max()
        assert not any("expand_weights" in name for name in launches(lambda: kept(x)))
        assert any("expand_weights" in name for name in launches(lambda: usual(x)))


@needs_folding
def test_many_rows_of_any_number_are_one_graph_and_few_another() -> None:
    net = norm_free(make_net(torch.bfloat16)).cuda()
    recipe = micromix.calibrate(net, [torch.randn(1, 64, 64, dtype=torch.bfloat16, device="cuda")])
    packed, fast = micromix.quantize_(copy.deepcopy(net), recipe), compiled(net, recipe, exact=False)
    counters.clear()
    with torch.no_grad():
        # Calibrating has seen another number of rows, so it is any number from the first graph on.
        for rows, graphs in ((1100, 1), (1101, 1), (5000, 1), (20, 2), (33, 2), (400, 2), (1300, 2)):
            x = torch.randn(1, rows, 64, dtype=torch.bfloat16, device="cuda")
            got, want = fast(x), packed(x)
            assert (got - want).float().abs().mean() <= 0.02 * want.float().abs().max()
            assert counters["stats"]["unique_graphs"] == graphs, rows
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
                fast(x)
            decides = any(event.name == "micromix::folded_mm" for event in profile.events())
            assert decides == (rows < 1025), rows


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
    ids = torch.randint(0, 256, (11, 100), device="cuda")
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
    x = torch.randn(11, 100, 1056, dtype=torch.bfloat16, device="cuda")
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

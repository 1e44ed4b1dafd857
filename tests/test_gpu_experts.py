"""Models of experts on a GPU: near what the CPU's reference computes, without a wait for the device, in CUDA graphs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.experts import GroupedExperts, model_of_experts
from support.gpu import launches, waits_refused

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

QUICK = MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("graphs", [True, False])
def test_experts_run_without_a_wait_near_the_same_layer_on_a_cpu(exact: bool, graphs: bool) -> None:
    """The reference's operands are the same bytes; products differ as folded ones may, see `test_gpu_folded`."""
    torch.manual_seed(0)
    model, x = GroupedExperts(experts=5).eval(), torch.randn(40, 64).bfloat16()
    recipe = micromix.calibrate(model, [x], QUICK, progress=False)
    there: Any = copy.deepcopy(model).cuda()
    options = {"recipe": recipe, "exact": exact, "triton.cudagraphs": graphs}
    fast = torch.compile(there, backend="micromix", options=options)
    with torch.no_grad():
        want = torch.compile(model, backend="micromix", options={"recipe": recipe, "exact": True})(x)
        tokens = x.cuda()
        for _ in range(3):  # the third replays what the second recorded
            got = fast(tokens).clone()
        with waits_refused():
            again = fast(tokens).clone()
        assert torch.equal(again, got)
        assert sum(name.startswith("grouped_") for name in launches(fast, tokens)) == 2
    assert (got.cpu() - want).float().norm() < 0.02 * want.float().norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("exact", [True, False])
def test_a_model_of_experts_runs_compiled_and_packed(name: str, exact: bool) -> None:
    """Rounding to bfloat16 in another order moves a value to the next code, or a token to another expert."""
    model, tokens = model_of_experts(name, torch.bfloat16).cuda(), torch.randint(0, 96, (2, 24), device="cuda")
    recipe = micromix.calibrate(model, [tokens], QUICK, progress=False)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    with torch.no_grad():
        want = packed(tokens).logits.float()
        for compiled in (
            torch.compile(model, backend="micromix", options={"recipe": recipe, "exact": exact}),
            torch.compile(packed, backend="micromix", options={"exact": exact}),
        ):
            assert (compiled(tokens).logits.float() - want).norm() < 0.1 * want.norm()


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_generate_runs_experts_quantized_though_it_batches_their_products(name: str) -> None:
    """To decode on a GPU transformers takes each token's matrices out by index and calls `torch.bmm`."""
    model, tokens = model_of_experts(name, torch.bfloat16).cuda(), torch.randint(3, 96, (2, 24), device="cuda")
    recipe = micromix.calibrate(model, [tokens], QUICK, progress=False)
    model.compile(backend="micromix", options={"recipe": recipe, "strict": True})

    def generate() -> None:
        model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)

    generate()  # compiles
    assert sum(name.startswith("grouped_") for name in launches(generate)) == 2 * 4

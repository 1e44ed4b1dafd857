"""On a GPU the same operations run as plain PyTorch until there are kernels: the same bytes, said in the log."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from models import make_net
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile import backend as backend_module
from micromix_compile import ops

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fp6", ["e2m3", "e3m2"])
@pytest.mark.parametrize("scale_rounding", ["rceil", "floor", "even"])
def test_quantized_bytes_equal_those_of_the_cpu(dtype: torch.dtype, fp6: str, scale_rounding: str) -> None:
    x = (torch.randn(33, 250) * torch.exp(6 * torch.randn(250))).to(dtype)
    x[3, 7], x[5, 11], x[6] = float("nan"), float("inf"), 0.0
    perm = torch.cat((torch.full((6,), -1), torch.randperm(250))).int()
    layout = (96, 96, 64, fp6, scale_rounding)
    on_cpu = ops.reorder_quantize(x, perm, *layout)
    on_gpu = ops.reorder_quantize(x.cuda(), perm.cuda(), *layout)
    for cpu, gpu in zip(on_cpu, on_gpu, strict=True):
        assert torch.equal(cpu, gpu.cpu())


def test_a_model_calibrates_and_runs_on_the_gpu_and_says_how(caplog: pytest.LogCaptureFixture) -> None:
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
    backend_module._said.clear()
    with caplog.at_level(logging.WARNING, "micromix_compile"), torch.no_grad():
        expected = torch.compile(net, backend="micromix", options={"recipe": recipe})(x)
        actual = torch.compile(on_gpu, backend="micromix", options={"recipe": recipe})(x.cuda()).cpu()
    # A producer may differ by an ulp between devices and move a code; a wrong weight or order moves everything.
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().max()
    assert "plain PyTorch operations on cuda" in caplog.text
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match="strict=True"):
        torch.compile(on_gpu, backend="micromix", options={"recipe": recipe, "strict": True})(x.cuda())


def test_packed_modules_move_between_devices() -> None:
    net = make_net(layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 5, 64)]))
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        expected = packed(x)
        actual = packed.cuda()(x.cuda()).cpu()
    assert (actual - expected).abs().mean() <= 1e-3 * expected.abs().max()
    assert packed.layers[0].gate.order.channel_perm is packed.layers[0].up.order.channel_perm

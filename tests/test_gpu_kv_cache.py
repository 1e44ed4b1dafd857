"""The cache of bytes on a GPU: what a CPU writes and reads, CUDA graphs, generation, a cache that is full."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.gpu import launches, waits_refused
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

import micromix_compile as micromix
from micromix_compile.numerics.kv_cache import CACHE_FORMATS, dequantize_kv
from micromix_compile.ops import write_kv

if TYPE_CHECKING:
    from torch import Tensor

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("fresh_compiler")]

HEADS, WIDTH, LENGTH, PROMPT = 2, 64, 64, 12


def model(dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    config = LlamaConfig(
        hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=HEADS,
        vocab_size=96, max_position_embeddings=LENGTH,
    )  # fmt: skip
    return LlamaForCausalLM(config).to(dtype).eval()


def prompt() -> Tensor:
    return torch.randint(0, 96, (3, PROMPT), generator=torch.Generator().manual_seed(1)).cuda()


def quantized(net: LlamaForCausalLM, cache_format: str = "fp8") -> micromix.QuantizedStaticCache:
    """A cache that has its memory, as CUDA graphs want."""
    cache = micromix.QuantizedStaticCache(net.config, LENGTH, cache_format=cache_format)
    cache.early_initialization(3, HEADS, WIDTH, net.dtype, net.device)
    return cache


@pytest.mark.parametrize("block_size", [64, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_compiled_code_reads_every_code_with_every_scale_as_eager_cpu_code_does(
    dtype: torch.dtype, block_size: int
) -> None:
    """Subnormal codes are float32 subnormals on the way: nothing may flush them."""
    codes = torch.arange(256, dtype=torch.uint8)
    q = torch.where((codes & 0x7F) == 0x7F, 0, codes).view(1, 1, 1, 256).repeat(1, 1, 256, 1)
    scale = torch.arange(256, dtype=torch.uint8).view(1, 1, 256, 1).repeat(1, 1, 1, 256 // block_size)
    got = torch.compile(dequantize_kv, fullgraph=True)(q.cuda(), scale.cuda(), dtype).cpu()
    want = dequantize_kv(q, scale, dtype)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.nan_to_num(), want.nan_to_num())


@pytest.mark.parametrize("backend", ["inductor", "micromix"])
@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_steps_in_cuda_graphs_write_what_eager_ones_write_without_a_wait(backend: str, cache_format: str) -> None:
    """In float32, where compiled and eager code differ by little."""
    net = model(torch.float32).cuda()
    options: dict[str, Any] = {"triton.cudagraphs": True}
    if backend == "micromix":
        config = micromix.MicroMixConfig(policy="mxfp8", weight_rounding="nearest", scale_search=False)
        micromix.quantize_(net, micromix.calibrate(net, [prompt()], config, progress=False))
    fast = torch.compile(net, backend=backend, fullgraph=True, options=options)
    cache, eager = quantized(net, cache_format), quantized(net, cache_format)
    token = prompt()[:, -1:].clone()
    position = torch.full_like(token, PROMPT)

    def step(run: Any, into: Any) -> Tensor:
        logits: Tensor = run(input_ids=token, past_key_values=into, position_ids=position).logits
        return logits

    with torch.no_grad():
        net(input_ids=prompt(), past_key_values=cache)
        net(input_ids=prompt(), past_key_values=eager)
        for _ in range(3):  # the third replays what the second recorded
            got = step(fast, cache).clone()
        with waits_refused():
            got = step(fast, cache).clone()
        for _ in range(4):
            want = step(net, eager)
        assert (got - want).norm() < 1e-3 * want.norm()
        assert int(cache.get_seq_length()) == int(eager.get_seq_length()) == PROMPT + 4
        assert sum(name.startswith("write_kv_kernel") for name in launches(step, fast, cache)) == 2


@pytest.mark.parametrize("cache_format", CACHE_FORMATS)
def test_generation_compiles_by_itself_and_is_near_transformers_cache(cache_format: str) -> None:
    """transformers compiles steps of caches that say they can be, with CUDA graphs."""
    net = model().cuda()
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "output_logits": True}
    options |= {"return_dict_in_generate": True}
    cache = micromix.QuantizedStaticCache(net.config, LENGTH, cache_format=cache_format)
    got = net.generate(prompt(), past_key_values=cache, **options)
    want = net.generate(prompt(), past_key_values=StaticCache(net.config, LENGTH), **options)
    assert torch.equal(got.logits[0], want.logits[0])
    assert (got.logits[1] - want.logits[1]).float().norm() < 0.1 * want.logits[1].float().norm()


FULL = """
import torch
from micromix_compile.ops import write_kv
x = torch.randn(1, 1, 1, 32, device="cuda")
q, scale = (torch.zeros(1, 1, 4, n, dtype=torch.uint8, device="cuda") for n in (32, 1))
write_kv(x, x, torch.tensor([4], device="cuda"), q, scale, q.clone(), scale.clone(), "fit")
torch.cuda.synchronize()
"""


def test_a_token_behind_the_end_is_a_device_side_assertion() -> None:
    done = subprocess.run([sys.executable, "-c", FULL], capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "a position is outside the cache" in done.stdout + done.stderr
    assert "device-side assert" in done.stderr


def test_many_rows_are_the_bytes_of_a_cpu() -> None:
    key, value = torch.randn(4, 2048, 8, 128).transpose(1, 2).bfloat16(), torch.randn(4, 8, 2048, 128).bfloat16()
    position = torch.randperm(2048)
    held = [torch.zeros(4, 8, 2048, last, dtype=torch.uint8) for last in (128, 4, 128, 1)]
    there = [part.cuda() for part in held]
    write_kv(key, value, position, *held, "fit")
    write_kv(key.cuda(), value.cuda(), position.cuda(), *there, "fit")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(held, there, strict=True))

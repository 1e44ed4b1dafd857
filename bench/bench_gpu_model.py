"""Whole models on a GPU: tokens and logits against the eager packed model, launches of a decoder layer beside BF16's.

    python bench/bench_gpu_model.py [--part smollm2-tokens|smollm2-launches|llama-8b] [--tokens 64] [--json FILE]

smollm2 is the default model with real weights: greedy tokens of the compiled model, with a static cache, must be those
of the eager packed model, which runs the same kernels one by one. llama-8b has Llama-3.1-8B's shape and random weights,
made on the device. Nothing is timed here but the first call.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

import micromix_compile as micromix
from micromix_compile import texts, zoo
from micromix_compile.evaluation import hardware, versions
from micromix_compile.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

CUDA = torch.device("cuda")


def launches(run: Callable[[], object]) -> Counter[str]:
    """Kernels that `run` launches, by kind."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run()
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if event.device_type.name == "CUDA"]
    return Counter(kind(name) for name in names if not name.startswith(("Memcpy", "Memset")))


def kind(name: str) -> str:
    """What a kernel is, from its name."""
    for part, meaning in (
        ("reorder_quantize", "quantize"),
        ("mixed_mx_mm", "mixed matmul"),
        ("triton_", "other Triton"),
    ):
        if part in name:
            return meaning
    return "attention" if any(word in name.lower() for word in ("flash", "fmha", "attention")) else "library"


def first_call(run: Callable[[], object]) -> float:
    """Seconds of a call that compiles."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def compare_launches(model: nn.Module, recipe: micromix.Recipe, ids: Tensor) -> dict[str, Any]:
    """Launches per decoder layer of the BF16 compile and of ours, for one forward pass without a cache."""
    layers = model.config.num_hidden_layers
    result: dict[str, Any] = {}
    logits: Tensor | None = None
    for name, keywords in (("inductor", {}), ("micromix", {"options": {"recipe": recipe, "strict": True}})):
        torch._dynamo.reset()
        fast = torch.compile(model, backend=name, **keywords)
        seconds = first_call(lambda fast=fast: fast(ids, use_cache=False))
        counts = launches(lambda fast=fast: fast(ids, use_cache=False))
        result[name] = {
            "first_call_s": round(seconds, 1),
            "launches": dict(counts),
            "per_layer": round(sum(counts.values()) / layers, 2),
        }
        logits = fast(ids, use_cache=False).logits
    torch._dynamo.reset()
    assert logits is not None, "both backends ran"
    expected = micromix.quantize_(model, recipe)(ids, use_cache=False).logits
    span = (expected.max() - expected.min()).item()
    result["logits_mean_difference_of_range"] = (logits - expected).abs().mean().item() / span
    result["logits_top1_agreement"] = (logits.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return result


def greedy(model: nn.Module, ids: Tensor, tokens: int) -> Tensor:
    """Greedy continuation with a static cache."""
    output: Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static",
        disable_compile=True, pad_token_id=0,
    )  # fmt: skip
    return output[0, ids.shape[1] :]


def default_model(dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor, micromix.Recipe]:
    """The default model on the GPU, its tokenizer, eight calibration windows, and the recipe from them."""
    model, tokenizer = zoo.load_model(dtype=dtype, device=CUDA, progress=False)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 8).to(CUDA)
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    return model, tokenizer, windows, micromix.calibrate(model, batches, progress=False)


def smollm2_tokens(tokens: int) -> dict[str, Any]:
    """Greedy tokens of the default model in float32, compiled and eager. In bfloat16 an ulp may move an MX code."""
    model, tokenizer, _, recipe = default_model(torch.float32)
    ids = tokenizer("The most surprising thing about the ocean is", return_tensors="pt").input_ids.to(CUDA)
    expected = greedy(micromix.quantize_(copy.deepcopy(model), recipe), ids, tokens)
    model.forward = torch.compile(model.forward, backend="micromix", options={"recipe": recipe, "strict": True})
    seconds = first_call(lambda: greedy(model, ids, tokens))
    actual = greedy(model, ids, tokens)
    same = int((actual == expected).int().cumprod(0).sum())
    return {"equal_tokens": f"{same} of {tokens}", "first_call_s": round(seconds, 1), "text": tokenizer.decode(actual)}


def smollm2_launches(_: int) -> dict[str, Any]:
    """Launches of the default model in bfloat16."""
    model, _, windows, recipe = default_model(torch.bfloat16)
    return compare_launches(model, recipe, windows[:1])


def llama_8b(_: int) -> dict[str, Any]:
    """Llama-3.1-8B's shape, random bfloat16 weights."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, num_key_value_heads=8,
        vocab_size=128256, max_position_embeddings=8192, rope_theta=500000.0,
    )  # fmt: skip
    with CUDA:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    batches = [torch.randint(0, config.vocab_size, (1, 512), device=CUDA) for _ in range(2)]
    start = time.perf_counter()
    recipe = micromix.calibrate(model, [{"input_ids": ids, "use_cache": False} for ids in batches], progress=False)
    seconds = time.perf_counter() - start
    before = torch.cuda.memory_allocated()
    result = {"calibration_s": round(seconds, 1), **compare_launches(model, recipe, batches[0])}
    torch._dynamo.reset()
    result["weights_gib"] = {"bf16": before / 2**30, "packed": torch.cuda.memory_allocated() / 2**30}
    return result


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "smollm2-tokens": smollm2_tokens,
    "smollm2-launches": smollm2_launches,
    "llama-8b": llama_8b,
}


def main() -> None:
    """Run, print a table, and optionally write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; all by default")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "target": target_of(CUDA).name}
    with torch.inference_mode():
        for part in arguments.part or PARTS:
            results[part] = PARTS[part](arguments.tokens)
    table = Table("model", "backend", "launches a layer", "of them", "first call", title=results["target"])
    for name in {"smollm2-launches", "llama-8b"} & results.keys():
        for backend in ("inductor", "micromix"):
            row = results[name][backend]
            parts = ", ".join(f"{count} {what}" for what, count in sorted(row["launches"].items()))
            table.add_row(name, backend, str(row["per_layer"]), parts, f"{row['first_call_s']} s")
    Console().print(table)
    print(json.dumps(results, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

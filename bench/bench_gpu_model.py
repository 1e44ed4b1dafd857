"""Whole models on a GPU: tokens and logits against the eager packed model, launches, speed and memory beside BF16, FP8.

    python bench/bench_gpu_model.py [--part PART] [--tokens 64] [--contender NAME] [--batch B]
                                     [--cache LENGTH] [--length TOKENS] [--mode MODE] [--json FILE]

smollm2 is the default model with real weights: greedy tokens of the compiled model, with a static cache, beside those
of the eager packed model, in float32 and in bfloat16, which sm_90 folds where it is compiled only.
llama-8b has Llama-3.1-8B's shape, random weights made on the device, and 75/20/5 of its channels in MXFP4, 6 and 8:
launches a layer, a forward pass of 2,048 tokens, decoding with a static cache in a CUDA graph, memory. lengths are 8
layers of it, a forward pass of 64 to 8,192 tokens in CUDA graphs. FP8 there is rows of E4M3 with a scale each,
quantized by Inductor's code, on both sides. Every part prints its results when it is done.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from fp8_linears import with_fp8_linears
from launch_counts import launches
from llama_8b import (
    CONTENDERS,
    CUDA,
    LENGTHS,
    MAX_LENGTH,
    contender_of,
    first_call,
    forward_ms,
    forward_ms_by_length,
    median_ms,
    print_lengths,
    random_llama_8b,
    random_llama_8b_and_recipe,
)
from rich.console import Console
from rich.table import Table
from torch import nn
from transformers import StaticCache

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PROMPT, STEPS = 128, 24
SHORTEST_CACHE = PROMPT + 4 + STEPS + 5 * 8 + 1
"""Tokens of a prompt, and of all steps of `decode_ms` behind it."""

AS_EAGER = {"fallback_by_default": True, "exact": True}
"""All operations but ours are called as eager does, and ours are those of the eager packed model."""


class Arguments(argparse.Namespace):
    """The command line."""

    part: list[str] | None
    tokens: int
    contender: list[str] | None
    batch: list[int] | None
    cache: int
    length: list[int] | None
    mode: str
    json: Path | None


def decode_ms(model: nn.Module, keywords: dict[str, Any], batch: int, cache_length: int) -> dict[str, Any]:
    """Milliseconds of one decoding step behind 128 tokens, replayed as a CUDA graph, and what the GPU is at in it.

    cache_length: of a static cache, all of which attention reads, whatever is in it. waiting: each step is waited for
    before the next is launched, as sampling on the host does. queued: none is.
    """
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=cache_length)
    model(torch.randint(0, 1000, (batch, PROMPT), device=CUDA), past_key_values=cache, logits_to_keep=1)
    fast = torch.compile(model, **keywords)
    token = torch.randint(0, 1000, (batch, 1), device=CUDA)
    position = torch.full((batch, 1), PROMPT, device=CUDA)

    def step() -> None:
        fast(token, past_key_values=cache, position_ids=position, logits_to_keep=1)
        position.add_(1)

    seconds = first_call(step)
    for _ in range(3):  # records
        step()
    waiting = median_ms(step, STEPS)
    queued = median_ms(lambda: [step() for _ in range(8)], 5) / 8
    counts, busy = launches(step)
    return {
        "waiting": waiting,
        "queued": queued,
        "tokens_per_s": 1000 * batch / queued,
        "first_call_s": seconds,
        "launches": dict(counts),
        "gpu_ms": busy,
    }


def compare_launches(
    model: nn.Module, recipe: micromix.Recipe, ids: Tensor, mode: str, **inputs: int
) -> dict[str, Any]:
    """Launches per decoder layer of the BF16 compile and of ours for one forward pass without a cache, and its time.

    inputs: of the forward pass, beside the tokens.
    """
    layers = model.config.num_hidden_layers
    result: dict[str, Any] = {}
    logits: Tensor | None = None
    ours = {"recipe": recipe, "strict": True, "mode": mode}
    for name, keywords in (("inductor", {"mode": mode}), ("micromix", {"options": ours})):
        torch.compiler.reset()
        fast = torch.compile(model, backend=name, **keywords)
        seconds = first_call(lambda fast=fast: fast(ids, use_cache=False, **inputs))
        fast(ids, use_cache=False, **inputs)  # records, where there are CUDA graphs
        forward = median_ms(lambda fast=fast: fast(ids, use_cache=False, **inputs), 5)
        counts, busy = launches(lambda fast=fast: fast(ids, use_cache=False, **inputs))
        result[name] = {
            "first_call_s": round(seconds, 1),
            "forward_ms": forward,
            "launches": dict(counts),
            "per_layer": round(sum(counts.values()) / layers, 2),
            "gpu_ms": busy,
        }
        logits = fast(ids, use_cache=False, **inputs).logits.clone()
    torch.compiler.reset()
    assert logits is not None, "both backends ran"
    expected = micromix.quantize_(model, recipe)(ids, use_cache=False, **inputs).logits
    result["logits beside eager's"] = difference(logits, expected)
    return result


def greedy(model: nn.Module, ids: Tensor, tokens: int) -> Tensor:
    """Greedy continuation with a static cache."""
    output: Tensor = model.generate(
        ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, cache_implementation="static",
        disable_compile=True, pad_token_id=0,
    )  # fmt: skip
    return output[0, ids.shape[1] :]


def default_model(dtype: torch.dtype) -> tuple[nn.Module, Any, Tensor, micromix.Recipe]:
    """The default model on the GPU, its tokenizer, the calibration windows, and the recipe from them."""
    model, tokenizer = zoo.load_model(dtype=dtype, device=CUDA, progress=False)
    windows = texts.token_windows(texts.load_texts().calibration, tokenizer, 32).to(CUDA)
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    return model, tokenizer, windows, micromix.calibrate(model, batches, progress=False)


def smollm2_tokens(arguments: Arguments, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Greedy tokens of the default model, compiled and eager, and how far logits behind the same tokens differ.

    Norms and activations summed in another order differ by an ulp, which may move an MX code. So the model is compiled
    twice, with all but the linears called as eager does and as usual; and eager runs again, its embeddings so changed.
    """
    tokens, start = arguments.tokens, time.perf_counter()

    def say(what: str) -> None:
        print(f"{time.perf_counter() - start:6.1f} s  {what}", flush=True)

    model, tokenizer, _, recipe = default_model(dtype)
    model.set_attn_implementation("eager")  # its SDPA gets a mask where it is compiled only, and so another kernel
    say("calibrated")
    ids = tokenizer("The most surprising thing about the ocean is", return_tensors="pt").input_ids.to(CUDA)
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    expected = greedy(packed, ids, tokens)
    say(f"eager: {tokenizer.decode(expected)!r}")
    text = torch.cat((ids[0], expected))[None]
    logits = packed(text, use_cache=False).logits
    result: dict[str, Any] = {"eager": tokenizer.decode(expected)}
    forward = model.forward
    for name, options in (("as eager", AS_EAGER), ("fused", {})):
        torch.compiler.reset()
        model.forward = torch.compile(
            forward, backend="micromix", options={"recipe": recipe, "strict": True, **options}
        )
        actual = greedy(model, ids, tokens)
        same = int((actual == expected).int().cumprod(0).sum())
        result[name] = {"equal_tokens": f"{same} of {tokens}", "text": tokenizer.decode(actual)}
        say(f"compiled, {name}: {result[name]}")
        result[name] |= difference(model(text, use_cache=False).logits, logits)
        say(f"compiled, {name}, behind the same tokens: {result[name]}")
    packed.get_input_embeddings().register_forward_hook(lambda _, __, x: some_an_ulp_off(x))
    result["eager, some of the embeddings an ulp off"] = difference(packed(text, use_cache=False).logits, logits)
    return result


def some_an_ulp_off(x: Tensor) -> Tensor:
    """Every second value, at random, an ulp or so larger: if all were, the first norm would take it out again."""
    return torch.where(torch.rand_like(x) < 0.5, x, x * (1 + torch.finfo(x.dtype).eps))


def difference(actual: Tensor, expected: Tensor) -> dict[str, float]:
    """Of logits, as a part of their range, and how often the likeliest token is the same."""
    error = (actual - expected).float().abs() / (expected.max() - expected.min()).item()
    agreement = (actual.argmax(-1) == expected.argmax(-1)).float().mean().item()
    return {"mean": error.mean().item(), "largest": error.max().item(), "top1_agreement": agreement}


def smollm2_tokens_bf16(arguments: Arguments) -> dict[str, Any]:
    """The same in bfloat16."""
    return smollm2_tokens(arguments, torch.bfloat16)


def smollm2_launches(arguments: Arguments) -> dict[str, Any]:
    """Launches of the default model in bfloat16."""
    model, _, windows, recipe = default_model(torch.bfloat16)
    return compare_launches(model, recipe, windows[:1], arguments.mode)


def llama_8b_calibration(_: Arguments) -> dict[str, Any]:
    """Calibration with everything at its default: 32 windows of 512 tokens, here random ones."""
    model = random_llama_8b()
    windows = torch.randint(0, model.config.vocab_size, (32, 512), device=CUDA)
    batches = [{"input_ids": window[None], "use_cache": False} for window in windows]
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    recipe = micromix.calibrate(model, batches)
    seconds = time.perf_counter() - start
    peak = torch.cuda.max_memory_allocated() / 2**30
    return {"seconds": round(seconds, 1), "peak_gib": round(peak, 1), "element_bits": recipe.element_bits}


def llama_8b(arguments: Arguments) -> dict[str, Any]:
    """The 8B shape: launches and time of a forward pass of 2,048 tokens, logits of the last only, as in `generate`."""
    model, recipe, ids = random_llama_8b_and_recipe()
    fp8 = with_fp8_linears(copy.deepcopy(model))
    result = compare_launches(model, recipe, ids, arguments.mode, logits_to_keep=1)  # packs the model
    return result | {"fp8_forward_ms": forward_ms(fp8, ids, mode=arguments.mode)}


def llama_8b_decode(arguments: Arguments) -> dict[str, Any]:
    """The 8B shape: decoding. The first contender of a process pays for the start of Inductor's workers, too."""
    model, recipe, _ = random_llama_8b_and_recipe()
    contenders = {name: contender_of(name, model, recipe) for name in arguments.contender or CONTENDERS}
    result: dict[str, Any] = {}
    for batch in arguments.batch or (1, 16):
        for name, (contender, keywords) in contenders.items():
            key = f"{name}, batch {batch}"
            result[key] = decode_ms(contender, keywords, batch, arguments.cache)
            print(key, json.dumps(result[key]), flush=True)
    return result


def lengths(arguments: Arguments) -> dict[str, Any]:
    """The 8B shape, 8 layers: a forward pass by the prompt's length."""
    names = arguments.contender or ("micromix-fp8", "micromix-fp8-kept", "fp8", "bf16")
    found = forward_ms_by_length(8, arguments.length or LENGTHS, names)
    print_lengths(found, Console(width=None if sys.stdout.isatty() else 160))
    return dict(found)


def llama_8b_memory(_: Arguments) -> dict[str, Any]:
    """The 8B shape: memory of the weights, and peak of a forward pass of 2,048 tokens, GiB."""
    model, recipe, ids = random_llama_8b_and_recipe()
    result = {"bf16, weights": torch.cuda.memory_allocated() / 2**30}
    result["bf16, peak"] = peak_gib(lambda: model(ids, use_cache=False, logits_to_keep=1))
    micromix.quantize_(model, recipe)
    result["micromix, weights"] = torch.cuda.memory_allocated() / 2**30
    fast = torch.compile(model, backend="micromix")
    result["micromix, peak of the first call"] = peak_gib(lambda: fast(ids, use_cache=False, logits_to_keep=1))
    result["micromix, weights and what is kept of them"] = torch.cuda.memory_allocated() / 2**30
    result["micromix, peak"] = peak_gib(lambda: fast(ids, use_cache=False, logits_to_keep=1))
    kept = torch.compile(model, backend="micromix", options={"keep_expanded": True})
    kept(ids, use_cache=False, logits_to_keep=1)
    result["micromix, weights kept expanded, too"] = torch.cuda.memory_allocated() / 2**30
    return result | {"ratio of peaks": result["micromix, peak"] / result["bf16, peak"]}


def peak_gib(run: Callable[[], object]) -> float:
    """Largest memory that tensors take while `run` runs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() / 2**30


PARTS: dict[str, Callable[[Arguments], dict[str, Any]]] = {
    "smollm2-tokens": smollm2_tokens,
    "smollm2-tokens-bf16": smollm2_tokens_bf16,
    "smollm2-launches": smollm2_launches,
    "llama-8b-calibration": llama_8b_calibration,
    "llama-8b": llama_8b,
    "llama-8b-decode": llama_8b_decode,
    "llama-8b-memory": llama_8b_memory,
    "lengths": lengths,
}


def main() -> None:
    """Run, print a table, and optionally write everything as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--part", choices=PARTS, action="append", help="may be repeated; all by default")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument(
        "--contender", choices=CONTENDERS, action="append", help="of decoding and lengths; may be repeated"
    )
    parser.add_argument("--batch", type=int, action="append", help="of decoding; may be repeated, 1 and 16 by default")
    parser.add_argument("--cache", type=int, default=256, metavar="LENGTH", help="tokens of the cache in decoding")
    parser.add_argument("--length", type=int, action="append", metavar="TOKENS", help="of prompts; may be repeated")
    parser.add_argument("--mode", choices=("default", "reduce-overhead"), default="default", help="of a forward pass")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(namespace=Arguments())
    if arguments.cache < SHORTEST_CACHE:
        parser.error(
            f"--cache must hold {PROMPT} tokens and those decoded, {SHORTEST_CACHE} together, got {arguments.cache}"
        )
    if not all(1 <= length <= MAX_LENGTH for length in arguments.length or ()):
        parser.error(f"--length must be from 1 to {MAX_LENGTH}, got {arguments.length}")
    results: dict[str, Any] = {"hardware": hardware(), "versions": versions(), "target": target_of(CUDA).name}
    with torch.no_grad():
        for part in arguments.part or PARTS:
            torch.compiler.reset()
            torch.cuda.empty_cache()
            results[part] = PARTS[part](arguments)
            print(part, json.dumps(results[part], indent=2), flush=True)
    table = Table("model", "backend", "launches a layer", "of them", "first call", "forward", title=results["target"])
    for name in [part for part in ("smollm2-launches", "llama-8b") if part in results]:
        for backend in ("inductor", "micromix"):
            row = results[name][backend]
            parts = ", ".join(f"{count} {what}" for what, count in sorted(row["launches"].items()))
            times = f"{row['first_call_s']} s", f"{row['forward_ms']:.2f} ms"
            table.add_row(name, backend, str(row["per_layer"]), parts, *times)
    if table.row_count:
        Console(width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=2))


if __name__ == "__main__":
    main()

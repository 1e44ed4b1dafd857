"""Models of Llama-3.1-8B's shape with random weights, compiled by each contender, and how long their calls take."""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING, Any, Final

import torch
from fp8_linears import with_fp8_linears
from rich.table import Table
from shares import with_activations, with_shares
from transformers import AutoModelForCausalLM, LlamaConfig

import micromix_compile as micromix

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console
    from torch import Tensor, nn

CUDA: Final = torch.device("cuda")

CONTENDERS: Final = (
    "micromix", "micromix-fp8", "micromix-fp8-rotated", "micromix-fp8-kept", "fp8", "bf16-max-autotune", "bf16",
)  # fmt: skip

MAX_LENGTH: Final = 8192
"""Positions of the model."""

LENGTHS: Final = tuple(2**i for i in range(6, 14))
"""Of prompts: 64 to 8,192 tokens."""


def first_call(run: Callable[[], object]) -> float:
    """Seconds of a call that compiles."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Of the calls' times on the GPU; `run` is warm."""
    times = []
    for _ in range(repeats):
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def random_llama_8b(layers: int = 32) -> nn.Module:
    """Llama-3.1-8B's shape, random bfloat16 weights."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=layers, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=128256, max_position_embeddings=MAX_LENGTH, rope_theta=500000.0,
    )  # fmt: skip
    with CUDA:
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return model


def random_llama_8b_and_recipe(layers: int = 32) -> tuple[nn.Module, micromix.Recipe, Tensor]:
    """The model, a recipe of the usual shares, and 2,048 tokens."""
    model = random_llama_8b(layers)
    ids = torch.randint(0, model.config.vocab_size, (1, 2048), device=CUDA)
    plain = micromix.MicroMixConfig(policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False)
    recipe = micromix.calibrate(model, [{"input_ids": ids[:, :256], "use_cache": False}], plain, progress=False)
    return model, with_shares(recipe, (0.75, 0.2, 0.05)), ids


def variants_of(recipe: micromix.Recipe) -> dict[str, micromix.Recipe]:
    """The recipe, whose activations are as its weights, and others of the same weights' formats."""
    fp8 = with_activations(recipe, "fp8", rotate=False)
    return {
        "micromix": recipe,
        "micromix-fp8": fp8,
        "micromix-fp8-rotated": with_activations(fp8, "fp8", rotate=True),
    }


def contender_of(name: str, model: nn.Module, recipe: micromix.Recipe) -> tuple[nn.Module, dict[str, Any]]:
    """What a contender of `CONTENDERS` makes of the model, and what `torch.compile` then takes, with CUDA graphs.

    All but BF16 are copies.
    """
    if name.startswith("micromix"):
        packed = micromix.quantize_(copy.deepcopy(model), variants_of(recipe)[name.removesuffix("-kept")])
        options = {"mode": "reduce-overhead", "keep_expanded": name.endswith("-kept")}
        return packed, {"backend": "micromix", "options": options}
    if name == "fp8":
        return with_fp8_linears(copy.deepcopy(model)), {"mode": "reduce-overhead"}
    return model, {"mode": "max-autotune" if name == "bf16-max-autotune" else "reduce-overhead"}


def forward_ms(model: nn.Module, ids: Tensor, **keywords: Any) -> float:
    """Milliseconds of a forward pass without a cache, logits of the last token only. keywords: of `torch.compile`."""
    torch.compiler.reset()
    fast = torch.compile(model, **keywords)
    for _ in range(5):  # compiles; records, where there are CUDA graphs; warms up
        fast(ids, use_cache=False, logits_to_keep=1)
    return median_ms(lambda: fast(ids, use_cache=False, logits_to_keep=1), 20)


def forward_ms_by_length(layers: int, lengths: Sequence[int], names: Sequence[str]) -> dict[str, dict[int, float]]:
    """`forward_ms` of prompts of each length by each contender.

    Each length is compiled for itself: what serves a product is known then, as where lengths come in buckets.
    """
    model, recipe, _ = random_llama_8b_and_recipe(layers)
    ids = torch.randint(0, model.config.vocab_size, (1, max(lengths)), device=CUDA)
    found: dict[str, dict[int, float]] = {}
    for name in names:
        compiled, keywords = contender_of(name, model, recipe)
        found[name] = {}
        for length in lengths:
            ms = found[name][length] = forward_ms(compiled, ids[:, :length].clone(), **keywords)
            print(f"{name}, {length} tokens: {ms:.3f} ms", flush=True)
    return found


def print_lengths(found: Mapping[str, Mapping[int, float]], console: Console) -> None:
    """ms of each contender by length, and in brackets how many times as fast the first is."""
    first, *others = found
    table = Table("tokens", first, *others, title=f"ms of a forward pass (times as fast {first} is)")
    for length, ms in found[first].items():
        beside = (f"{found[name][length]:.3f} ({found[name][length] / ms:.2f})" for name in others)
        table.add_row(str(length), f"{ms:.3f}", *beside)
    console.print(table)

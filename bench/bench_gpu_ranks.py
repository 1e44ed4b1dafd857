"""Tensor parallelism by transformers: a packed model on one rank and on several, in CUDA graphs.

    python bench/bench_gpu_ranks.py [--ranks 1 2] [--layers 32] [--batch 1 64] [--mode MODE] [--json FILE]

Llama-3.1-8B's shape, random weights, 75/20/5 of the channels in MXFP4, 6 and 8, activations in FP8. It is packed and
saved once, for as many shards as the most ranks; each number of ranks loads that in processes of its own. Printed: time
of loading and memory of a rank, a forward pass of 2,048 tokens, tokens/s of decoding behind 128 tokens. --tiny, on a
CPU with gloo, shows that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table
from shares import with_activations, with_shares
from transformers import AutoModelForCausalLM, LlamaConfig, StaticCache
from transformers.distributed import DistributedConfig

import micromix_compile as micromix
from micromix_compile.evaluation.machine import hardware, versions

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

PROMPT: Final = 128
STEPS: Final = 32
REPEATS: Final = 5
LLAMA_8B: Final = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256,
}  # fmt: skip
TINY: Final = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip


class Arguments(argparse.Namespace):
    """The command line. worker: the checkpoint, in the processes that this script starts."""

    ranks: list[int]
    layers: int
    batch: list[int]
    length: int
    mode: str
    tiny: bool
    json: Path | None
    worker: Path | None


def device() -> torch.device:
    """Of this process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))


def wait() -> None:
    """For the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(run: Callable[[], object]) -> float:
    """Of one call, to its end on the GPU."""
    wait()
    start = time.perf_counter()
    run()
    wait()
    return time.perf_counter() - start


def make_checkpoint(directory: Path, arguments: Arguments) -> None:
    """A packed model of random weights, in as many shards as the most ranks."""
    sizes = TINY if arguments.tiny else LLAMA_8B
    config = LlamaConfig(**sizes, num_hidden_layers=arguments.layers, max_position_embeddings=8192, rope_theta=500000.0)
    with device():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    ids = torch.randint(0, config.vocab_size, (1, 256), device=device())
    plain = micromix.MicroMixConfig(
        policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False, shards=max(arguments.ranks)
    )
    recipe = micromix.calibrate(model, [{"input_ids": ids, "use_cache": False}], plain, progress=False)
    recipe = with_activations(with_shares(recipe, (0.75, 0.2, 0.05)), "fp8", rotate=False)
    micromix.quantize_(model, recipe).save_pretrained(directory)


def measure(arguments: Arguments) -> dict[str, Any]:
    """Of this rank, all of which do the same at the same time."""
    assert arguments.worker is not None, "a worker has a checkpoint"
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    dealt = {"distributed_config": DistributedConfig(tp_plan="auto")} if ranks > 1 else {"device_map": str(device())}
    loaded: list[Any] = []
    result: dict[str, Any] = {"ranks": ranks}
    result["load_s"] = seconds(
        lambda: loaded.append(AutoModelForCausalLM.from_pretrained(arguments.worker, dtype=torch.bfloat16, **dealt))
    )
    model = loaded[0]
    if torch.cuda.is_available():
        result["weights_gib"] = torch.cuda.memory_allocated() / 2**30
        result["peak_of_loading_gib"] = torch.cuda.max_memory_allocated() / 2**30
    options = {"backend": "micromix", "options": {"mode": arguments.mode}}
    with torch.no_grad():
        result["prefill_ms"] = prefill_ms(model, arguments.length, options)
        for batch in arguments.batch:
            result[f"decode {batch}"] = decode(model, batch, options)
    if torch.cuda.is_available():
        result["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return result


def prefill_ms(model: Any, length: int, options: dict[str, Any]) -> float:
    """Median of a forward pass without a cache, logits of the last token only."""
    torch.compiler.reset()
    fast = torch.compile(model, **options)
    ids = torch.randint(0, model.config.vocab_size, (1, length), device=device())
    for _ in range(3):  # compiles; records, where there are CUDA graphs
        fast(ids, use_cache=False, logits_to_keep=1)
    times = sorted(seconds(lambda: fast(ids, use_cache=False, logits_to_keep=1)) for _ in range(REPEATS))
    return 1000 * times[REPEATS // 2]


def decode(model: Any, batch: int, options: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of a step, none of which is waited for, and tokens/s. All of a static cache of 256 is read."""
    torch.compiler.reset()
    cache = StaticCache(config=model.config, max_cache_len=2 * PROMPT)
    model(torch.randint(0, 500, (batch, PROMPT), device=device()), past_key_values=cache, logits_to_keep=1)
    fast = torch.compile(model, **options)
    token = torch.randint(0, 500, (batch, 1), device=device())
    position = torch.full((batch, 1), PROMPT, device=device())

    def step() -> Tensor:
        logits: Tensor = fast(token, past_key_values=cache, position_ids=position, logits_to_keep=1).logits
        position.add_(1)
        return logits

    first = seconds(step)
    for _ in range(3):
        step()
    each = seconds(lambda: [step() for _ in range(STEPS)]) / STEPS
    return {"step_ms": 1000 * each, "tokens_per_s": batch / each, "first_call_s": first}


def run_ranks(directory: Path, ranks: int, arguments: Arguments) -> dict[str, Any]:
    """What rank 0 measured; the others print nothing. NVLink multicast stays off."""
    start = [sys.executable] if ranks == 1 else [sys.executable, "-m", "torch.distributed.run"]
    start += [] if ranks == 1 else ["--standalone", f"--nproc-per-node={ranks}"]
    batches = map(str, arguments.batch)
    done = subprocess.run(
        [*start, __file__, "--worker", directory, "--mode", arguments.mode, "--length", str(arguments.length),
         "--batch", *batches],
        env={**os.environ, "NCCL_NVLS_ENABLE": "0"}, stdout=subprocess.PIPE, text=True, check=True,
    )  # fmt: skip
    line = next(line for line in done.stdout.splitlines() if line.startswith("{"))
    return dict(json.loads(line))


def print_table(results: list[dict[str, Any]], arguments: Arguments, console: Console) -> None:
    """A row a number of ranks."""
    columns = [f"decoding {batch}, tokens/s" for batch in arguments.batch]
    table = Table("ranks", "load, s", "weights a rank, GiB", f"{arguments.length} tokens, ms", *columns)
    for row in results:
        speeds = (f"{row[f'decode {batch}']['tokens_per_s']:.0f}" for batch in arguments.batch)
        memory = f"{row['weights_gib']:.2f}" if "weights_gib" in row else "-"
        table.add_row(str(row["ranks"]), f"{row['load_s']:.1f}", memory, f"{row['prefill_ms']:.2f}", *speeds)
    console.print(table)


def main() -> None:
    """Pack once, then measure each number of ranks."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 64])
    parser.add_argument("--length", type=int, default=2048, help="tokens of a forward pass")
    parser.add_argument("--mode", choices=("default", "reduce-overhead"), default="reduce-overhead")
    parser.add_argument("--tiny", action="store_true", help="a small model, for a CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(namespace=Arguments())
    if arguments.worker is not None:
        result = measure(arguments)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(result), flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        return
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        took = seconds(lambda: make_checkpoint(Path(folder), arguments))
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"packed and saved in {took:.1f} s", flush=True)
        for ranks in arguments.ranks:
            results.append(run_ranks(Path(folder), ranks, arguments))
            print(json.dumps(results[-1]), flush=True)
    print_table(results, arguments, Console(width=None if sys.stdout.isatty() else 160))
    if arguments.json:
        arguments.json.write_text(json.dumps({"hardware": hardware(), "versions": versions(), "results": results}))


if __name__ == "__main__":
    main()

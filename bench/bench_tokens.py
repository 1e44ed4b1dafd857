"""Tokens of a packed model by what runs it: transformers on one rank and on several, an exported program, a package.

    python bench/bench_tokens.py [--model DIRECTORY] [--prompts 20] [--tokens 16] [--engine NAME ...] [--json FILE]

Each greedily continues one prompt after the other, in float32, and is compared with the eager packed model: how many
continuations are equal, and where one is not, by how much eager's likeliest token is ahead of the next one there, and
how far the logits behind eager's own tokens differ. Each runs in a process of its own; ranks talk over gloo.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.evaluation import texts, zoo
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.lowering.torch_private.inductor import compile_package, load_package

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    Answers = Sequence[tuple[Tensor, Tensor]]
    """By prompt: tokens, and logits."""

ATTENTION_WHOLE: Final = {f"model.layers.*.self_attn.{name}_proj": "replicate" for name in "qkvo"}
"""A plan for ranks that do not divide the heads, of which the default model has 9 and 3."""

RANKS: Final[dict[str, tuple[int, dict[str, str]]]] = {
    "transformers, 2 ranks": (2, ATTENTION_WHOLE),
    "transformers, 3 ranks": (3, {}),
}
"""Ranks, and what they do otherwise than the model's plan says."""

PROGRAM, PACKAGE = "exported program", "package of AOTInductor"
FILES: Final = {PROGRAM: "program.pt2", PACKAGE: "package.pt2"}
ITSELF: Final = "eager, read otherwise"
"""Eager again: continuations without a cache, and the logits that it had while it generated with one."""
ENGINES: Final = (ITSELF, "transformers", *RANKS, *FILES)
SHARDS: Final = 6
LONGEST: Final = 1024


class Logits(nn.Module):
    """A model as a function of tokens: (1, T) int64 -> (1, T, V)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        """Without a cache."""
        logits: Tensor = self.model(input_ids=input_ids, use_cache=False).logits
        return logits


class Arguments(argparse.Namespace):
    """The command line. worker: an engine and a folder, in the processes that this script starts."""

    model: str
    prompts: int
    tokens: int
    engine: list[str] | None
    json: Path | None
    worker: list[str] | None


def greedy(logits: Callable[[Tensor], Tensor], prompt: Tensor, tokens: int) -> Tensor:
    """(tokens,) that follow the prompt (T,), all of which is read anew for each."""
    text = prompt
    for _ in range(tokens):
        text = torch.cat((text, logits(text[None])[0, -1:].argmax(-1)))
    return text[len(prompt) :]


def generate(model: Any, prompt: Tensor, tokens: int) -> Tensor:
    """The same with a cache, by transformers."""
    ids = prompt[None]
    output: Tensor = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :]


def answers(
    logits: Callable[[Tensor], Tensor], follow: Callable[[Tensor], Tensor], asked: Answers
) -> list[tuple[Tensor, Tensor]]:
    """For each prompt and eager's continuation: the engine's own, and its logits (tokens, V) behind eager's."""
    found = []
    for prompt, expected in asked:
        rows = logits(torch.cat((prompt, expected))[None])[0, len(prompt) - 1 : -1]
        found.append((follow(prompt), rows.clone()))
    return found


def read_otherwise(model: Any, asked: Answers) -> Answers:
    """What summing in another order does to eager itself: see `ITSELF`."""
    found, run = [], Logits(model)
    for prompt, expected in asked:
        cache, rows = None, []
        for tokens in (prompt, *expected[:-1, None]):
            output = model(input_ids=tokens[None], past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            rows.append(output.logits[0, -1])
        found.append((greedy(run, prompt, len(expected)), torch.stack(rows)))
    return found


def load(folder: Path, **options: Any) -> Any:
    """The packed model."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / "packed", dtype=torch.float32, **options)


def work(engine: str, folder: Path) -> None:
    """In a process of its own, or in several: answer, and save what came of it."""
    asked = torch.load(folder / "asked")
    tokens = len(asked[0][1])
    if engine in FILES:
        importlib.import_module("micromix_compile.ops.exact")  # registers the operations
        path = str(folder / FILES[engine])
        run: Any = torch.export.load(path).module() if engine == PROGRAM else load_package(path)
        found = answers(run, lambda prompt: greedy(run, prompt, tokens), asked)
    else:
        from transformers.distributed import DistributedConfig

        dealt = {"distributed_config": DistributedConfig(tp_plan=RANKS[engine][1] or "auto")} if engine in RANKS else {}
        model = load(folder, **dealt)
        found = answers(Logits(model), lambda prompt: generate(model, prompt, tokens), asked)
    if os.environ.get("RANK", "0") == "0":
        torch.save(found, folder / "found")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def prepare(arguments: Arguments, folder: Path, engines: Sequence[str]) -> list[tuple[Tensor, Tensor]]:
    """Pack the model, write what the engines load, and return prompts with what eager says to them."""
    model, tokenizer = zoo.load_model(arguments.model, torch.float32, progress=False)
    corpus = texts.load_texts()
    windows = texts.token_windows(corpus.calibration, tokenizer, 4, 128)
    config = micromix.MicroMixConfig(
        activations="same", shards=SHARDS, weight_rounding="nearest", scale_search=False, policy="mxfp8-anchor"
    )
    micromix.quantize_(model, micromix.calibrate(model, windows.split(1), config)).save_pretrained(folder / "packed")
    prompts = [row[: 8 + 2 * i] for i, row in enumerate(texts.token_windows(corpus.evaluation, tokenizer, 20, 64))]
    asked = [(prompt, generate(model, prompt, arguments.tokens)) for prompt in prompts[: arguments.prompts]]
    if set(FILES) & set(engines):
        length = torch.export.Dim("length", min=2, max=LONGEST)
        program = torch.export.export(Logits(model), (windows[:1, :64],), dynamic_shapes=({1: length},))
        torch.export.save(program, folder / FILES[PROGRAM])
        if PACKAGE in engines:
            compile_package(program, str(folder / FILES[PACKAGE]))
    if ITSELF in engines:
        torch.save(read_otherwise(model, asked), folder / ITSELF)
    torch.save(asked, folder / "asked")
    torch.save(answers(Logits(model), lambda prompt: prompt, asked), folder / "eager")
    return asked


def compare(
    found: Sequence[tuple[Tensor, Tensor]],
    asked: Sequence[tuple[Tensor, Tensor]],
    eager: Sequence[tuple[Tensor, Tensor]],
) -> dict[str, Any]:
    """How many continuations are equal; of each other one the step of the first other token, eager's lead of its
    likeliest token over the next one there, and the largest difference of logits in that row; and that of all rows."""
    result: dict[str, Any] = {"prompts": len(asked), "equal": 0, "differences": [], "largest": 0.0}
    for i, ((tokens, rows), (_, expected), (_, wanted)) in enumerate(zip(found, asked, eager, strict=True)):
        off = (rows - wanted).abs().amax(1)
        result["largest"] = max(result["largest"], off.max().item())
        if torch.equal(tokens, expected):
            result["equal"] += 1
            continue
        step = int((tokens == expected).int().cumprod(0).sum())
        best = wanted[step].topk(2).values
        lead = (best[0] - best[1]).item()
        result["differences"].append({"prompt": i, "step": step, "lead": lead, "off": off[step].item()})
    return result


def run(engine: str, folder: Path) -> list[tuple[Tensor, Tensor]]:
    """What an engine answers."""
    ranks = RANKS[engine][0] if engine in RANKS else 1
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *start, __file__, "--worker", engine, str(folder)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
    found: list[tuple[Tensor, Tensor]] = torch.load(folder / "found")
    return found


def main() -> None:
    """A row an engine."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default=zoo.DEFAULT_MODEL)
    parser.add_argument("--prompts", type=int, default=20, help="at most 20, of 8 to 46 tokens")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--engine", choices=ENGINES, action="append", help="may be repeated; all by default")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args(namespace=Arguments())
    torch.set_grad_enabled(False)
    if arguments.worker is not None:
        work(arguments.worker[0], Path(arguments.worker[1]))
        return
    results: dict[str, Any] = {}
    table = Table(
        "engine", "equal", "largest difference of logits", "first other token: step, eager's lead, difference"
    )
    with tempfile.TemporaryDirectory() as name:
        folder, engines = Path(name), arguments.engine or ENGINES
        with torch.enable_grad():  # calibration asks for gradients
            asked = prepare(arguments, folder, engines)
        eager = torch.load(folder / "eager")
        for engine in engines:
            found = torch.load(folder / ITSELF) if engine == ITSELF else run(engine, folder)
            one = results[engine] = compare(found, asked, eager)
            print(engine, json.dumps(one), flush=True)
            firsts = "; ".join(f"{d['step']}, {d['lead']:.1e}, {d['off']:.1e}" for d in one["differences"])
            table.add_row(engine, f"{one['equal']} of {one['prompts']}", f"{one['largest']:.1e}", firsts)
    Console(width=None if sys.stdout.isatty() else 160).print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps({"hardware": hardware(), "versions": versions(), **results}, indent=2))


if __name__ == "__main__":
    main()

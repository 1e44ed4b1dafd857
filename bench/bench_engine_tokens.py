"""Greedy tokens of a packed model in vLLM, from one rank and from several, beside those of the eager model, in float32.

    .venv-vllm/bin/python bench/bench_engine_tokens.py [--checkpoint DIRECTORY --ranks 2] [--prompts 20] [--tokens 32]

Without a checkpoint the default model is packed, rounded to nearest, for three ranks: it has 9 heads. Activations are
"mxfp6", whose blocks have scales of their own. Under "fp8" each of several ranks scales its own part of a row, so that
its numbers are others from the start.

Engines add the same numbers in other orders. A sum that is off in its last bit can carry an activation over a rounding
boundary, and then all that follows differs. So where an engine's token is not the eager model's, the table says by how
much the eager model finds its own likelier after the same text ("gap", of logits), how far the engine's
log-probabilities are from the eager model's there ("off"), and how far the eager model's are from its own when it reads
the text at once instead of token by token ("itself"). A gap of at most twice the larger is explained. The exit
code is 1 if one is not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from micromix_compile.evaluation import texts
from micromix_compile.evaluation.machine import hardware, versions
from micromix_compile.integrations.vllm.plugin import installed_version

if TYPE_CHECKING:
    from torch import Tensor

QUIET = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}


class Answer(NamedTuple):
    """Tokens that follow a prompt, and by step the log-probabilities of the likeliest few."""

    tokens: list[int]
    logprobs: list[dict[int, float]]


class Difference(NamedTuple):
    """Where an engine's first other token is, counted from 0; see above for the rest."""

    step: int
    gap: float
    off: float
    itself: float

    @property
    def is_explained(self) -> bool:
        """Whether the two tokens are nearer each other than the numbers are."""
        return self.gap <= 2 * max(self.off, self.itself)


def pack(directory: Path, ranks: int) -> None:
    """The default model, calibrated on little: how well its weights are rounded is no matter here."""
    command = [Path(sys.executable).parent / "micromix", "quantize", "--out", directory]
    few = ["--windows", "2", "--window-length", "64", "--weight-rounding", "nearest", "--no-scale-search"]
    options = ["--dtype", "float32", "--activations", "mxfp6", "--shards", str(ranks)]
    subprocess.run([*command, *options, *few], check=True)


def make_prompts(checkpoint: Path, count: int) -> list[list[int]]:
    """Tokens of evaluation text, each prompt a word longer than the one before."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    words = " ".join(texts.load_texts().evaluation).split()
    return [tokenizer(" ".join(words[40 * i : 41 * i + 3])).input_ids for i in range(count)]


def eager_answer(model: Any, prompt: list[int], tokens: int) -> tuple[list[int], Tensor]:
    """The likeliest tokens one after the other, and the log-probabilities (tokens, vocabulary) of each step."""
    cache, fed, found, rows = None, prompt, [], []
    for _ in range(tokens):
        output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        cache, logits = output.past_key_values, output.logits[0, -1]
        rows.append(logits.log_softmax(-1))
        fed = [int(logits.argmax())]
        found += fed
    return found, torch.stack(rows)


def last_row(model: Any, pieces: list[list[int]]) -> Tensor:
    """Log-probabilities (vocabulary,) of what follows a text that is read in pieces."""
    cache = None
    for piece in pieces:
        output = model(torch.tensor([piece]), past_key_values=cache, use_cache=True)
        cache = output.past_key_values
    found: Tensor = output.logits[0, -1].log_softmax(-1)
    return found


def difference(model: Any, prompt: list[int], eager: tuple[list[int], Tensor], engine: Answer) -> Difference | None:
    """None if all tokens are the same."""
    tokens, rows = eager
    if tokens == engine.tokens:
        return None
    step = next(i for i, (one, other) in enumerate(zip(tokens, engine.tokens, strict=True)) if one != other)
    row, text = rows[step], [*prompt, *tokens[:step]]
    off = max(abs(float(row[token]) - value) for token, value in engine.logprobs[step].items())
    apart = (last_row(model, [text]) - last_row(model, [[token] for token in text])).abs()
    itself = max(float(apart[token]) for token in engine.logprobs[step])
    return Difference(step, float(row[tokens[step]] - row[engine.tokens[step]]), off, itself)


def of_engine(checkpoint: Path, prompts: list[list[int]], tokens: int, ranks: int) -> list[Answer]:
    """In a process of its own, for vLLM sets up distributed groups, threads and log handlers for the one it is in."""
    with tempfile.TemporaryDirectory() as scratch:
        job = {
            "checkpoint": str(checkpoint),
            "prompts": prompts,
            "tokens": tokens,
            "ranks": ranks,
            "out": f"{scratch}/a",
        }
        command = [sys.executable, __file__, "--job", json.dumps(job)]
        subprocess.run(command, env={**os.environ, **QUIET}, stdout=sys.stderr, check=True)
        found = json.loads(Path(job["out"]).read_text("utf-8"))
    return [Answer(one, [{int(t): v for t, v in step.items()} for step in steps]) for one, steps in found]


def run_engine(checkpoint: str, prompts: list[list[int]], tokens: int, ranks: int, out: str) -> None:
    """Write what an engine answers to a file, as JSON."""
    from vllm import LLM, SamplingParams, TokensPrompt

    options = {"dtype": "float32", "max_model_len": 512, "enforce_eager": True, "disable_log_stats": True}
    engine = LLM(checkpoint, tensor_parallel_size=ranks, **options)
    wanted = SamplingParams(temperature=0, max_tokens=tokens, logprobs=5, ignore_eos=True)
    outputs = engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], wanted, use_tqdm=False)
    first = [output.outputs[0] for output in outputs]
    plain = [[{t: found.logprob for t, found in step.items()} for step in one.logprobs] for one in first]
    answers = [(list(one.token_ids), steps) for one, steps in zip(first, plain, strict=True)]
    Path(out).write_text(json.dumps(answers), "utf-8")


def compare(checkpoint: Path, ranks: list[int], count: int, tokens: int) -> bool:
    """Print the table. Returns whether every difference is explained."""
    prompts = make_prompts(checkpoint, count)
    answers = {n: of_engine(checkpoint, prompts, tokens, n) for n in ranks}
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    print(f"{count} prompts, {tokens} tokens each; {versions()}, vLLM {installed_version()}; {hardware()}\n")
    print("| tokens of the prompt |" + "".join(f" {n} rank(s): first difference | gap | off | itself |" for n in ranks))
    print("|---|" + "---|---|---|---|" * len(ranks))
    different: list[Difference] = []
    for number, prompt in enumerate(prompts):
        with torch.no_grad():
            eager = eager_answer(model, prompt, tokens)
            found = [difference(model, prompt, eager, answers[n][number]) for n in ranks]
        print(f"| {len(prompt)} |" + "".join(map(cells, found)), flush=True)
        different += [one for one in found if one is not None]
    print(f"\n{len(ranks) * count - len(different)} of {len(ranks) * count} answers are equal in all tokens")
    return all(one.is_explained for one in different)


def cells(found: Difference | None) -> str:
    """Of a row of the table."""
    if found is None:
        return " none | | | |"
    return f" {found.step} | {found.gap:.4f} | {found.off:.4f} | {found.itself:.4f} |"


def main() -> None:
    """Pack if nothing is given, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path)
    parser.add_argument("--ranks", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.job is not None:
        run_engine(**arguments.job)
        return
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = arguments.checkpoint or Path(scratch) / "packed"
        if arguments.checkpoint is None:
            pack(checkpoint, arguments.ranks)
        sys.exit(not compare(checkpoint, [1, arguments.ranks], arguments.prompts, arguments.tokens))


if __name__ == "__main__":
    main()

"""Jobs for vLLM's engine: tokens by a checkpoint, in a process of their own, and by transformers for comparison.

    python -m support.vllm_jobs '[{"checkpoint": ..., "prompts": [[1, 2], ...], "tokens": 8, "options": {...}}]'

runs one job after the other and prints what came of each as JSON in the last line. vLLM sets up distributed groups,
threads and log handlers for the process that it is in.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

TESTS: Final = Path(__file__).parents[1]
TIMEOUT: Final = 900.0


class Job(NamedTuple):
    """What one engine does. options: of `vllm.LLM`. folds: on a target whose products take folded operands."""

    checkpoint: Path
    prompts: list[list[int]]
    tokens: int = 8
    options: dict[str, Any] = {}  # noqa: RUF012 - never changed
    folds: bool = False


class Result(NamedTuple):
    """For each prompt: the tokens that followed, and the logarithms of the likeliest tokens' probabilities by step.

    folded: how many products were folded.
    """

    tokens: list[list[int]]
    logprobs: list[list[dict[int, float]]]
    folded: int


def environment(**more: str) -> dict[str, str]:
    """For processes of vLLM on a CPU: a cache of 1 GiB, and threads that are not bound to cores."""
    settings = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
    offline = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(TESTS)}
    return {**os.environ, **settings, **offline, **more}


def run_jobs(*jobs: Job) -> tuple[list[Result | str], str]:
    """What came of each job, or what its engine raised; and all that was logged."""
    asked = json.dumps([{**job._asdict(), "checkpoint": str(job.checkpoint)} for job in jobs])
    done = subprocess.run(
        [sys.executable, "-m", "support.vllm_jobs", asked],
        env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"), capture_output=True, text=True, timeout=TIMEOUT,
    )  # fmt: skip
    log = done.stdout + done.stderr
    assert done.returncode == 0, log
    return [_result(one) for one in json.loads(done.stdout.splitlines()[-1])], log


def _result(found: dict[str, Any]) -> Result | str:
    if "error" in found:
        return str(found["error"])
    steps = [[{int(token): value for token, value in step.items()} for step in one] for one in found["logprobs"]]
    return Result(found["tokens"], steps, found["folded"])


def prompts_of_any_length(count: int, vocabulary: int, *, longest: int = 40) -> list[list[int]]:
    """Random tokens."""
    lengths = torch.randint(1, longest, (count,)).tolist()
    return [torch.randint(0, vocabulary, (length,)).tolist() for length in lengths]


def differences(model: Any, job: Job, result: Result) -> tuple[Tensor, Tensor]:
    """How far the likeliest tokens' log-probabilities are from the model's, for each step of each prompt, and by how
    much the model's best token is likelier than the one that was chosen: (prompts, steps) float32 each."""
    off, behind = [], []
    for prompt, tokens, steps in zip(job.prompts, result.tokens, result.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *tokens]])).logits[0, len(prompt) - 1 : -1]
        rows = logits.float().log_softmax(-1)
        pairs = zip(rows, steps, strict=True)
        off.append([max(abs(float(row[t]) - value) for t, value in step.items()) for row, step in pairs])
        behind.append([float(row.max() - row[token]) for row, token in zip(rows, tokens, strict=True)])
    return torch.tensor(off), torch.tensor(behind)


def main(jobs: list[dict[str, Any]]) -> None:
    """Run the jobs; of one that fails, the error is its result."""
    results = []
    for job in jobs:
        try:
            results.append(_generate(**job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    sys.stdout.write("\n" + json.dumps(results))


def _generate(
    checkpoint: str, prompts: list[list[int]], tokens: int, options: dict[str, Any], folds: bool
) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    calls = _fold_on_cpu() if folds else []
    settings = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, "enforce_eager": True}
    engine = LLM(checkpoint, disable_log_stats=True, **{**settings, **options})
    try:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, logprobs=3, detokenize=False, ignore_eos=True)
        outputs = engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], wanted, use_tqdm=False)
    finally:
        del engine
        cleanup_dist_env_and_memory()
    first = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(one.token_ids) for one in first],
        "logprobs": [[_plain(step) for step in one.logprobs] for one in first],
        "folded": len(calls),
    }


def _fold_on_cpu() -> list[int]:
    """From now on a CPU is a target that folds. Returns what grows with each product."""
    from micromix_compile import ops
    from micromix_compile.targets.target import FOLDED, Row, Target, register_target

    register_target(Row(serves=lambda d: d.type == "cpu", target=lambda _: Target(name="folds", passes=FOLDED)))
    calls: list[int] = []

    def counted(product: Any, *args: Any) -> Any:
        calls.append(1)
        return product(*args)

    ops.folded_mm = partial(counted, ops.folded_mm)
    ops.grouped_folded_mm = partial(counted, ops.grouped_folded_mm)
    return calls


def _plain(step: Any) -> dict[int, float]:
    return {token: found.logprob for token, found in step.items()}


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

"""Runs vLLM's engine, one job after the other, and prints what came of each as JSON in the last line.

    python -m support.vllm_engine '[{"checkpoint": ..., "prompts": [[1, 2], ...], "tokens": 8, "options": {...}}]'

A process of its own: vLLM sets up distributed groups, threads and log handlers for the process that it is in.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(jobs: list[dict[str, Any]]) -> None:
    """A job's result: {"tokens": [[...]], "logprobs": [[{token: logprob}]]}, or {"error": text}."""
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    results = []
    for job in jobs:
        try:
            results.append(_run(**job))
        except Exception as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    print(json.dumps(results))


def _run(checkpoint: str, prompts: list[list[int]], tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.distributed import cleanup_dist_env_and_memory

    settings = {"dtype": "float32", "max_model_len": 128, "skip_tokenizer_init": True, **options}
    engine = LLM(checkpoint, disable_log_stats=True, **settings)
    try:
        wanted = SamplingParams(temperature=0, max_tokens=tokens, logprobs=2, detokenize=False, ignore_eos=True)
        outputs = engine.generate([TokensPrompt(prompt_token_ids=p) for p in prompts], wanted, use_tqdm=False)
    finally:
        del engine
        cleanup_dist_env_and_memory()
    first = [output.outputs[0] for output in outputs]
    return {
        "tokens": [list(one.token_ids) for one in first],
        "logprobs": [[{str(k): v.logprob for k, v in step.items()} for step in one.logprobs] for one in first],
    }


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))

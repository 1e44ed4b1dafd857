"""Damage recipes, packed checkpoints and those of others at random, load them, and count what happens.

python bench/fuzz_files.py [--mutations 3000] [--seed 7]

Wanted: whatever is not the file that was written is refused, with an error that names it. An adversary who makes the
digests anew may write a recipe or a checkpoint of their own, if it is a valid one; these are counted apart. Checkpoints
of others have no digests: what is taken of a damaged one must be what it holds, as read without our code. The exit code
is 1 if anything crashed, hung, raised an unclear error or was accepted with another result.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import hashlib
import io
import json
import logging
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import warnings
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")  # a thread pool a load is slow

import torch
from foreign import INDEX, holds, make_compressed, make_gpt_oss, values_of
from mutations import mutated_bytes, mutated_json, mutated_safetensors, mutated_tensors
from safetensors import safe_open
from safetensors.torch import load, save
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.utils import logging as transformers_logging

import micromix_compile as micromix
from micromix_compile.integrations import checkpoint
from micromix_compile.progress import make_progress

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

OUTCOMES = ("refused", "same", "own valid", "another result", "unclear error", "crash", "hang")
BAD = OUTCOMES[3:]
TIMEOUT = 60.0  # seconds for one file; a healthy load takes a tenth of one
IDS = torch.arange(16).reshape(2, 8)


@dataclass(frozen=True)
class Originals:
    """What is damaged: by kind, a recipe or a directory, and what it gives undamaged. model: the recipe's."""

    model: torch.nn.Module
    paths: dict[str, Path]
    results: dict[str, str]


def make_model(intermediate_size: int) -> torch.nn.Module:
    """A Llama of one layer with random weights."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    more = {"intermediate_size": intermediate_size, "attention_bias": True}
    return AutoModelForCausalLM.from_config(LlamaConfig(**sizes, **more, num_hidden_layers=1, vocab_size=64)).eval()


def make_originals(folder: Path) -> Originals:
    """Of a model with channels that are not whole blocks; others' has only such."""
    model = make_model(80)
    recipe = micromix.calibrate(model, [IDS])
    recipe.save(folder / "recipe.safetensors")
    packed = micromix.quantize_(copy.deepcopy(model), recipe)
    packed.save_pretrained(folder / "packed")
    packed.save_pretrained(folder / "packed files", max_shard_size="20KB")
    paths = {
        "recipe": folder / "recipe.safetensors",
        "forged recipe": folder / "recipe.safetensors",
        "packed": folder / "packed",
        "packed, several files": folder / "packed files",
        "compressed-tensors": make_compressed(make_model(96), folder / "compressed"),
        "the same in several files": make_compressed(make_model(96), folder / "compressed files", files=3),
        "gpt-oss": make_gpt_oss(folder / "gpt_oss"),
    }
    assert all((paths[kind] / INDEX).is_file() for kind in paths if "several files" in kind), "they are several"
    return Originals(model, paths, {kind: KINDS[kind].result(path) for kind, path in paths.items()})


def digest(values: Any) -> str:
    """Of tensors and plain values, in order."""
    total = hashlib.sha256()
    for value in values:
        if isinstance(value, torch.Tensor):
            total.update(f"{value.dtype} {tuple(value.shape)}".encode())
            value = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        total.update(value if isinstance(value, bytes) else repr(value).encode())
    return total.hexdigest()


def recipe_result(path: Path) -> str:
    """All that a recipe holds."""
    recipe = micromix.Recipe.load(path)
    values: list[Any] = [recipe.config, recipe.model_id, sorted(recipe.refused.items())]
    for fqn, linear in recipe.linears.items():
        group, stats = linear.group, linear.group.statistics
        costs = stats.costs
        values += [fqn, linear.in_features, linear.out_features, linear.weight_sample, linear.weight_checksums]
        values += [group.name, group.channel_perm, group.split, stats.abs_mean, stats.abs_max, stats.below]
        values += [stats.elements, stats.tokens, stats.batches, *recipe.packed.get(fqn, ())]
        values += [] if costs is None else [costs.activations, costs.weights, costs.measured]
    return digest(values)


def packed_result(directory: Path) -> str:
    """The logits, and all tensors that were loaded."""
    model = AutoModelForCausalLM.from_pretrained(directory, local_files_only=True)
    with torch.no_grad():
        return digest([model(IDS).logits, *(part for pair in sorted(model.state_dict().items()) for part in pair)])


def foreign_result(directory: Path) -> str:
    """What a converted checkpoint of others is. Raises AssertionError if that is not what it holds."""
    return _converted(directory, None)


def gpt_oss_result(directory: Path) -> str:
    """The same, with the activations that nothing there names."""
    return _converted(directory, "fp8")


def _converted(directory: Path, activations: str | None) -> str:
    model = micromix.load_converted(directory, activations=activations, dtype=torch.float32)
    assert holds(model, directory), "what was loaded is not what the files hold"
    tensors, *more = values_of(model)
    return digest([*(part for pair in tensors for part in pair), *more])


def damage_recipe(original: Path, path: Path, rng: random.Random) -> bool:
    """Write a damaged recipe. Returns whether it was sealed anew: never."""
    content = original.read_bytes()
    kind = rng.randrange(3)
    if kind == 0:
        content = mutated_bytes(content, rng)
    elif kind == 1:
        content = mutated_safetensors(content, rng)
    else:
        with safe_open(original, framework="pt") as file:
            content = save(mutated_tensors(load(content), rng), metadata=file.metadata())
    path.write_bytes(content)
    return False


def forge_recipe(original: Path, path: Path, rng: random.Random) -> bool:
    """Write a recipe with one to three changes and right digests."""
    with safe_open(original, framework="pt") as file:
        fields = {name: json.loads(text) for name, text in file.metadata().items() if name != "digests"}
    tensors = load(original.read_bytes())
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.5:
            name = rng.choice(sorted(fields))
            changed = mutated_json({name: fields[name]}, rng)
            fields = {**{n: v for n, v in fields.items() if n != name}, **changed} if type(changed) is dict else fields
        else:
            tensors = mutated_tensors(tensors, rng)
    payloads = {name: json.dumps(value, sort_keys=True).encode() for name, value in fields.items()}
    payloads |= {n: t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for n, t in tensors.items()}
    fields["digests"] = {name: hashlib.sha256(payload).hexdigest() for name, payload in payloads.items()}
    path.write_bytes(save(tensors, metadata={name: json.dumps(value) for name, value in fields.items()}))
    return True


def damage_packed(original: Path, path: Path, rng: random.Random) -> bool:
    """Copy the packed checkpoint with damage. Returns whether it was sealed anew, as in every fifth."""
    damage_directory(original, path, rng)
    if rng.random() < 0.2:
        with contextlib.suppress(ValueError, OSError, RecursionError):
            checkpoint.seal(path)
            return True
    return False


def damage_foreign(original: Path, path: Path, rng: random.Random) -> bool:
    """Copy the checkpoint of others with damage. Nothing seals it: whatever is valid is another one."""
    damage_directory(original, path, rng)
    return True


def damage_directory(original: Path, path: Path, rng: random.Random) -> None:
    """Copy a checkpoint with one piece of damage."""
    shutil.copytree(original, path)
    weights = rng.choice(sorted(path.glob("model*.safetensors")))
    config = rng.choice(sorted(path.glob("config.json")) + sorted(path.glob(INDEX)))
    kind = rng.randrange(5)
    if kind == 0:
        weights.write_bytes(mutated_bytes(weights.read_bytes(), rng))
    elif kind == 1:
        weights.write_bytes(mutated_safetensors(weights.read_bytes(), rng))
    elif kind == 2:
        weights.write_bytes(save(mutated_tensors(load(weights.read_bytes()), rng), metadata={"format": "pt"}))
    elif kind == 3:
        config.write_text(json.dumps(mutated_json(json.loads(config.read_text()), rng)))
    else:
        rng.choice(
            (config.unlink, weights.unlink, lambda: config.write_bytes(mutated_bytes(config.read_bytes(), rng)))
        )()


class Kind(NamedTuple):
    """damage: writes a damaged copy of an original, and says whether it was sealed anew. result: what a file gives."""

    damage: Callable[[Path, Path, random.Random], bool]
    result: Callable[[Path], str]


KINDS = {
    "recipe": Kind(damage_recipe, recipe_result),
    "forged recipe": Kind(forge_recipe, recipe_result),
    "packed": Kind(damage_packed, packed_result),
    "packed, several files": Kind(damage_packed, packed_result),
    "compressed-tensors": Kind(damage_foreign, foreign_result),
    "the same in several files": Kind(damage_foreign, foreign_result),
    "gpt-oss": Kind(damage_foreign, gpt_oss_result),
}


def outcome(originals: Originals, kind: str, number: str, folder: Path) -> tuple[str, str]:
    """Of one damaged file: one of OUTCOMES, and what was raised."""
    damage, result = KINDS[kind]
    original = originals.paths[kind]
    path, sealed = folder / "damaged", False
    try:
        sealed = damage(original, path, random.Random(number))
        found = result(path)
        if found == originals.results[kind]:
            return "same", ""
        if sealed and kind == "forged recipe":
            run_forged(originals.model, path)
        return "own valid" if sealed else "another result", ""
    except AssertionError as error:
        return "another result", str(error)
    except Exception as error:
        clear = isinstance(error, ValueError | OSError) and str(path) in str(error)
        # Of files of any origin transformers refuses what has not the shapes of the model, in a report that it logs.
        clear |= isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error)
        # What an edit does that was meant, is between it and transformers.
        clear |= sealed and kind.startswith("packed")
        return "refused" if clear else "unclear error", f"{type(error).__name__}: {str(error)[:300]}"
    finally:
        shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def run_forged(model: torch.nn.Module, path: Path) -> None:
    """Run the model with a recipe that is valid; that it does not fit the model is said by a ValueError."""
    with contextlib.suppress(ValueError), torch.no_grad():
        micromix.quantize_(copy.deepcopy(model), micromix.Recipe.load(path))(IDS)


def work(originals: Originals, jobs: list[tuple[int, str, str]], to_parent: Connection) -> None:
    """In a process of its own: one file after the other; each is announced before it is tried."""
    silence = io.StringIO()
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(silence):
        for index, kind, number in jobs:
            to_parent.send((index, kind, outcome(originals, kind, number, Path(folder))))


def results(originals: Originals, jobs: list[tuple[int, str, str]]) -> Any:
    """Yield (index, kind, (outcome, error)) of all jobs. A process that dies or hangs is replaced."""
    context = multiprocessing.get_context("fork")
    while jobs:
        receiver, sender = context.Pipe(duplex=False)
        process: BaseProcess = context.Process(target=work, args=(originals, jobs, sender), daemon=True)
        process.start()
        sender.close()
        while jobs:
            try:
                found = receiver.recv() if receiver.poll(TIMEOUT) else (*jobs[0][:2], ("hang", f"{TIMEOUT} s"))
            except EOFError:
                process.join()
                found = (*jobs[0][:2], ("crash", f"exit code {process.exitcode}"))
            jobs = jobs[1:]
            yield found
            if found[2][0] in ("hang", "crash"):
                break
        process.kill()
        process.join()


def fuzz(mutations: int, seed: int, *, show: bool = False) -> Counter[tuple[str, str]]:
    """Counts by kind and outcome. show: print what should not have happened."""
    counts: Counter[tuple[str, str]] = Counter()
    names = sorted(KINDS)
    jobs = [(i, names[i % len(names)], f"{seed} {i}") for i in range(mutations)]
    with tempfile.TemporaryDirectory() as folder, make_progress() as progress:
        task = progress.add_task("files", total=mutations)
        for index, kind, (found, error) in results(make_originals(Path(folder)), jobs):
            counts[kind, found] += 1
            progress.advance(task)
            if show and found in BAD:
                print(f"mutation {index} of a {kind}: {found} {error}")
    return counts


def main() -> None:
    """Print a table of counts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mutations", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # processes are forked
    logging.getLogger("micromix_compile").setLevel(logging.ERROR)
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    counts = fuzz(arguments.mutations, arguments.seed, show=True)
    print("".join(f"{name:>26}" for name in ("", *OUTCOMES)))
    for kind in KINDS:
        print(f"{kind:>26}" + "".join(f"{counts[kind, found]:>26}" for found in OUTCOMES))
    sys.exit(any(counts[kind, found] for kind in KINDS for found in BAD))


if __name__ == "__main__":
    main()

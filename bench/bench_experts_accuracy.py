"""Accuracy against bits of a mixture of experts: a small Mixtral, trained here, so that its experts differ.

    python bench/bench_experts_accuracy.py [--device cuda] [--steps 500] [--windows 64] [--csv FILE]

Its tokens are bytes, so that experts hold nearly all parameters. It learns from the calibration half of three texts, no
longer than it gets better on others: 500 steps of 8,192 bytes are eight times that half. Every row is the packed model,
in float32, on text that was neither learnt nor calibrated on. Seeds are fixed.
"""

from __future__ import annotations

import argparse
import copy
import csv
import logging
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import MixtralConfig, MixtralForCausalLM

import micromix_compile as micromix
from micromix_compile.evaluation import texts
from micromix_compile.evaluation.perplexity import evaluate
from micromix_compile.verbs.calibrate import calibrate_each

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

    from micromix_compile.evaluation.types import Evaluation

Config = micromix.MicroMixConfig
KINDS = {
    "mxfp8": Config(policy="mxfp8"),
    "mxfp4": Config(policy="mxfp4"),
    "budget 5.48": Config(target_bits=5.48),
    "budget 4.5": Config(target_bits=4.5),
    "budget 5.48, bytes": Config(target_bits=5.73, target_kind="stored"),
}
CONFIGS = {
    f"{name}, activations {activations}": replace(config, activations=activations)
    for name, config in KINDS.items()
    for activations in ("fp8", "same")
}
DATA = ("wiki", "c4", "technical")
LENGTH, CALIBRATION_WINDOWS = 512, 32
PEAK_RATE, WARM_UP = 2e-3, 100


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed model, or the unquantized one."""

    name: str
    element_bits: float
    stored_bits: float
    model_bits: float
    quality: Evaluation

    def cells(self) -> list[str]:
        """As the table and the file have them."""
        bits = (self.element_bits, self.stored_bits, self.model_bits)
        kl, top1 = self.quality.kl, self.quality.top1
        return [
            self.name,
            *(f"{one:.2f}" for one in bits),
            f"{self.quality.perplexity:.4f}",
            f"{kl:.5f}",
            f"{top1:.4f}",
        ]


HEADER = ["row", "element bits", "stored bits", "bits of the model", "perplexity of a byte", "KL", "top-1"]


def corpus() -> tuple[Tensor, Tensor]:
    """(what is learnt and calibrated on, what is evaluated on): bytes as int64."""
    loaded = [texts.load_texts(name) for name in DATA]
    sides = ([one.calibration for one in loaded], [one.evaluation for one in loaded])
    joined = ("\n\n".join(article for articles in side for article in articles) for side in sides)
    learnt, held_out = (torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() for text in joined)
    return learnt, held_out


def windows_of(tokens: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """(count, LENGTH), from anywhere."""
    starts = torch.randint(len(tokens) - LENGTH, (count, 1), generator=generator)
    return tokens[starts + torch.arange(LENGTH)]


def trained(tokens: Tensor, options: argparse.Namespace) -> MixtralForCausalLM:
    """A Mixtral of 8 experts, 2 of which run, after `options.steps` steps."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": options.layers, "vocab_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": LENGTH}
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.02}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads, **balance)).to(options.device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.1)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, PEAK_RATE, total_steps=options.steps, pct_start=min(WARM_UP / options.steps, 0.3)
    )
    generator, start = torch.Generator().manual_seed(0), time.monotonic()
    for step in range(options.steps):
        batch = windows_of(tokens, options.batch, generator).to(options.device)
        with torch.autocast(options.device, torch.bfloat16):
            loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == options.steps - 1:
            logging.info("step %d, loss %.3f, %.0f s", step, float(loss.detach()), time.monotonic() - start)
    model.config.output_router_logits = False
    return model.eval()


def rows(model: MixtralForCausalLM, learnt: Tensor, held_out: Tensor, options: argparse.Namespace) -> Iterator[Row]:
    """The unquantized model, then each config."""
    generator = torch.Generator().manual_seed(1)
    batches = windows_of(learnt, CALIBRATION_WINDOWS, generator).to(options.device).split(4)
    evaluated = held_out[: options.windows * LENGTH].view(-1, LENGTH).to(options.device)
    full = replace(evaluate(model, evaluated), kl=0.0, top1=1.0)
    yield Row(name="float32", element_bits=32, stored_bits=32, model_bits=32, quality=full)
    rounded = model.to(torch.bfloat16)
    model = copy.deepcopy(rounded).float()
    yield Row(name="bf16", element_bits=16, stored_bits=16, model_bits=16, quality=evaluate(rounded, evaluated, model))
    for name, recipe in zip(CONFIGS, calibrate_each(model, batches, list(CONFIGS.values())), strict=True):
        packed: Any = micromix.quantize_(copy.deepcopy(model), recipe)
        bits = (recipe.element_bits, recipe.stored_bits, recipe.model_bits or 0.0)
        quality = evaluate(packed, evaluated, model)
        yield Row(name=name, element_bits=bits[0], stored_bits=bits[1], model_bits=bits[2], quality=quality)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    learnt, held_out = corpus()
    model = trained(learnt, options)
    table = Table(*HEADER, title=f"a Mixtral of {options.layers} layers after {options.steps} steps")
    written = [HEADER]
    for row in rows(model, learnt, held_out, options):
        written.append(row.cells())
        table.add_row(*written[-1])
    Console().print(table)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows(written)


if __name__ == "__main__":
    main()

"""A recipe as calibration writes it, and forged files of recipes."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from micromix_compile.calibration.thresholds import thresholds_to_count
from micromix_compile.config import MicroMixConfig
from micromix_compile.recipe.fingerprint import Checksums, weight_sample
from micromix_compile.recipe.types import ChannelStatistics, GroupRecipe, LinearRecipe, Recipe

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Fields = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def make_recipe() -> Recipe:
    config = MicroMixConfig(
        policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False, activations="fp8", rotate="all"
    )
    statistics = ChannelStatistics(
        abs_mean=torch.rand(90),
        abs_max=torch.rand(90),
        elements=900,
        tokens=10,
        batches=1,
        below={t: 300 * (i + 1) for i, t in enumerate(thresholds_to_count(config))},
    )
    perm = torch.cat((torch.full((6,), -1), torch.randperm(90))).int()
    group = GroupRecipe(name="layers.0.q", channel_perm=perm, split=(32, 32, 32), rotated=96, statistics=statistics)
    weights = {"q": torch.randn(64, 90), "k": torch.randn(32, 90)}
    linears = {
        f"layers.0.{name}": LinearRecipe(
            fqn=f"layers.0.{name}",
            in_features=90,
            out_features=len(weight),
            group=group,
            weight_sample=weight_sample(weight),
            weight_checksums=Checksums.of(weight),
        )
        for name, weight in weights.items()
    }
    return Recipe(config=config, model_id="Net", linears=linears, refused={"lm_head": "skipped"})


def forge(path: Path, edit: Callable[[Fields, Tensors], object]) -> None:
    """Edit a recipe's fields and tensors, and make the digests anew, as someone would who wants it to be accepted."""
    with safe_open(path, framework="pt") as file:
        fields = {name: json.loads(text) for name, text in file.metadata().items() if name != "digests"}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    edit(fields, tensors)
    payloads = {name: json.dumps(value, sort_keys=True).encode() for name, value in fields.items()}
    payloads |= {
        name: value.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for name, value in tensors.items()
    }
    fields["digests"] = {name: hashlib.sha256(payload).hexdigest() for name, payload in payloads.items()}
    save_file(tensors, path, metadata={name: json.dumps(value) for name, value in fields.items()})

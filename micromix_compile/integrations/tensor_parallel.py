"""Tensor parallelism of transformers: what each rank keeps of the packed linears that its plan cuts.

transformers shards Parameters, and its layers hand a rank's part of the input to a linear, and collect what it returns.
Packed tensors are buffers, and a rank's part of a sorted order is no range of bytes: so every rank reads them whole,
and then keeps its part, one linear after the other.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import transformers

from micromix_compile.numerics.shards import Cut, check_ranks
from micromix_compile.recipe.orders import shards_of
from micromix_compile.session.distributed import is_distributed

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from micromix_compile.numerics.layout import Split

OLDEST: Final = (5, 19)
"""Of transformers, by its first two numbers. Before, its layers gave linears DTensors."""

_ROWS: Final = ("colwise", "colwise_gather_output", "colwise_rep")
_COLUMNS: Final = ("rowwise", "rowwise_rep", "rowwise_split_input")
_WHOLE: Final = ("replicate",)
"""Styles of transformers' plans by what a rank keeps of a packed linear: some of its outputs, of its inputs, or all."""


class Ranks(NamedTuple):
    """How many processes hold a model together, which of these this is, and transformers' plan for it."""

    size: int
    rank: int
    plan: Mapping[str, str]

    def style(self, fqn: str) -> str | None:
        """What the plan, in which numbers of layers are wildcards, says of a module."""
        return self.plan.get(re.sub(r"\.\d+(?=\.|$)", ".*", fqn))

    def cuts(self, fqn: str) -> bool:
        """Whether each rank keeps some of the input channels of a linear."""
        return self.style(fqn) in _COLUMNS


def ranks_of(model: Any, linears: Mapping[str, Mapping[str, Any]]) -> Ranks | None:
    """How transformers is about to deal a model to processes by tensor parallelism; None if it is not.

    linears: what is packed, as the checkpoint's config describes it. Raises ValueError for a way in which packed
    linears or experts can't be dealt.
    """
    wanted = getattr(model.config, "distributed_config", None)
    sizes = {name: getattr(wanted, name, None) or 1 for name in ("tp_size", "pp_size", "ep_size")}
    if sizes["pp_size"] > 1:
        raise ValueError(f"pp_size must be 1 for a packed model, got {sizes['pp_size']}: use tp_size")
    packed = next((fqn for fqn, described in linears.items() if "experts" in described), None)
    if sizes["ep_size"] > 1 and packed is not None:
        raise ValueError(f"ep_size must be 1 for packed experts, {packed}, got {sizes['ep_size']}")
    if sizes["tp_size"] == 1:
        return None
    check_version(sizes["tp_size"])
    asked = getattr(wanted, "tp_plan", None)
    if asked == {}:
        return None
    from torch import distributed

    assert distributed.is_initialized(), "transformers has set up its mesh"
    mesh = distributed.get_rank() % sizes["tp_size"]  # the last dimension of transformers' mesh
    return Ranks(sizes["tp_size"], mesh, {**model.tp_plan, **(asked if isinstance(asked, dict) else {})})


def check_version(ranks: int) -> None:
    """Raise ValueError if this transformers can't run packed linears on several ranks."""
    if tuple(map(int, transformers.__version__.split(".")[:2])) < OLDEST:
        oldest = ".".join(map(str, OLDEST))
        raise ValueError(
            f"packed checkpoints run on {ranks} ranks with transformers {oldest} or newer, this is "
            f"{transformers.__version__}"
        )


def check_plan(linears: Mapping[str, Mapping[str, Any]], ranks: Ranks) -> None:
    """Raise ValueError, which names the linear and what is accepted, unless each can be dealt to the ranks."""
    for fqn, described in linears.items():
        style = ranks.style(fqn)
        if "experts" in described:
            raise ValueError(
                f"{fqn}: packed experts can't be dealt to {ranks.size} ranks, linears can: calibrate with a pattern in "
                f"skip that matches it"
            )
        if style is not None and style not in (*_ROWS, *_COLUMNS, *_WHOLE):
            known = ", ".join((*_ROWS, *_COLUMNS, *_WHOLE))
            raise ValueError(f"{fqn}: its style in tp_plan must be one of {known} for a packed linear, got {style!r}")
        if style in _ROWS and described["out_features"] < ranks.size:
            raise ValueError(f"{fqn} has {described['out_features']} outputs, which {ranks.size} ranks can't share")
        if style in _COLUMNS:
            check_ranks(len(_shards(described, fqn)), ranks.size, fqn)


def keep_own_parts(model: nn.Module, linears: Mapping[str, Mapping[str, Any]], ranks: Ranks, *, w_fp4: bool) -> None:
    """Let each packed linear that the plan cuts keep the rank's part. w_fp4: weights are all MXFP4."""
    for fqn, described in linears.items():
        linear: Any = model.get_submodule(fqn)
        style = ranks.style(fqn)
        linear._hf_quantized_needs_local_tp = True  # transformers then hands it plain tensors, with gradients or not
        if style in _ROWS:
            each = -(-linear.out_features // ranks.size)  # as torch.chunk does, by which biases are cut
            linear.keep_part(slice(ranks.rank * each, (ranks.rank + 1) * each), Cut((linear.split,)))
        elif style in _COLUMNS:
            linear.keep_part(slice(None), Cut(_shards(described, fqn), ranks.rank, ranks.size, w_fp4))


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if this process holds a part of a packed model."""
    name, count = type(model).__name__, getattr(model, "_tp_size", None) or 1
    if count > 1:
        raise ValueError(f"{name} is dealt to {count} ranks, of which each holds a part: load it on one")
    if any(is_distributed(parameter) for parameter in model.parameters()):
        raise ValueError(f"{name} is sharded over processes, of which each holds a part: load it on one")


def _shards(described: Mapping[str, Any], fqn: str) -> tuple[Split, ...]:
    """The splits of the shards of a linear; of an order that is not cut its own."""
    k4, k6, k8 = described["split"]
    return shards_of(described, (k4, k6, k8), fqn) or ((k4, k6, k8),)

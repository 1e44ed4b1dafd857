"""Tensor and expert parallelism of transformers: what each rank keeps of the packed weights that its plans deal out.

transformers shards Parameters, and its layers hand a rank's part of the input to a module, and collect what it returns.
Packed tensors are buffers, and a rank's part of a sorted order is no range of bytes: so packed modules are cut to the
rank's part before transformers fills them, and `own_parts` takes that part of each stored tensor.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import transformers

from micromix_compile.linear.experts import is_batched, is_experts, is_transposed
from micromix_compile.linear.packed import ChannelOrder
from micromix_compile.numerics.shards import Cut, check_ranks, own_rows
from micromix_compile.recipe.orders import shards_of
from micromix_compile.session.distributed import is_distributed
from micromix_compile.verbs.quantize import order_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn

    from micromix_compile.linear.experts import MicroMixExperts
    from micromix_compile.numerics.layout import Split

OLDEST: Final = (5, 19)
"""Of transformers, by its first two numbers. Before, its layers gave linears DTensors."""

OLDEST_WITH_EXPERTS: Final = (5, 23)
"""Before, its layers added up what the ranks' experts computed only if these had DTensors."""

_ROWS: Final = ("colwise", "colwise_gather_output", "colwise_rep")
_COLUMNS: Final = ("rowwise", "rowwise_rep", "rowwise_split_input")
_WHOLE: Final = (None, "replicate")
"""Styles of transformers' plans by what a rank keeps of a packed linear: some of its outputs, of its inputs, or all."""


class Ranks(NamedTuple):
    """How many processes share something, which of these this is, and transformers' plan for it."""

    size: int
    rank: int
    plan: Mapping[str, str]

    def style(self, fqn: str) -> str | None:
        """What the plan, in which numbers of layers are wildcards, says of a module or a Parameter."""
        return self.plan.get(_rule(fqn))


def _rule(fqn: str) -> str:
    """Under which name plans have what they say of a module or a Parameter."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", fqn)


class Dealing(NamedTuple):
    """Who shares the tensors of a model, and who its experts. A plan for experts comes first."""

    tensors: Ranks
    experts: Ranks


def dealing_of(model: Any, linears: Mapping[str, Mapping[str, Any]]) -> Dealing | None:
    """How transformers is about to deal a model to processes by its tensors and its experts; None if it is not.

    linears: what is packed, as the checkpoint's config describes it. Raises ValueError for a way in which packed
    weights can't be dealt.
    """
    wanted = getattr(model.config, "distributed_config", None)
    pp_size, tp_size, ep_size = (getattr(wanted, name, None) or 1 for name in ("pp_size", "tp_size", "ep_size"))
    if pp_size > 1:
        raise ValueError(f"pp_size must be 1 for a packed model, got {pp_size}: use tp_size")
    asked = {name: getattr(wanted, name, None) for name in ("tp_plan", "ep_plan")}
    used = {"tp_plan": tp_size > 1 and asked["tp_plan"] != {}, "ep_plan": ep_size > 1 and _has_experts(linears)}
    if not any(used.values()):
        return None
    check_version(max(tp_size, ep_size), linears)
    from torch import distributed

    assert distributed.is_initialized(), "transformers has set up its mesh"
    plans = {name: {**getattr(model, name), **_rules(asked[name])} if used[name] else {} for name in used}
    rank = distributed.get_rank()  # tensors and experts are the last dimensions of transformers' two meshes
    tensors = Ranks(tp_size, rank % tp_size, plans["tp_plan"])
    return Dealing(tensors, Ranks(ep_size, rank % ep_size, plans["ep_plan"]))


def _rules(plan: Any) -> Mapping[str, str]:
    """What of a plan that was asked for replaces the model's own."""
    return plan if isinstance(plan, dict) else {}


def forget_rules(model: Any, plan: dict[str, str], linears: Mapping[str, Mapping[str, Any]]) -> None:
    """Take the rules of packed experts' weights out of a plan of the model, which `parts_of` has followed.

    They are no Parameters any more, and transformers would warn that these rules are not applied. What the user asked
    for stays: transformers refuses rules of which neither the model nor its plan knows.
    """
    wanted = getattr(model.config, "distributed_config", None)
    asked = {**_rules(getattr(wanted, "tp_plan", None)), **_rules(getattr(wanted, "ep_plan", None))}
    for rule in {_rule(fqn) for fqn, described in linears.items() if "experts" in described} - asked.keys():
        plan.pop(rule, None)


def check_version(ranks: int, linears: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise ValueError if this transformers can't run what is packed on so many ranks."""
    what, needed = ("experts", OLDEST_WITH_EXPERTS) if _has_experts(linears) else ("checkpoints", OLDEST)
    if ranks > 1 and tuple(map(int, transformers.__version__.split(".")[:2])) < needed:
        raise ValueError(
            f"packed {what} run on {ranks} ranks with transformers {'.'.join(map(str, needed))} or newer, this is "
            f"{transformers.__version__}"
        )


def _has_experts(linears: Mapping[str, Mapping[str, Any]]) -> bool:
    return any("experts" in described for described in linears.values())


def parts_of(
    modules: Mapping[str, nn.Module], linears: Mapping[str, Mapping[str, Any]], dealing: Dealing, *, w_fp4: bool
) -> dict[str, Cut]:
    """What this process keeps of each packed weight of which it does not keep all.

    modules: of the model, not packed yet, by their names. linears: what will be packed, as the checkpoint's config
    describes it. w_fp4: weights are all MXFP4. Raises ValueError, which names the weight and what is accepted, unless
    each can be dealt to the ranks.
    """
    parts: dict[str, Cut | None] = {}
    for fqn, described in linears.items():
        if "experts" not in described:
            parts[fqn] = _part_of_linear(fqn, described, dealing.tensors, w_fp4=w_fp4)
        elif is_experts(experts := modules.get(fqn.rpartition(".")[0])):  # else it is refused where it is to be put
            parts[fqn] = _part_of_experts(experts, fqn, described, dealing, w_fp4=w_fp4)
    return {fqn: cut for fqn, cut in parts.items() if cut is not None}


def _part_of_linear(fqn: str, described: Mapping[str, Any], ranks: Ranks, *, w_fp4: bool) -> Cut | None:
    style = ranks.style(fqn)
    if style in _COLUMNS:
        return _columns(fqn, described, ranks, w_fp4=w_fp4)
    if style in _ROWS:
        if described["out_features"] < ranks.size:
            raise ValueError(f"{fqn} has {described['out_features']} outputs, which {ranks.size} ranks can't share")
        each = -(-described["out_features"] // ranks.size)  # as torch.chunk does, by which biases are cut
        return Cut((_split(described),), rows=(slice(ranks.rank * each, (ranks.rank + 1) * each),))
    if style not in _WHOLE:
        known = ", ".join((*_ROWS, *_COLUMNS, "replicate"))
        raise ValueError(f"{fqn}: its style in tp_plan must be one of {known} for a packed linear, got {style!r}")
    return None


def _part_of_experts(
    experts: Any, fqn: str, described: Mapping[str, Any], dealing: Dealing, *, w_fp4: bool
) -> Cut | None:
    """Whole experts where there is a plan for experts; else rows of the first weight, and channels of the second."""
    (holder, _, name), (tensors, whole) = fqn.rpartition("."), dealing
    if whole.style(holder) is not None or whole.style(fqn) is not None:
        _check_styles(fqn, whole, "ep_plan", "ep_dispatch_experts", "grouped_gemm")
        if described["experts"] % whole.size:
            raise ValueError(f"{holder} has {described['experts']} experts, which ep_size={whole.size} does not divide")
        (own,) = own_rows(described["experts"], whole.rank, whole.size)
        return Cut((_split(described),), experts=own)
    if tensors.style(holder) in _WHOLE and tensors.style(fqn) in _WHOLE:
        return None
    along = ("rowwise", "colwise") if is_transposed(experts) else ("colwise", "rowwise")
    if name == "down_proj":
        _check_styles(fqn, tensors, "tp_plan", "moe_tp_experts", along[1])
        return _columns(fqn, described, tensors, w_fp4=w_fp4)
    halves = is_batched(experts) or (experts.has_gate and experts.is_concatenated)
    _check_styles(fqn, tensors, "tp_plan", "moe_tp_experts", f"packed_{along[0]}" if halves else along[0])
    if vars(experts).get("has_bias", False):
        raise ValueError(f"{holder}: packed experts with biases are dealt whole only: set ep_size, not tp_size alone")
    rows = own_rows(described["out_features"], tensors.rank, tensors.size, 2 if halves else 1)
    return Cut((_split(described),), rows=rows)


def _check_styles(fqn: str, ranks: Ranks, plan: str, of_module: str, of_weight: str) -> None:
    holder = fqn.rpartition(".")[0]
    for name, wanted in ((holder, of_module), (fqn, of_weight)):
        if (style := ranks.style(name)) != wanted:
            raise ValueError(f"{name}: its style in {plan} must be {wanted!r} for packed experts, got {style!r}")


def _columns(fqn: str, described: Mapping[str, Any], ranks: Ranks, *, w_fp4: bool) -> Cut:
    """Some of the input channels. Raises ValueError, with both numbers, if the ranks don't divide the shards."""
    split = _split(described)
    shards = shards_of(described, split, fqn) or (split,)
    check_ranks(len(shards), ranks.size, fqn)
    return Cut(shards, ranks.rank, ranks.size, w_fp4)


def _split(described: Mapping[str, Any]) -> Split:
    k4, k6, k8 = described["split"]
    return k4, k6, k8


def keep_own_part(linear: Any, fqn: str, parts: Mapping[str, Cut]) -> None:
    """Let an empty packed linear be the rank's part, if it keeps only one."""
    if fqn in parts:
        linear.keep_part(parts[fqn])
        linear._hf_quantized_needs_local_tp = True  # transformers then hands it plain tensors, with gradients or not


def keep_own_experts(experts: MicroMixExperts, holder: str, parts: Mapping[str, Cut]) -> None:
    """The same for the weights of a layer's experts."""
    for name in experts.layouts:
        if f"{holder}.{name}" in parts:
            experts.keep_part(name, parts[f"{holder}.{name}"])


def keep_own_orders(model: nn.Module, parts: Mapping[str, Cut]) -> set[str]:
    """Let packed weights whose channels are cut have the rank's part of their orders. Returns their names."""
    cut = {fqn: part for fqn, part in parts.items() if part.ranks > 1}
    for fqn, part in cut.items():
        holder, attribute = order_of(model, fqn)
        setattr(holder, attribute, ChannelOrder(part.order(getattr(holder, attribute).channel_perm)))
    return set(cut)


def check_whole(model: nn.Module) -> None:
    """Raise ValueError if this process holds a part of a packed model."""
    name, count = type(model).__name__, getattr(model, "_tp_size", None) or 1
    if count > 1:
        raise ValueError(f"{name} is dealt to {count} ranks, of which each holds a part: load it on one")
    if any(is_distributed(parameter) for parameter in model.parameters()):
        raise ValueError(f"{name} is sharded over processes, of which each holds a part: load it on one")

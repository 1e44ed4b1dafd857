"""How vLLM's mixtures of experts hold packed weights and multiply with them.

vLLM routes tokens to experts and adds up what ranks computed; what is between is here. A rank holds some of the
experts, whole (expert parallel), or of all experts the rows of the first weight and the channels of the second that are
its own (tensor parallel).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import MoEActivation, apply_moe_activation

from micromix_compile import ops
from micromix_compile.integrations.vllm.linear_method import cut_of
from micromix_compile.integrations.vllm.parameters import own_order
from micromix_compile.linear.experts import PARTS, sorted_by_expert
from micromix_compile.numerics.layout import PackedWeight, packed_shapes, split_of_weight, weight_split, weights_are_fp4
from micromix_compile.numerics.shards import own_rows
from micromix_compile.ops import prepared
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.shards import Cut

UP, DOWN = NAMES = ("gate_up_proj", "down_proj")
"""The weights of a layer's experts by their names in checkpoints: the first makes the gate's rows, then the others."""

ACTIVATIONS: Final = (MoEActivation.SILU, MoEActivation.GELU, MoEActivation.GELU_TANH)


class PackedExpertsMethod(FusedMoEMethodBase):  # type: ignore[misc]
    """The method of one of vLLM's `RoutedExperts`. weights: what the checkpoint says of `NAMES`, under these names.

    Raises ValueError, which names the layer, what it has and what is accepted, for experts that work otherwise.
    """

    def __init__(self, layer: Any, name: str, weights: Mapping[str, dict[str, Any]], config: MicroMixConfig) -> None:
        super().__init__(layer.moe_config)
        reason = _why_not(layer, weights)
        if reason is not None:
            raise ValueError(
                f"{name} has packed experts, and {reason}. Calibrate with a pattern in skip that matches it"
            )
        self._name, self._weights, self._config = name, weights, config

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Give the layer empty packed weights, and what loads them.

        Raises ValueError, which names the weight, if it is not of the layer's sizes, or can't be cut for its ranks.
        """
        parallel = self.moe.moe_parallel_config
        ranks, rank, inner = parallel.tp_size, parallel.tp_rank, intermediate_size_per_partition
        experts = [layer._map_global_expert_id_to_local_expert_id(e) for e in range(self.moe.num_experts)]
        here = [e for e, local in enumerate(experts) if local >= 0]
        assert [experts[e] for e in here] == list(range(num_experts)), "vLLM keeps a rank's experts in their order"
        sizes = {UP: (2 * inner * ranks, hidden_size), DOWN: (hidden_size, inner * ranks)}
        rows = {UP: own_rows(2 * inner * ranks, rank, ranks, 2), DOWN: (slice(None),)}
        layer.packed = nn.ModuleDict()
        for name in NAMES:
            described, fqn = self._weights[name], f"{self._name}.{name}"
            given = (described["experts"], described["out_features"], described["in_features"])
            if given != (self.moe.num_logical_experts, *sizes[name]):
                raise ValueError(f"{fqn} is (E, N, C) = {given}, vLLM's {(self.moe.num_logical_experts, *sizes[name])}")
            cut = cut_of(fqn, described, self._config, sizes[name][1], *((rank, ranks) if name == DOWN else (0, 1)))
            layer.packed[name] = PackedExperts(fqn, described, cut._replace(rows=rows[name]), here, self._config)
        layer.computes_in = params_dtype
        takers = {**layer.packed[UP].takers(UP), **layer.packed[DOWN].takers(DOWN)}
        layer.load_weights = partial(_load, self._name, takers)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Raises ValueError if something of the layer was not in the checkpoint."""
        for weight in layer.packed.values():
            weight.finish()
        target = target_of(layer.packed[UP].weight_scale.device, exact=self._config.exact)
        folds = target.takes == "folded" and layer.computes_in == torch.bfloat16
        layer.folded = {name: weight.fold() if folds else None for name, weight in layer.packed.items()}

    def get_fused_moe_quant_config(self, layer: Any) -> None:
        """None: no kernel of vLLM's is used."""
        return

    def apply(self, layer: Any, x: Tensor, topk_weights: Tensor, topk_ids: Tensor, *_: Any, **__: Any) -> Tensor:
        """x: (T, C) float. topk_weights, topk_ids: (T, k), of all experts. Returns (T, C), this rank's part."""
        up, down = (layer.packed[name] for name in NAMES)
        if layer.expert_map is not None:
            local = layer.expert_map[topk_ids.long()]
            topk_ids = torch.where(local < 0, up.experts, local)
        order, rows, offs = sorted_by_expert(topk_ids, up.experts)
        gate_up = up.multiply(layer.folded[UP], x, rows, offs)
        inner = gate_up.new_empty((len(rows), gate_up.shape[1] // 2))
        apply_moe_activation(layer.activation, inner, gate_up)
        each = torch.arange(len(rows), dtype=torch.int32, device=rows.device)
        out = down.multiply(layer.folded[DOWN], inner, each, offs)
        weighted = out * topk_weights.reshape(-1)[order].unsqueeze(-1)
        total: Tensor = weighted[torch.argsort(order)].view(*topk_ids.shape, out.shape[-1]).sum(1)
        return total.to(x.dtype)


def _why_not(layer: Any, weights: Mapping[str, Any]) -> str | None:
    """Why the experts of a layer can't be computed with packed weights; None if they can."""
    moe = layer.moe_config
    facts = (
        (
            type(layer) is RoutedExperts,
            f"vLLM loads its experts by a {type(layer).__name__}: accepted are RoutedExperts",
        ),
        (set(weights) == set(NAMES), f"the weights {', '.join(weights)}: accepted are {' and '.join(NAMES)}"),
        (
            moe.activation in ACTIVATIONS and moe.swiglu_limit is None,
            f"the activation {moe.activation.value}, limit {moe.swiglu_limit}: accepted are "
            f"{', '.join(one.value for one in ACTIVATIONS)}, without a limit",
        ),
        (not moe.has_bias, "its experts have biases: accepted are experts without"),
        (not layer.apply_router_weight_on_input, "its tokens are weighted before the experts: accepted is after them"),
    )
    return next((reason for fits, reason in facts if not fits), None)


def _load(
    name: str, takers: Mapping[str, Callable[[Tensor], None]], tensors: Iterable[tuple[str, Tensor]]
) -> Iterator[str]:
    """What vLLM calls, perhaps more than once: hands on a layer's tensors, and yields their names."""
    for own, tensor in tensors:
        if own not in takers:
            raise ValueError(f"{name}.{own} is none of the tensors of packed experts: {', '.join(takers)}")
        takers[own](tensor)
        yield own


class _Folded(NamedTuple):
    """What the folded operations want of packed experts beside their weight."""

    channel_perm: Tensor
    w_factor: Tensor
    w_row_scale: Tensor
    w_fp4: bool


class PackedExperts(nn.Module):
    """One weight of the experts that a rank holds: buffers as of a `PackedWeight` with a dimension of experts in front.

    cut: which of the checkpoint's rows and channels are the rank's; here: which experts.
    """

    def __init__(
        self, fqn: str, described: Mapping[str, Any], cut: Cut, here: Sequence[int], config: MicroMixConfig
    ) -> None:
        super().__init__()
        self._fqn, self._cut, self._here = fqn, cut, here
        self.experts, self._channels = len(here), described["in_features"]
        self.layout = config.row_layout(cut.split, cut.rotated(described.get("rotated", 0)))
        whole = weight_split(tuple(described["split"]), config.weights)
        self._shapes = packed_shapes(described["out_features"], whole, described["experts"])
        own = packed_shapes(
            cut.height(described["out_features"]), weight_split(cut.split, config.weights), self.experts
        )
        self._parts = [f"weight_{part}" for part in ("q4", "q6", "q8", "scale")]
        for name, shape in zip(self._parts, own, strict=True):
            self.register_buffer(name, torch.empty(shape, dtype=torch.uint8))
        self.register_buffer("channel_perm", torch.empty(sum(cut.split), dtype=torch.int32))
        self._missing = {f"{fqn}{part}" for part in PARTS} | {f"{fqn}_order.channel_perm"}

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        return PackedWeight(*(self.get_buffer(name) for name in self._parts))

    def takers(self, name: str) -> dict[str, Callable[[Tensor], None]]:
        """What takes each of the checkpoint's tensors of the weight `name`."""
        parts: dict[str, Callable[[Tensor], None]] = {name + PARTS[i]: partial(self._put, i) for i in range(len(PARTS))}
        return {**parts, f"{name}_order.channel_perm": self._put_order}

    def _put(self, part: int, tensor: Tensor) -> None:
        """One of the checkpoint's tensors, of all experts. Raises ValueError if it is not as config.json says."""
        name, wanted = self._fqn + PARTS[part], self._shapes[part]
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted:
            raise ValueError(f"{name} must be uint8 {wanted} by config.json, got {tensor.dtype} {tuple(tensor.shape)}")
        field, own = PackedWeight._fields[part], self.packed[part]
        for place, expert in zip(own, self._here, strict=True):
            place.copy_(self._cut.part(field, tensor[expert]))
        self._missing.discard(name)

    def _put_order(self, channel_perm: Tensor) -> None:
        """The order of all channels. Raises ValueError if it is none."""
        name = f"{self._fqn}_order.channel_perm"
        self.get_buffer("channel_perm").copy_(own_order(channel_perm, name, self._cut, self._channels))
        self._missing.discard(name)

    def finish(self) -> None:
        """Raise ValueError unless all of it was loaded."""
        if self._missing:
            raise ValueError(f"the checkpoint has no {min(self._missing)}: it is not whole, copy it anew")

    def fold(self) -> _Folded:
        """For `multiply`."""
        weight = self.packed
        w_split = split_of_weight(*weight[:3])
        factor, row_scale = prepared.folded_factors(*weight, fp6=self.layout.fp6)
        (order,) = prepared.short_order(self.get_buffer("channel_perm"))
        return _Folded(order, factor, row_scale, weights_are_fp4(self.layout.split, w_split))

    def multiply(self, folded: _Folded | None, x: Tensor, rows: Tensor, offs: Tensor) -> Tensor:
        """x: (T, C) of this rank -> (R, N): rows of it with the weights of their experts."""
        weight, fp6 = self.packed, self.layout.fp6
        if folded is None:
            quantized = ops.reorder_quantize(x, self.get_buffer("channel_perm"), *self.layout)
            return ops.grouped_mx_mm(*quantized, rows, offs, *weight, None, fp6, x.dtype)
        q, row_scale, _ = ops.reorder_fold(x, folded.channel_perm, *self.layout, folded.w_fp4)
        factors = (folded.w_factor, folded.w_row_scale)
        return ops.grouped_folded_mm(q, row_scale, rows, offs, *weight[:3], *factors, None, fp6, x.dtype)

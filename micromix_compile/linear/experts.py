"""Packed experts: what `quantize_` puts in a model instead of the experts of a layer.

transformers keeps the experts of a layer in one module, as Parameters with a leading dimension of experts, and says by
attributes of that module how they are used (`transformers.integrations.moe.use_experts_implementation`). Tokens are
quantized once, before they are sorted by expert; what the experts computed of them is quantized once more.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor, nn

from micromix_compile.linear.gradient import grouped_product
from micromix_compile.linear.packed import ChannelOrder
from micromix_compile.linear.replacing import take_over, why_special
from micromix_compile.linear.stated import differing_layouts, note_layouts
from micromix_compile.numerics import packing
from micromix_compile.numerics.layout import PackedWeight, packed_shapes, weight_split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.layout import RowLayout, Split
    from micromix_compile.numerics.shards import Cut

INTERFACE: Final = frozenset({"has_gate", "has_bias", "is_transposed", "is_concatenated", "_is_expert_parallel"})
"""Attributes by which transformers' experts say how they are used. 5.20 added `has_post_expert_norm`."""

BATCHED: Final = ("transformers.models.llama4.modeling_llama4.Llama4TextExperts",)
"""Experts without that interface: each multiplies as many rows, which come one expert behind the other, by
`gate_up_proj` (E, C, 2 I), the gate before the rest, and `down_proj` (E, I, C)."""

PARTS: Final = ("_q4", "_q6", "_q8", "")
"""What is behind a weight's name in the names of its packed tensors. The scales have the name itself: whoever loads
them as a plain weight is stopped by their shape."""


class ExpertsWeight(NamedTuple):
    """One weight of a layer's experts: N, C, how its channels are split, and how many are rotated."""

    out_features: int
    in_features: int
    split: Split
    rotated: int = 0


def is_experts(module: nn.Module | None) -> bool:
    """Whether it is a layer's experts as transformers has them."""
    return module is not None and (vars(module).keys() >= INTERFACE or is_batched(module))


def is_batched(module: nn.Module) -> bool:
    """Whether it is one of the classes of `BATCHED`."""
    return f"{type(module).__module__}.{type(module).__qualname__}" in BATCHED


def runs_in_a_loop(module: nn.Module | None) -> bool:
    """Whether transformers takes one of its experts after the other out of their weights, as it is set now."""
    if module is None or not vars(module).keys() >= {"has_bias", "is_transposed"}:  # all that transformers 5.0 sets
        return False
    return getattr(vars(module).get("config"), "_experts_implementation", None) == "eager"


def is_transposed(experts: Any) -> bool:
    """Whether the weights of a layer's experts are (E, C, N), and not (E, N, C)."""
    return is_batched(experts) or experts.is_transposed


def weight_names(experts: Any) -> tuple[str, str]:
    """The names of the two weights of a layer's experts, in the order in which they are used."""
    return ("gate_up_proj" if is_batched(experts) or experts.has_gate else "up_proj", "down_proj")


def expert_shapes(experts: Any) -> dict[str, tuple[int, int, int]]:
    """(E, N, C) by name, of the weights of transformers' experts."""
    shapes = {}
    for name in weight_names(experts):
        count, *matrix = getattr(experts, name).shape
        n, channels = reversed(matrix) if is_transposed(experts) else matrix
        shapes[name] = (count, n, channels)
    return shapes


def why_not_packed(module: nn.Module) -> str | None:
    """Why experts of transformers can't be packed, or None if they can."""
    names = weight_names(module)
    if any(not isinstance(module._parameters.get(name), nn.Parameter) for name in names):
        return f"its weights are not the Parameters {' and '.join(names)}"
    return why_special(module)


class MicroMixExperts(nn.Module):
    """The experts of a layer, which hold packed weights only, in the place of a module of transformers'.

    For each of its weights, called as there: buffers NAME_q4, NAME_q6, NAME_q8 and, for the scales, NAME, as in
    `PackedWeight`; NAME_order, a module that all which read the same activation may share. Biases, norms, activation
    functions and attributes are the original's. layouts: by weight.

    forward: as transformers': hidden_states (T, C) float, top_k_index (T, k) int, which experts each token goes to, and
    top_k_weights (T, k) -> (T, C) of the same dtype. An index of E or more is no expert here and gives zero. Gradients
    are as those of `MicroMixLinear`.
    """

    def __init__(self, original: nn.Module, weights: Mapping[str, ExpertsWeight], config: MicroMixConfig) -> None:
        """The tensors are on the meta device until `load_packed` is called. weights: by name, both of them."""
        super().__init__()
        self.experts_class: Any = type(original)
        shapes, device = expert_shapes(original), torch.device("meta")
        self.experts = shapes["down_proj"][0]
        self.layouts: dict[str, RowLayout] = {}
        for name, module in original._modules.items():
            self.register_module(name, module)
        for name, parameter in original._parameters.items():
            if name not in weights:
                self.register_parameter(name, parameter)
        for name, weight in weights.items():
            if shapes[name][1:] != weight[:2]:
                raise ValueError(f"{name} must be (E, N, C) with (N, C) = {weight[:2]}, got {shapes[name]}")
            self.layouts[name] = config.row_layout(weight.split, weight.rotated)
            packed = packed_shapes(weight.out_features, weight_split(weight.split, config.weights), self.experts)
            for part, shape in zip(PARTS, packed, strict=True):
                self.register_buffer(name + part, torch.empty(shape, dtype=torch.uint8, device=device))
            order = torch.empty(sum(weight.split), dtype=torch.int32, device=device)
            self.register_module(f"{name}_order", ChannelOrder(order))
        take_over(self, original)

    def packed(self, name: str) -> PackedWeight:
        """One of the weights, whose tensors are buffers, or Parameters after `packed_as_parameters_`."""
        q4, q6, q8, scale = (getattr(self, name + part) for part in PARTS)
        return PackedWeight(q4, q6, q8, scale)

    def load_packed(self, name: str, packed: PackedWeight, channel_perm: Tensor) -> None:
        """Take over packed tensors of one of the weights without a copy."""
        for part, tensor in zip(PARTS, packed, strict=True):
            setattr(self, name + part, tensor)
        setattr(self.get_submodule(f"{name}_order"), "channel_perm", channel_perm)  # noqa: B010

    def keep_part(self, name: str, cut: Cut) -> None:
        """Keep what one of several ranks holds of a weight. Its order stays: `cut.order` of it is the part's.

        num_experts, of which expert parallelism wants to know, becomes the number of those that are kept.
        """
        part, layout = cut.weight(self.packed(name)), self.layouts[name]
        self.layouts[name] = layout.of_split(cut.split, cut.rotated(layout.rotated))
        self.load_packed(name, part, self.get_buffer(f"{name}_order.channel_perm"))
        self.experts = self.num_experts = len(part.w_scale)

    def compact(self) -> None:
        """Move the packed tensors of each weight into one allocation, see `packing.in_one_storage`."""
        for name in self.layouts:
            parts = self.packed(name)
            own = packing.in_one_storage(parts, parts.w_scale.device)
            self.load_packed(name, PackedWeight(*own), self.get_buffer(f"{name}_order.channel_perm"))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but tensors that share an allocation get storages of their own, unless keep_vars."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_layouts(destination, prefix, self.layouts)
        for name in (f"{prefix}{name}{part}" for name in self.layouts for part in PARTS if not keep_vars):
            destination[name] = packing.with_own_storage(destination[name])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        """As usual. Bytes of other layouts are not loaded, and load_state_dict raises RuntimeError."""
        if differing := differing_layouts(metadata, prefix, self.layouts):
            args[-1].extend(differing)  # torch's error messages
            return
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, C) -> (T, C), under autocast in its dtype."""
        tokens, top_k = top_k_index.shape
        x = self._cast(hidden_states)
        order, rows, offs = sorted_by_expert(top_k_index, self.experts)
        up, down = self.layouts
        original: Any = self  # whose attributes it has
        inner = self._multiply(up, x, rows, offs)
        inner = self.experts_class._apply_gate(self, inner) if original.has_gate else original.act_fn(inner)
        out = self._multiply(down, inner, torch.arange(len(rows), dtype=torch.int32, device=rows.device), offs)
        if vars(self).get("has_post_expert_norm", False):
            out = original.post_expert_norm(out)
        weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        unsorted = weighted[torch.argsort(order)]
        return unsorted.view(tokens, top_k, out.shape[-1]).sum(1).to(hidden_states.dtype)

    def _cast(self, x: Tensor) -> Tensor:
        kind = x.device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):
            return x.to(torch.get_autocast_dtype(kind))
        return x

    def _multiply(self, name: str, x: Tensor, rows: Tensor, offs: Tensor) -> Tensor:
        """(R, N): rows of x with the weight `name` of their experts."""
        bias = self._parameters.get(f"{name}_bias")
        order = self.get_buffer(f"{name}_order.channel_perm")
        return grouped_product(x, rows, offs, bias, order, self.packed(name), self.layouts[name])

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        shown = []
        for name, (k4, k6, k8, fp6, _, activations, rotated) in self.layouts.items():
            formats = f"mxfp4={k4}, mxfp6={k6} ({fp6}), mxfp8={k8}, activations={activations}, rotated={rotated}"
            shown.append(f"{name}: {self.experts} x ({self.packed(name).w_scale.shape[1]}, {formats})")
        return "\n".join(shown)


class MicroMixBatchedExperts(MicroMixExperts):
    """The same in the place of a module of `BATCHED`, whose rows are sorted by expert already, as many of each.

    forward: as theirs: hidden_states (E * T, C) float -> (E * T, C) of the same dtype.
    """

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]
        """(E * T, C) -> (E * T, C), under autocast in its dtype."""
        x = self._cast(hidden_states)
        rows = torch.arange(len(x), dtype=torch.int32, device=x.device)
        offs = torch.arange(1, self.experts + 1, dtype=torch.int32, device=x.device) * (len(x) // self.experts)
        up, down = self.layouts
        gate, inner = self._multiply(up, x, rows, offs).chunk(2, dim=-1)
        original: Any = self  # whose attributes it has
        return self._multiply(down, inner * original.act_fn(gate), rows, offs)


def in_place_of(original: nn.Module, weights: Mapping[str, ExpertsWeight], config: MicroMixConfig) -> MicroMixExperts:
    """Packed experts, still empty, as `MicroMixExperts` makes them, of the class that is called as `original` is."""
    made = MicroMixBatchedExperts if is_batched(original) else MicroMixExperts
    return made(original, weights, config)


def sorted_by_expert(top_k_index: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of a token and an expert in the order of the experts, without a wait for the device.

    top_k_index: (T, k) int. Returns which pair comes when, (T * k,) int64; `rows`, the pairs' tokens, (T * k,) int32;
    and `offs`, where each expert's end, (E,) int32. Behind the last are those of experts that there are not.
    """
    chosen, order = torch.sort(top_k_index.reshape(-1), stable=True)
    each = torch.arange(experts, dtype=chosen.dtype, device=chosen.device)
    offs = torch.searchsorted(chosen, each, right=True, out_int32=True)
    return order, (order // top_k_index.shape[1]).to(torch.int32), offs

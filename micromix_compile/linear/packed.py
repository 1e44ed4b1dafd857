"""Packed linear layers: what `quantize_` puts in a model instead of its linears."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from micromix_compile.linear.dequantized import DequantizedWeight
from micromix_compile.linear.gradient import packed_product
from micromix_compile.linear.stated import differing_layouts, note_layouts
from micromix_compile.numerics import packing
from micromix_compile.numerics.layout import PackedWeight, Split, packed_shapes, weight_split

if TYPE_CHECKING:
    from collections.abc import Callable

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.shards import Cut


class ChannelOrder(nn.Module):
    """The order of one activation's channels: channel_perm (K,) int32.

    A module and not a buffer of each linear, because a move to another device keeps shared modules shared.
    """

    channel_perm: Tensor

    def __init__(self, channel_perm: Tensor) -> None:
        super().__init__()
        self.register_buffer("channel_perm", channel_perm)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but a copy for each linear that shares it: checkpoint formats refuse tensors that share memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}channel_perm"] = destination[f"{prefix}channel_perm"].clone()


class _WeightReader:
    """`module.weight` of a packed linear. While a checkpoint is loaded: the buffer called so, once it is filled."""

    def __get__(self, module: MicroMixLinear | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        loading = module._buffers.get("weight")
        if module.stand_in is not None and (loading is None or loading.is_meta):
            return module.stand_in
        return module.dequantized() if loading is None else loading


class MicroMixLinear(nn.Linear):
    """A linear layer that holds packed weights only.

    order: one module shared by all linears of a group. Buffers: weight_q4, weight_q6, weight_q8 and weight_scale as in
    `PackedWeight`. bias: (N,) or None. weight: (N, C), made from these whenever it is read, and read-only; weight_dtype
    is its dtype, that of the weight which was packed, and follows conversions of the module. rows, channels: N and C of
    what it holds, which is less than out_features and in_features after `keep_part`.

    forward: (..., C) float -> (..., N) of the same dtype. The gradient with respect to the input and the bias is that
    of the dequantized weight; packed weights have none, so that adapters around them can be trained, not they.
    """

    weight_q4: Tensor
    weight_q6: Tensor
    weight_q8: Tensor
    weight_scale: Tensor
    stand_in: Tensor | None = None
    """While a checkpoint is loaded: what `weight` is before it has come."""

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        split: Split,
        rotated: int = 0,
        config: MicroMixConfig,
        bias: nn.Parameter | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self.rows, self.channels = out_features, in_features
        self.layout = config.row_layout(split, rotated)
        self.weight_dtype = dtype or torch.get_default_dtype()
        self.order = ChannelOrder(torch.empty(sum(split), dtype=torch.int32, device=device))
        shapes = packed_shapes(out_features, weight_split(split, config.weights))
        for name, shape in zip(("q4", "q6", "q8", "scale"), shapes, strict=True):
            self.register_buffer(f"weight_{name}", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_parameter("bias", bias)

    if not TYPE_CHECKING:
        weight = _WeightReader()

    @property
    def split(self) -> Split:
        """(k4, k6, k8)."""
        return self.layout.split

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Of `weight`: (N, C)."""
        return self.rows, self.channels

    def dequantized(self) -> Tensor:
        """The weight (N, C) in the model's order of channels, as `weight_dtype`; its values are made when read."""
        if torch.compiler.is_compiling():
            return self._dequantize()  # an operation of the graph, which goes away where only the dtype is read
        return DequantizedWeight(self._dequantize, self.weight_shape, self.weight_dtype, self.weight_scale.device)

    def _dequantize(self) -> Tensor:
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale, self.order.channel_perm)
        out: Tensor = torch.ops.micromix.dequantize_weight(
            *weight, self.channels, self.layout.fp6, self.layout.rotated, self.weight_dtype
        )
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for `weight`, unless a buffer is called so: forward would not use it."""
        if name == "weight" and name not in self._buffers:
            raise AttributeError("the weight of a packed linear can't be set: put an nn.Linear in its place")
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As usual. A buffer called `weight` hides the packed one as long as it is there."""
        if name == "weight":
            self._buffers.setdefault(name, None)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        converted = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_scale.device))
        self.weight_dtype = converted.dtype
        return self

    def load_packed(self, packed: PackedWeight, channel_perm: Tensor) -> None:
        """Take over packed tensors without a copy."""
        self.order.channel_perm = channel_perm
        self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale = packed

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but the scales are called `weight`, and tensors that share an allocation get storages of their own.

        Whoever loads these tensors as a plain linear is stopped by the shape of `weight`. Formats that refuse tensors
        that share memory would refuse all of one allocation. With keep_vars the buffers themselves are asked for.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        note_layouts(destination, prefix, {"weight": self.layout})
        if keep_vars or self.stand_in is not None:  # the latter while transformers sets one tensor after the other
            return
        destination[f"{prefix}weight"] = destination.pop(f"{prefix}weight_scale")
        for name in ("weight_q4", "weight_q6", "weight_q8", "weight"):
            destination[f"{prefix}{name}"] = packing.with_own_storage(destination[f"{prefix}{name}"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, metadata: Any, *args: Any) -> None:
        """As usual; the scales are `weight`, or `weight_scale` as older versions wrote them.

        Bytes of another layout than the module's are not loaded, and load_state_dict raises RuntimeError.
        """
        if differing := differing_layouts(metadata, prefix, {"weight": self.layout}):
            args[-1].extend(differing)  # torch's error messages
            return
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight_scale"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, metadata, *args)

    def compact(self) -> None:
        """Move the packed tensors into one allocation, see `packing.in_one_storage`."""
        parts = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        self.load_packed(PackedWeight(*packing.in_one_storage(parts, parts[0].device)), self.order.channel_perm)

    def keep_part(self, cut: Cut) -> None:
        """Keep what one of several ranks holds of the weight. The order stays: `cut.order` of it is the part's.

        in_features and out_features stay those of the whole, of which tensor parallelism wants to know.
        """
        whole = PackedWeight(self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        self.rows = cut.height(self.rows)
        self.channels //= cut.ranks
        self.layout = self.layout.of_split(cut.split, cut.rotated(self.layout.rotated))
        self.load_packed(cut.weight(whole), self.order.channel_perm)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N), under autocast in its dtype. Raises ValueError for another C."""
        if x.shape[-1] != self.channels:
            raise ValueError(f"x must have {self.channels} channels, got shape {tuple(x.shape)}")
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        rows = x.reshape(-1, self.channels)
        out = packed_product(rows, self.bias, self.order.channel_perm, weight, self.layout)
        return out.reshape(*x.shape[:-1], self.rows)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        k4, k6, k8, fp6, _, activations, rotated = self.layout
        formats = f"mxfp4={k4}, mxfp6={k6} ({fp6}), mxfp8={k8}"
        return f"{self.in_features}, {self.out_features}, {formats}, activations={activations}, rotated={rotated}"

"""The parameters by whose names vLLM loads a packed linear: each puts what it is given into the linears that hold it.

They are empty themselves. vLLM cuts and merges by rows, through the methods of its own parameters; the columns of a
rank, and the linear in which a row belongs, are found here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from vllm.model_executor.parameter import BasevLLMParameter

from micromix_compile.numerics.layout import PackedWeight, packed_shapes, weight_split
from micromix_compile.numerics.shards import total
from micromix_compile.recipe.orders import check_order
from micromix_compile.recipe.schema import FieldError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from torch import Tensor

    from micromix_compile.linear.packed import MicroMixLinear
    from micromix_compile.numerics.shards import Cut

FIELDS: Final = {"weight_q4": "w4", "weight_q6": "w6", "weight_q8": "w8", "weight": "w_scale"}
"""The fields of a `PackedWeight` by the names of tensors in checkpoints."""

_QKV: Final = ("q", "k", "v")


def own_order(channel_perm: Tensor, name: str, cut: Cut, channels: int) -> Tensor:
    """The rank's part of an order of all channels. Raises ValueError, which begins with `name`, if it is no such."""
    try:
        check_order(channel_perm, channels, name, cut.shards if len(cut.shards) > 1 else ())
    except FieldError as error:
        raise ValueError(f"the checkpoint is not whole: {error}") from error
    return cut.order(channel_perm)


class Run:
    """Parts of a layer, one behind the other, that are one packed linear.

    start: its first row in the layer of this rank. parts: the rows of each part by the checkpoint's name. cut: what the
    rank takes of its channels.
    """

    def __init__(self, start: int, parts: Mapping[str, int], cut: Cut, linear: MicroMixLinear) -> None:
        self.start, self.parts, self.linear = start, parts, linear
        self._cut = cut
        self._loaded = dict.fromkeys(FIELDS, 0)
        self._orders: dict[str, Tensor] = {}

    @property
    def stop(self) -> int:
        """The row behind its last one."""
        return self.start + self.linear.out_features

    def put(self, name: str, tensor: Tensor, start: int) -> None:
        """Rows of a checkpoint's tensor, all columns, become rows from `start` on of the layer.

        Raises ValueError if its dtype or columns are not what config.json says.
        """
        place = self.linear.get_buffer("weight_scale" if name == "weight" else name)
        rows = int(name == "weight_q6")  # the dimension of rows
        self._check(name, tensor, rows)
        own = self._cut.part(FIELDS[name], tensor)
        place.narrow(rows, start - self.start, tensor.shape[rows]).copy_(own)
        self._loaded[name] += tensor.shape[rows]

    def put_order(self, part: str, channel_perm: Tensor) -> None:
        """The order of all channels, as the checkpoint has it for one of the parts. Raises ValueError if it is none."""
        name = f"{part}.order.channel_perm"
        own = own_order(channel_perm, name, self._cut, self.linear.in_features * self._cut.ranks)
        first = next(iter(self._orders.values()), channel_perm)
        if not torch.equal(channel_perm, first):
            raise ValueError(f"{name} must be the order of its group, which {next(iter(self._orders))} has: copy it")
        self._orders[part] = channel_perm
        self.linear.order.channel_perm.copy_(own)

    def finish(self) -> None:
        """Raise ValueError unless all of it was loaded; from then on nothing of the checkpoint is kept."""
        names = "/".join(self.parts)
        for name, rows in self._loaded.items():
            if rows != self.linear.out_features:
                raise ValueError(f"the checkpoint has {rows} of {self.linear.out_features} rows of {names}.{name}")
        for part in self.parts:
            if part not in self._orders:
                raise ValueError(f"the checkpoint has no {part}.order.channel_perm: it is not whole, copy it anew")
        self._orders.clear()
        self.linear.compact()

    def _check(self, name: str, tensor: Tensor, rows: int) -> None:
        split = weight_split(total(self._cut.shards), "mxfp4" if self._cut.w_fp4 else "same")
        shapes = packed_shapes(tensor.shape[rows], split)
        wanted = shapes[PackedWeight._fields.index(FIELDS[name])]
        if tensor.dtype != torch.uint8 or tuple(tensor.shape) != wanted:
            got = f"{tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{'/'.join(self.parts)}.{name} must be uint8 {wanted} by config.json, got {got}")


class _StandIn(BasevLLMParameter):  # type: ignore[misc]
    """An empty parameter that hands on what it is given."""

    def __new__(cls, *_: Any, dtype: torch.dtype, **__: Any) -> Any:
        """Parameters are made with their data."""
        return super().__new__(cls, torch.empty(0, dtype=dtype))


class PackedParameter(_StandIn):
    """One of a checkpoint's packed tensors: uint8, (N, columns), or (3, N, columns) for MXFP6. name: of `FIELDS`."""

    def __new__(cls, *args: Any, **_: Any) -> Any:
        """See `_StandIn`."""
        return super().__new__(cls, dtype=torch.uint8)

    def __init__(self, name: str, runs: Sequence[Run], weight_loader: Callable[..., None]) -> None:
        super().__init__(data=self.data, weight_loader=weight_loader)
        self._name, self._runs = name, runs

    @property
    def output_dim(self) -> int:
        """The dimension of rows, by which vLLM takes apart what is merged in the checkpoint."""
        return int(self._name == "weight_q6")

    def load_whole(self, loaded_weight: Tensor) -> None:
        """All rows, on every rank alike."""
        self._put(loaded_weight, 0, 0, loaded_weight.shape[self.output_dim])

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The rank's rows of a linear that is cut along N."""
        rows = self._runs[-1].stop
        self._put(loaded_weight, self.tp_rank * rows, 0, rows)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """All rows of a linear that is cut along K: `Run` takes the rank's columns."""
        self.load_whole(loaded_weight)

    def load_merged_column_weight(self, loaded_weight: Tensor, *, shard_offset: int, shard_size: int, **_: Any) -> None:
        """The rank's rows of one part; they come to lie at `shard_offset`."""
        self._put(loaded_weight, self.tp_rank * shard_size, shard_offset, shard_size)

    def load_qkv_weight(
        self, loaded_weight: Tensor, *, shard_offset: int, shard_size: int, shard_id: str, num_heads: int, **_: Any
    ) -> None:
        """The same; `num_heads` ranks hold the same heads of keys and values."""
        rank = self.tp_rank if shard_id == "q" else self.tp_rank // num_heads
        self._put(loaded_weight, rank * shard_size, shard_offset, shard_size)

    def _put(self, tensor: Tensor, source: int, start: int, rows: int) -> None:
        run = next(run for run in self._runs if run.start <= start < run.stop)
        there = tensor.shape[self.output_dim]
        if source + rows > there or start + rows > run.stop:
            raise ValueError(
                f"{'/'.join(run.parts)}.{self._name} has {there} rows, which are not those of vLLM's layer"
            )
        run.put(self._name, tensor.narrow(self.output_dim, source, rows), start)


class OrderParameter(_StandIn):
    """The orders of a layer's parts: int32 (K,) each, the same for all parts of a run."""

    def __new__(cls, *args: Any, **_: Any) -> Any:
        """See `_StandIn`."""
        return super().__new__(cls, dtype=torch.int32)

    def __init__(self, runs: Sequence[Run]) -> None:
        super().__init__(data=self.data, weight_loader=self._load)
        self._parts = [(run, part) for run in runs for part in run.parts]

    def _load(self, _: OrderParameter, loaded_weight: Tensor, shard_id: str | int | None = None) -> None:
        """What vLLM calls. shard_id: of the part; None where there is one."""
        index = _QKV.index(shard_id) if isinstance(shard_id, str) else shard_id or 0
        run, part = self._parts[index]
        run.put_order(part, loaded_weight)

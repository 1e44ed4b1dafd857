"""FSDP2 (`torch.distributed.fsdp.fully_shard`) of packed models.

    micromix.packed_as_parameters_(model)
    for layer in model.model.layers:
        fully_shard(layer, shard_placement_fn=micromix.by_rows)
    fully_shard(model, shard_placement_fn=micromix.by_rows)

FSDP2 shards Parameters, and packed tensors are buffers: without the first line each process holds all of them, and the
rest of the model is sharded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import distributed, nn

from micromix_compile.linear.experts import PARTS, MicroMixExperts
from micromix_compile.linear.packed import MicroMixLinear

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.distributed.tensor import Shard


def packed_as_parameters_(model: nn.Module) -> nn.Module:
    """Let the packed tensors of a model be frozen Parameters (uint8), so that FSDP2 shards them. Returns `model`.

    Each gets an allocation of its own. Empty ones, of formats that a linear has no channels in, stay buffers, and so do
    orders. Outputs stay the same, to the bit. Raises ValueError if nothing in the model is packed.
    """
    found = [(module, name) for module in model.modules() for name in _packed_tensors(module)]
    if not found:
        raise ValueError(f"{type(model).__name__} holds no packed linears: quantize_ it first")
    for module, name in found:
        tensor = module._buffers[name]
        if tensor is not None and tensor.numel():
            del module._buffers[name]
            module.register_parameter(name, nn.Parameter(tensor.clone(), requires_grad=False))
    return model


def by_rows(parameter: nn.Parameter) -> Shard | None:
    """`shard_placement_fn` of `fully_shard`: MXFP6 weights (3, N, K / 4) by their rows, not by their planes of bits.

    FSDP2 wants equal parts there: where the processes do not divide N, these are sharded by planes, as is its default.
    """
    from torch.distributed.tensor import Shard

    is_mxfp6 = parameter.dtype == torch.uint8 and parameter.dim() == 3 and parameter.shape[0] == 3
    even = is_mxfp6 and parameter.shape[1] % distributed.get_world_size() == 0
    return Shard(1) if even else None


def _packed_tensors(module: nn.Module) -> Iterator[str]:
    """Names of buffers."""
    names: tuple[str, ...] = ()
    if isinstance(module, MicroMixLinear):
        names = ("weight_q4", "weight_q6", "weight_q8", "weight_scale")
    elif isinstance(module, MicroMixExperts):
        names = tuple(name + part for name in module.layouts for part in PARTS)
    yield from (name for name in names if name in module._buffers)

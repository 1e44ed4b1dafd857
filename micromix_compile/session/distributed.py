"""Models whose weights are spread over processes: refused by name, for their linears are no plain matrices."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.linear.experts import MicroMixExperts
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.lowering.torch_private.dynamo import WITHOUT_DDP_OPTIMIZER
from micromix_compile.lowering.torch_private.tensors import is_fake

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import nn


WRAPPERS: Final = (
    ("torch.distributed.fsdp", "FullyShardedDataParallel"),
    ("torch.distributed.fsdp", "FSDPModule"),
    ("torch.nn.parallel", "DistributedDataParallel"),
)


def check_not_distributed(model: nn.Module, around: Iterable[nn.Module] = ()) -> None:
    """Raise ValueError if `model` is sharded (tensor parallel, FSDP), or is, holds or runs in a wrapper that does so.

    A model that is packed may be sharded: nothing of it will be quantized. around: modules in which it runs.
    """
    name = type(model).__name__
    for module in (*model.modules(), *around):
        wrapper = next((w for home, w in WRAPPERS if _is_a(module, home, w)), None)
        if wrapper is not None:
            raise ValueError(
                f"{name} can't be quantized under {wrapper} (on {type(module).__name__}): quantize the plain module on "
                f"each process"
            )
    if is_packed(model):
        return
    for parameter_name, parameter in model.named_parameters():
        if is_distributed(parameter):
            raise ValueError(
                f"{name} can't be quantized: its weight {parameter_name} {tuple(parameter.shape)} is a DTensor (tensor "
                f"parallel or FSDP2), and only plain tensors are supported"
            )


def is_packed(model: nn.Module) -> bool:
    """Whether it holds packed weights."""
    return any(isinstance(module, MicroMixLinear | MicroMixExperts) for module in model.modules())


def is_distributed(parameter: object) -> bool:
    """Whether it is a DTensor."""
    return _is_a(parameter, "torch.distributed.tensor", "DTensor")


def _is_a(value: object, home: str, name: str) -> bool:
    """isinstance without an import: what nobody has imported nobody uses."""
    kind = getattr(sys.modules.get(home), name, None)
    return kind is not None and isinstance(value, kind)


def check_real(example_inputs: Iterable[Any]) -> None:
    """Raise ValueError if a graph's inputs are fake: torch's DDPOptimizer hands over such."""
    if any(map(is_fake, example_inputs)):
        raise ValueError(
            "the graph's inputs are fake tensors, as DistributedDataParallel's graph splitting makes them: compile the "
            f"module outside of DistributedDataParallel, or set {WITHOUT_DDP_OPTIMIZER}"
        )

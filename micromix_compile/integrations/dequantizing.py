"""`model.dequantize()`: a packed model of transformers as a plain one again, with the values that its weights have."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from micromix_compile.integrations.tensor_parallel import check_whole
from micromix_compile.linear.convolution import POINTWISE
from micromix_compile.linear.experts import MicroMixExperts, is_transposed
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.linear.replacing import replace, take_over_hooks

if TYPE_CHECKING:
    from torch import Tensor


def dequantize_(model: Any, dtype: torch.dtype | str | None = None) -> nn.Module:
    """Put modules of the original classes in the places of packed ones, once all are made. Returns `model`.

    dtype: of the weights, or its name; None for what they had before they were packed. Raises ValueError if this
    process holds a part of the model only.
    """
    check_whole(model)
    wanted: torch.dtype | None = getattr(torch, dtype) if isinstance(dtype, str) else dtype
    modules, originals = dict(model.named_modules()), _originals(model)
    plain: dict[str, nn.Module] = {}
    for name, module in modules.items():
        if isinstance(module, MicroMixLinear | MicroMixExperts):
            plain[name] = originals.get_submodule(name)
            _fill(plain[name], module, wanted)
            take_over_hooks(plain[name], module)
    replace(modules, plain)
    return model  # type: ignore[no-any-return]


def _originals(model: Any) -> nn.Module:
    """A model of the same class without weights."""
    config = copy.deepcopy(model.config)
    vars(config).pop("quantization_config", None)
    with torch.device("meta"):
        made: nn.Module = type(model)(config)
    return made


@torch.no_grad()
def _fill(original: Any, packed: MicroMixLinear | MicroMixExperts, dtype: torch.dtype | None) -> None:
    """Give a module the weights of the packed one, and the very Parameters and modules that this has beside them."""
    if isinstance(packed, MicroMixLinear):
        matrix = packed.dequantized() + 0
        weights = {"weight": matrix if isinstance(original, (nn.Linear, *POINTWISE)) else matrix.T}  # GPT-2's: (C, N)
    else:
        stacked = {name: experts_weight(packed, name, getattr(original, name).dtype) for name in packed.layouts}
        weights = {name: w.mT if is_transposed(original) else w for name, w in stacked.items()}
        original._modules.update({name: packed._modules[name] for name in original._modules})
    kept = {name: p for name, p in packed._parameters.items() if p is not None and name in original._parameters}
    original._parameters.update(kept)
    for name, weight in weights.items():
        original._parameters[name] = nn.Parameter(weight.to(dtype or weight.dtype).contiguous())


def experts_weight(packed: MicroMixExperts, name: str, dtype: torch.dtype) -> Tensor:
    """(E, N, C) of a weight of packed experts, in the model's order of channels."""
    order, layout = packed.get_buffer(f"{name}_order.channel_perm"), packed.layouts[name]
    channels = int((order >= 0).sum())
    each = [
        torch.ops.micromix.dequantize_weight(*parts, order, channels, layout.fp6, layout.rotated, dtype)
        for parts in zip(*packed.packed(name), strict=True)
    ]
    return torch.stack(each)

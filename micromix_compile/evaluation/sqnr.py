"""How much noise quantization adds to the output of each linear."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.linear.packed import MicroMixLinear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn


@torch.inference_mode()
def linear_sqnr(model: nn.Module, packed: nn.Module, windows: Tensor) -> dict[str, float]:
    """Signal to quantization noise of each packed linear's output, in dB, on the unquantized model's own inputs.

    model: unquantized. packed: the same model after `quantize_`. windows: (W, T) int64. Linears that were not reached
    are left out. An error of zero gives infinity.
    """
    sums: dict[str, Tensor] = {}

    def compare(name: str, linear: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            exact = output.to(torch.float32)
            noise = linear(args[0]).to(torch.float32) - exact
            energies = torch.stack((exact.square().sum(), noise.square().sum())).to("cpu", torch.float64)
            sums[name] = sums[name] + energies if name in sums else energies

        return hook

    modules = dict(model.named_modules())
    handles = [
        modules[name].register_forward_hook(compare(name, linear))
        for name, linear in packed.named_modules()
        if isinstance(linear, MicroMixLinear)
    ]
    try:
        for window in windows.split(1):
            model(input_ids=window, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float(10 * torch.log10(signal / noise)) for name, (signal, noise) in sums.items()}

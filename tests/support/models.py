"""Small models and an independent fake-quantized twin of any model, for the tests of passes and backend."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from micromix_compile.numerics import reference, rotation
from micromix_compile.numerics.layout import weight_split

if TYPE_CHECKING:
    from micromix_compile.recipe.types import LinearRecipe, Recipe


EXACT_DTYPE = torch.bfloat16 if torch.__version__ >= "2.13" else torch.float32
"""A dtype in which compiled small models equal eager ones; before 2.13 Inductor keeps bfloat16 chains in float32."""


def default_tokenizer() -> Any:
    """The tokenizer of the default model, without the model."""
    from transformers import AutoTokenizer

    from micromix_compile.evaluation import zoo

    return AutoTokenizer.from_pretrained(zoo.default_model_dir(progress=False), local_files_only=True)


class RMSNorm(nn.Module):
    """As in Hugging Face's Llama."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(1 + 0.1 * torch.randn(channels))

    def forward(self, x: Tensor) -> Tensor:
        h = x.to(torch.float32)
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-6)
        return self.weight * h.to(x.dtype)


class Block(nn.Module):
    """Norm, two linears that share its output (one with a bias), a product, a linear back, a residual."""

    def __init__(self, channels: int, hidden: int, *, breaks: bool = False) -> None:
        super().__init__()
        self.norm = RMSNorm(channels)
        self.gate = nn.Linear(channels, hidden)
        self.up = nn.Linear(channels, hidden, bias=False)
        self.down = nn.Linear(hidden, channels, bias=False)
        self.breaks = breaks

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        h = torch.nn.functional.silu(self.gate(y)) * self.up(y)
        if self.breaks:
            torch._dynamo.graph_break()
        return x + self.down(h)


class Net(nn.Module):
    """A stack of blocks in a Python loop, and a head that is skipped by its name."""

    def __init__(self, *, layers: int = 2, channels: int = 64, hidden: int = 96, breaks: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(channels, hidden, breaks=breaks) for _ in range(layers))
        self.lm_head = nn.Linear(channels, 16, bias=False)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        if attention_mask is not None:
            x = x * attention_mask.unsqueeze(-1).to(x.dtype)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def make_net(dtype: torch.dtype = torch.float32, **sizes: object) -> Net:
    """A `Net` in eval mode whose channels differ in scale, so that splits use all three formats."""
    net = Net(**sizes).eval()  # type: ignore[arg-type]
    with torch.no_grad():
        for block in net.layers:
            block.norm.weight *= torch.exp(2 * torch.randn_like(block.norm.weight))  # type: ignore[operator]
    return net.to(dtype)


class FakeQuantLinear(nn.Module):
    """A linear of the recipe in plain PyTorch: quantize, dequantize, multiply. Shares nothing with the ops."""

    def __init__(self, weight: Tensor, bias: Tensor | None, linear: LinearRecipe, recipe: Recipe) -> None:
        super().__init__()
        self.linear, self.config, self.bias = linear, recipe.config, bias
        if linear.fqn in recipe.packed:
            self.weight = reference.dequantize_weight(*recipe.packed[linear.fqn], recipe.config.fp6)
        else:
            sorted_weight = reference.reorder(weight, linear.group.channel_perm).to(torch.float32)
            rotated = rotation.rotate_weight(sorted_weight, linear.group.rotated)
            self.weight = self._to_formats(rotated, weight_split(linear.split, recipe.config.weights))

    def _fake_activation(self, x: Tensor) -> Tensor:
        y = reference.reorder(x, self.linear.group.channel_perm).to(torch.float32)
        y = rotation.rotate_activation(y, self.linear.group.rotated)
        k4, k6, k8 = self.linear.split
        if self.config.activations == "fp8":  # a row is one block
            byte = reference.row_scale_byte(x, self.config.scale_rounding)[:, None]
            scale = reference.scale_value(byte)
            return (y / scale).clamp(-448, 448).to(torch.float8_e4m3fn).to(torch.float32) * scale
        return self._to_formats(y, (0, k4 + k6, k8) if self.config.activations == "mxfp6" else (k4, k6, k8))

    def _to_formats(self, y: Tensor, split: tuple[int, int, int]) -> Tensor:
        parts = []
        for part, name in zip(y.split(list(split), dim=1), ("e2m1", self.config.fp6, "e4m3"), strict=True):
            codes, scale = reference.quantize(part, name, scale_rounding=self.config.scale_rounding)
            parts.append(reference.dequantize(codes, scale, name))
        return torch.cat(parts, dim=1)

    def forward(self, x: Tensor) -> Tensor:
        rows = self._fake_activation(x.reshape(-1, x.shape[-1]))
        out = rows @ self.weight.T
        if self.bias is not None:
            out = out + self.bias.float()
        return out.to(x.dtype).reshape(*x.shape[:-1], -1)


def fake_quantized(model: nn.Module, recipe: Recipe) -> nn.Module:
    """A copy of `model` whose linears of the recipe are `FakeQuantLinear`."""
    twin = copy.deepcopy(model)
    for fqn, linear in recipe.linears.items():
        parent, _, child = fqn.rpartition(".")
        old = twin.get_submodule(fqn)
        assert isinstance(old, nn.Module), fqn
        weight = old.weight.detach() if isinstance(old, nn.Linear) else old.weight.detach().T
        setattr(twin.get_submodule(parent), child, FakeQuantLinear(weight, old.bias, linear, recipe))
    return twin

"""Packed attention: what `quantize_` puts in a model instead of an nn.MultiheadAttention.

torch.nn hands both of its weights to a function, of which one is for queries, keys and values. Here both are linears.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from micromix_compile.linear.replacing import take_over, why_special

if TYPE_CHECKING:
    from micromix_compile.linear.packed import MicroMixLinear

IN_PROJ, OUT_PROJ = "in_proj_weight", "out_proj"
"""The names of its weights."""


def why_not_attention(attention: nn.MultiheadAttention) -> str | None:
    """Why it can't be packed, or None if it can."""
    if type(attention) is not nn.MultiheadAttention:
        return f"it is of a {type(attention).__qualname__}, not of an nn.MultiheadAttention"
    if not attention._qkv_same_embed_dim:
        return "its attention has weights of their own for queries, keys and values"
    if attention.bias_k is not None or attention.add_zero_attn:
        return "its attention has add_bias_kv or add_zero_attn"
    return why_special(attention) or why_special(attention.out_proj)


class MicroMixAttention(nn.Module):
    """Attention of torch.nn whose linears `in_proj` (C -> 3 C) and `out_proj` (C -> C) are packed; it is never trained.

    forward: as nn.MultiheadAttention's, in evaluation: query (B, T, C), key and value (B, S, C) float, time first
    unless `batch_first`, or without B; key_padding_mask (B, S) and attn_mask (T, S) or (B * heads, T, S), bool (True:
    not looked at) or float (added). Returns the same shape as query's, and (B, T, S) weights, (B, heads, T, S) if not
    averaged, or None. Raises ValueError for is_causal without attn_mask.
    """

    def __init__(self, original: nn.MultiheadAttention, in_proj: MicroMixLinear, out_proj: MicroMixLinear) -> None:
        super().__init__()
        self.embed_dim, self.num_heads = original.embed_dim, original.num_heads
        self.batch_first = original.batch_first
        self.in_proj, self.out_proj = in_proj, out_proj
        take_over(self, original)

    @property
    def in_proj_bias(self) -> nn.Parameter | None:
        """Of `in_proj`; encoders of torch.nn ask for it."""
        return self.in_proj.bias

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """See the class."""
        if is_causal and attn_mask is None:
            raise ValueError("is_causal needs attn_mask, which it describes: got None")
        q, k, v = (self._by_heads(x) for x in self._projected(query, key, value))
        mask = self._mask(key_padding_mask, attn_mask, q)
        weights = None
        if need_weights:
            scores = (q * q.shape[-1] ** -0.5) @ k.mT
            weights = (scores if mask is None else scores + mask).softmax(-1)
            out = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if query.dim() == 2:
            return out.squeeze(0), None if weights is None else weights.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), weights

    def _projected(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, as they were given; one product where they are one tensor."""
        if query is key and key is value:
            return tuple(self.in_proj(query).chunk(3, dim=-1))
        return tuple(self.in_proj(x).chunk(3, dim=-1)[part] for part, x in enumerate((query, key, value)))

    def _by_heads(self, x: Tensor) -> Tensor:
        """(B, heads, T, C / heads)."""
        batched = x.unsqueeze(0) if x.dim() == 2 else x if self.batch_first else x.transpose(0, 1)
        return batched.reshape(*batched.shape[:2], self.num_heads, -1).transpose(1, 2)

    def _mask(self, padding: Tensor | None, attention: Tensor | None, q: Tensor) -> Tensor | None:
        """What is added to scores (B, heads, T, S)."""
        mask = None
        if attention is not None:
            each = _added(attention, q)
            mask = each if each.dim() == 2 else each.unflatten(0, (-1, self.num_heads))
        if padding is not None:
            each = _added(padding, q).reshape(-1, 1, 1, padding.shape[-1])
            mask = each if mask is None else mask + each
        return mask


def _added(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))

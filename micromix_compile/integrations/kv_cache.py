"""A static cache of transformers that keeps keys and values as 8-bit bytes.

Works with transformers' models as they are: a layer's `update` writes the new tokens as bytes and returns what
attention reads, dequantized, in the graph where the model is compiled. The tokens of a call and the newest ones before
it are read as they came, others from their bytes.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

from micromix_compile.lowering.torch_private.dynamo import mark_static_address
from micromix_compile.numerics.formats import ScaleRounding
from micromix_compile.numerics.kv_cache import (
    block_of,
    check_cache_format,
    keep_position,
    keep_recent,
    put_states,
    read_kv,
)
from micromix_compile.ops.kv_cache import write_kv

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedConfig

logger = logging.getLogger(__name__)

SCALE_ROUNDING: Final = str(ScaleRounding.FIT)

RECENT: Final = 32
"""Tokens that are read as they came: attention looks at the newest most. SmolLM2 in float32, steps behind 900 tokens of
context, fp8, KL with 1, 16, 64 and 128 of them (a step's own included): .0054, .0015, .0012, .0011."""

_PARTS: Final = ("keys", "key_scale", "values", "value_scale", "recent_keys", "recent_values")


class QuantizedStaticLayer(StaticLayer):  # type: ignore[misc]
    """One layer's keys and values as E4M3 bytes, `keys` and `values`, and their scales.

    keys: (B, H, L, Dk), values: (B, H, L, Dv), key_scale, value_scale: (B, H, L, blocks of a head), all uint8.
    recent_keys: (B, H, R, Dk), recent_values: (B, H, R, Dv) in the model's dtype, of positions recent_position (R,).
    They are made by the first `update` or by `early_initialization`, and written in place.
    """

    key_scale: Tensor
    value_scale: Tensor
    recent_keys: Tensor
    recent_values: Tensor
    recent_position: Tensor

    def __init__(self, max_cache_len: int, cache_format: str, recent: int, *, is_sliding: bool = False) -> None:
        super().__init__(max_cache_len=max_cache_len)
        self.cache_format = cache_format
        self.recent = min(recent, max_cache_len)
        self.is_sliding = is_sliding
        self.cumulative_length = torch.tensor(0)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the empty cache for states (B, H, any, D) of this dtype and device.

        Raises ValueError for heads that the format does not take.
        """
        self.dtype, self.device = key_states.dtype, key_states.device
        self.batch_size, self.num_heads = key_states.shape[:2]
        self.max_batch_size = self.batch_size  # its name in transformers 5.0
        self.k_head_dim, self.v_head_dim = key_states.shape[-1], value_states.shape[-1]
        self.keys, self.key_scale, self.recent_keys = self._empty(self.k_head_dim)
        self.values, self.value_scale, self.recent_values = self._empty(self.v_head_dim)
        self.recent_position = torch.full((self.recent,), -1, dtype=torch.int64, device=self.device)
        self.cumulative_length = self.cumulative_length.to(self.device)
        if not torch.compiler.is_compiling():  # for CUDA graphs, as StaticLayer does
            for tensor in (*(getattr(self, name) for name in _PARTS), self.recent_position, self.cumulative_length):
                mark_static_address(tensor)
        self.is_initialized = True

    def _empty(self, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        """Codes, scales and recent states of zeros."""
        front, blocks = (self.batch_size, self.num_heads), head_dim // block_of(self.cache_format, head_dim)
        codes, scale = (
            torch.zeros((*front, self.max_cache_len, last), dtype=torch.uint8, device=self.device)
            for last in (head_dim, blocks)
        )
        return codes, scale, torch.zeros((*front, self.recent, head_dim), dtype=self.dtype, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write the states (B, H, T, D) of new tokens. Returns all keys and values, (B, H, L, D), for attention.

        Those of the new tokens and of the recent ones are as they came, others from bytes, zeros where none is yet.

        They come behind those that are there, or at the `cache_position` (T,) that transformers 5.0 passes in a dict.
        Raises ValueError for more tokens than the cache holds, and RuntimeError for states that need a gradient.
        """
        if torch.is_grad_enabled() and (key_states.requires_grad or value_states.requires_grad):
            raise RuntimeError("a QuantizedStaticCache has no gradient: call the model under torch.no_grad()")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        tokens = key_states.shape[-2]
        if tokens > self.max_cache_len:
            raise ValueError(f"max_cache_len is {self.max_cache_len}, but {tokens} tokens came at once")
        position = _given_position(*args, **kwargs)
        if position is None:
            position = torch.arange(tokens, device=self.device) + self.cumulative_length
        cache = (self.keys, self.key_scale, self.values, self.value_scale)
        # Before it is read: Inductor would copy the whole cache to write to it after something that it may read later.
        write_kv(key_states, value_states, position, *cache, SCALE_ROUNDING)
        keys = read_kv(self.keys, self.key_scale, self.recent_keys, self.recent_position)
        values = read_kv(self.values, self.value_scale, self.recent_values, self.recent_position)
        keys, values = put_states(keys, key_states, position), put_states(values, value_states, position)
        keep_recent(self.recent_keys, key_states, position)
        keep_recent(self.recent_values, value_states, position)
        keep_position(self.recent_position, position)
        if tokens:
            self.cumulative_length.copy_(position[-1] + 1)
        return keys, values

    def get_seq_length(self) -> int | Tensor:
        """Tokens in the cache: a tensor, so that compiled code stays as it is while they become more."""
        return self.cumulative_length if self.is_initialized else 0

    def reset(self) -> None:
        """Empty the cache in place. Not by the base class, which makes a number of the length in transformers 5.0."""
        self.cumulative_length.zero_()
        if self.is_initialized:
            for name in _PARTS:
                getattr(self, name).zero_()
            self.recent_position.fill_(-1)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the sequences of these indices, as beam search does."""
        if self.is_initialized:
            for name in _PARTS:
                part = getattr(self, name)
                setattr(self, name, part.index_select(0, beam_idx.to(part.device)))


class QuantizedStaticCache(StaticCache):  # type: ignore[misc]
    """`transformers.StaticCache` with keys and values as 8-bit bytes, about half of bfloat16's.

        cache = micromix.QuantizedStaticCache(config=model.config, max_cache_len=2048)
        model.generate(ids, past_key_values=cache)

    config: of the model. max_cache_len: tokens that it holds for each sequence.
    cache_format: "fp8", E4M3 with one power-of-two scale for each head and token, any head dimension; or "mxfp8", with
    one for each 32 channels of a head (OCP MX), head dimensions that are multiples of 32. recent: so many of the newest
    tokens are kept in the model's dtype, too, and read from there.

    Layers of sliding windows that are shorter than max_cache_len stay in the model's dtype, as the log says; layers
    without keys and values are transformers' own. Raises ValueError for an unknown format, a length below 1, a negative
    `recent`, an encoder-decoder, a kind of layer that it has no bytes for, and for a model of which no layer would be
    quantized.
    """

    layers: list[Any]

    def __init__(
        self, config: PreTrainedConfig, max_cache_len: int, *, cache_format: str = "fp8", recent: int = RECENT
    ) -> None:
        check_cache_format(cache_format)
        if type(recent) is not int or recent < 0:
            raise ValueError(f"recent must be a number of tokens, 0 or more, got {recent!r}")
        if type(max_cache_len) is not int or max_cache_len < 1:
            raise ValueError(f"max_cache_len must be a number of tokens, 1 or more, got {max_cache_len!r}")
        if getattr(config, "is_encoder_decoder", False):
            raise ValueError(f"config must be of a decoder, got the encoder-decoder {type(config).__name__}")
        super().__init__(config=config, max_cache_len=max_cache_len)
        make = partial(QuantizedStaticLayer, max_cache_len, cache_format, recent)
        self.layers = [_quantized(layer, i, max_cache_len, make) for i, layer in enumerate(self.layers)]
        self._say_what_stays(max_cache_len)

    @property
    def nbytes(self) -> int:
        """Bytes of what is held for keys and values, scales and recent ones included; 0 before the first token."""
        parts = [getattr(layer, name, None) for layer in self.layers for name in _PARTS]
        return sum(part.nbytes for part in parts if isinstance(part, Tensor))

    def crop(self, tokens_to_remove: int) -> None:
        """Raises NotImplementedError: what was the newest before the removed tokens is in bytes only."""
        raise NotImplementedError(
            "a QuantizedStaticCache can't be cropped, as assisted generation does: use transformers' DynamicCache there"
        )

    def _say_what_stays(self, max_cache_len: int) -> None:
        if not any(isinstance(layer, QuantizedStaticLayer) for layer in self.layers):
            raise ValueError(
                f"no layer of this model keeps {max_cache_len} tokens of keys and values (max_cache_len), so none "
                "would be quantized: use transformers' StaticCache"
            )
        sliding = [i for i, layer in enumerate(self.layers) if isinstance(layer, StaticSlidingWindowLayer)]
        if sliding:
            logger.warning(
                "%d of %d layers keep keys and values in the model's dtype, for their sliding window is shorter than "
                "max_cache_len, %d: layers %s", len(sliding), len(self.layers), max_cache_len,
                ", ".join(map(str, sliding)),
            )  # fmt: skip


def _quantized(layer: Any, index: int, max_cache_len: int, make: Callable[..., QuantizedStaticLayer]) -> Any:
    """The layer in bytes, or as it is if it has no keys and values or a short window of them."""
    if not isinstance(layer, StaticLayer):
        return layer
    slides = type(layer) is StaticSlidingWindowLayer
    if slides and layer.max_cache_len < max_cache_len:
        return layer
    if not slides and type(layer) is not StaticLayer:
        raise ValueError(f"layer {index} is a {type(layer).__name__}, which has no form in bytes: use StaticCache")
    return make(is_sliding=slides)


def _given_position(cache_kwargs: Any = None, *_: Any, **kwargs: Any) -> Tensor | None:
    """The `cache_position` of what a model passes to `update` behind the states."""
    given = kwargs.get("cache_kwargs", cache_kwargs)
    position = given.get("cache_position") if isinstance(given, dict) else None
    return position if isinstance(position, Tensor) else None

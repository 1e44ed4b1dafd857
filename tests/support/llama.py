"""A small Llama with random weights, its batches, and how often our operations ran in it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

LAYERS: Final = 2


def llama(dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    sizes = {"hidden_size": 128, "intermediate_size": 224, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        **{"num_hidden_layers": LAYERS, "vocab_size": 256, "max_position_embeddings": 128, **sizes, **changes}
    )
    return AutoModelForCausalLM.from_config(config).eval().to(dtype)


def token_batches(count: int = 3, vocabulary: int = 256) -> list[Tensor]:
    return [torch.randint(0, vocabulary, (2, 16 + 8 * i)) for i in range(count)]


def calls_of(run: Callable[[], object]) -> Counter[str]:
    """How often each of our operations really ran, as the profiler counts it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        run()
    counts = Counter({event.key: event.count for event in profile.key_averages()})
    return Counter({name: count for name, count in counts.items() if name.startswith("micromix::")})

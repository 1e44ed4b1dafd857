"""Models on a GPU: what they launch, generate, and whether the GPU folds."""

from __future__ import annotations

import contextlib
import warnings
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn
from transformers import StaticCache

from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    import micromix_compile as micromix


def launches(run: object, *arguments: object) -> list[str]:
    """Names of the kernels that a call runs on the GPU."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        run(*arguments)  # type: ignore[operator]
        torch.cuda.synchronize()
    kernels = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return [event.name for event in kernels if not event.name.startswith(("Memcpy", "Memset"))]


@contextlib.contextmanager
def waits_refused() -> Iterator[None]:
    """An error for every wait for the GPU within; torch warns once that it does not see every kind."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Synchronization debug mode", UserWarning)
            torch.cuda.set_sync_debug_mode("error")
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def compiled(model: nn.Module, recipe: micromix.Recipe, *, exact: bool = True, **options: object) -> nn.Module:
    return torch.compile(model, backend="micromix", options={"recipe": recipe, "exact": exact, **options})


def generate(model: nn.Module) -> Tensor:
    """Sixteen tokens with a static cache.

    It is made before the first call: a cache made inside a CUDA graph lies in the graph's memory, and plain Inductor
    of torch 2.11 ends in a segmentation fault at the second step.
    """
    config = model.config
    cache = StaticCache(config=config, max_cache_len=32)
    heads, width = config.num_key_value_heads, config.hidden_size // config.num_attention_heads
    cache.early_initialization(1, heads, width, model.dtype, model.device)
    ids = torch.arange(3, 12, device=model.device)[None]
    tokens: Tensor = model.generate(
        ids, max_new_tokens=16, do_sample=False, pad_token_id=0, past_key_values=cache, disable_compile=True
    )
    return tokens


FOLDS = torch.cuda.is_available() and target_of(torch.device("cuda")).takes == "folded"
needs_folding = pytest.mark.skipif(torch.cuda.is_available() and not FOLDS, reason="needs a GPU of sm_90")


def norm_free(net: nn.Module) -> nn.Module:
    """Without sums whose order is each compiler's own (norms, the plain head), compiled equals eager to the bit."""
    for layer in net.layers:  # type: ignore[union-attr]
        layer.norm = nn.Identity()
    net.lm_head = nn.Identity()
    return net

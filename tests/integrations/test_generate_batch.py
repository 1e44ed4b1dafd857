"""Continuous batching of transformers: a packed model serves prompts of unequal lengths as one at a time."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.llama import llama, token_batches
from transformers import GenerationConfig

import micromix_compile as micromix

HAS_IT = hasattr(transformers, "ContinuousBatchingConfig")


@pytest.mark.skipif(not HAS_IT, reason="transformers 5.0 takes no ContinuousBatchingConfig")
def test_generate_batch_gives_each_prompt_the_tokens_that_generate_gives() -> None:
    model = llama()
    config = micromix.MicroMixConfig(weight_rounding="nearest")
    micromix.quantize_(model, micromix.calibrate(model, token_batches(1), config, progress=False))
    prompts = [torch.randint(1, 256, (length,)).tolist() for length in (5, 2, 9, 1)]
    wanted = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0)
    expected = [model.generate(torch.tensor([prompt]), wanted)[0, len(prompt) :].tolist() for prompt in prompts]
    small = {"page_size": 16, "num_blocks": 16, "max_batch_tokens": 16}  # else most of the memory
    paged = transformers.ContinuousBatchingConfig(**small)
    found = model.generate_batch(inputs=prompts, generation_config=wanted, continuous_batching_config=paged)
    assert [found[f"req_{i}"].generated_tokens for i in range(len(prompts))] == expected

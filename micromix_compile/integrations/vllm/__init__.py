"""Packed checkpoints in vLLM: `vllm serve CHECKPOINT` and `LLM(CHECKPOINT)`, from one rank or several.

vLLM finds `register` by the entry point `vllm.general_plugins` and calls it in each of its processes. Nothing of vLLM
is imported before.
"""

from micromix_compile.integrations.vllm.plugin import register

__all__ = ["register"]

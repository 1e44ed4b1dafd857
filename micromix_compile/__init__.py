"""torch.compile(model, backend="micromix"): every linear layer in a per-channel mix of MXFP4, MXFP6 and MXFP8.

    import torch, micromix_compile as micromix

    recipe = micromix.calibrate(model, batches)
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe})

Importing this package loads neither Inductor nor Triton; names below are imported at first use. transformers loads
packed checkpoints wherever this package is imported, before it or after.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from micromix_compile import transformers_hook

if TYPE_CHECKING:
    from micromix_compile.assignment import assign
    from micromix_compile.calibration import calibrate, calibrate_each
    from micromix_compile.checkpoint import seal
    from micromix_compile.config import MicroMixConfig
    from micromix_compile.quantize import MicroMixLinear, quantize_
    from micromix_compile.recipe import Recipe
    from micromix_compile.sessions import recipe_of
    from micromix_compile.versions import refresh

__version__ = "0.1.0"
__all__ = [
    "MicroMixConfig",
    "MicroMixLinear",
    "Recipe",
    "assign",
    "calibrate",
    "calibrate_each",
    "quantize_",
    "recipe_of",
    "refresh",
    "seal",
]

_HOMES = {
    "MicroMixConfig": "config",
    "MicroMixLinear": "quantize",
    "Recipe": "recipe",
    "assign": "assignment",
    "calibrate": "calibration",
    "calibrate_each": "calibration",
    "quantize_": "quantize",
    "recipe_of": "sessions",
    "refresh": "versions",
    "seal": "checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()

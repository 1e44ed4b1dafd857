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

from micromix_compile.integrations import transformers_hook

if TYPE_CHECKING:
    from micromix_compile.calibration.assignment import assign
    from micromix_compile.changes.versions import refresh
    from micromix_compile.config import MicroMixConfig
    from micromix_compile.integrations.checkpoint import seal
    from micromix_compile.integrations.convert import convert, load_converted
    from micromix_compile.integrations.fsdp import by_rows, packed_as_parameters_
    from micromix_compile.integrations.kv_cache import QuantizedStaticCache
    from micromix_compile.integrations.on_load import MicroMixQuantConfig
    from micromix_compile.linear.experts import MicroMixExperts
    from micromix_compile.linear.packed import MicroMixLinear
    from micromix_compile.recipe.types import Recipe
    from micromix_compile.session.registry import recipe_of
    from micromix_compile.verbs.calibrate import calibrate, calibrate_each
    from micromix_compile.verbs.quantize import quantize_

__version__ = "0.2.0"
__all__ = [
    "MicroMixConfig",
    "MicroMixExperts",
    "MicroMixLinear",
    "MicroMixQuantConfig",
    "QuantizedStaticCache",
    "Recipe",
    "assign",
    "by_rows",
    "calibrate",
    "calibrate_each",
    "convert",
    "load_converted",
    "packed_as_parameters_",
    "quantize_",
    "recipe_of",
    "refresh",
    "seal",
]

_HOMES = {
    "MicroMixConfig": "config",
    "MicroMixExperts": "linear.experts",
    "MicroMixLinear": "linear.packed",
    "MicroMixQuantConfig": "integrations.on_load",
    "QuantizedStaticCache": "integrations.kv_cache",
    "Recipe": "recipe.types",
    "assign": "calibration.assignment",
    "by_rows": "integrations.fsdp",
    "calibrate": "verbs.calibrate",
    "calibrate_each": "verbs.calibrate",
    "convert": "integrations.convert",
    "load_converted": "integrations.convert",
    "packed_as_parameters_": "integrations.fsdp",
    "quantize_": "verbs.quantize",
    "recipe_of": "session.registry",
    "refresh": "changes.versions",
    "seal": "integrations.checkpoint",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


transformers_hook.install()

"""Packed checkpoints load wherever this package is installed: `hf` is imported as soon as transformers' models are.

transformers takes seconds to import, so `import micromix_compile` does not; it waits for somebody else to. transformers
has no entry points for quantizers. torch has, for what extends it (the group `torch.backends`): `install` is called
when torch is imported, unless the variable TORCH_DEVICE_BACKEND_AUTOLOAD is 0.
"""

from __future__ import annotations

import _imp
import importlib
import importlib.util
import logging
import sys
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

logger = logging.getLogger("micromix_compile")

_AWAITED: Final = "transformers.modeling_utils"
"""Where `from_pretrained` is."""


class _Finder:
    """Finds nothing itself: whoever imports what it waits for gets that as ever, and then `hf`.

    It stays where it is afterwards: importlib is walking the list of finders, and would pass over the next one.
    """

    _waits = True

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        """The usual finders' spec of the awaited module, with a loader that goes on to `hf`; None for all others.

        Where the awaited one was on its way when the wait began, `hf` comes before the first import behind it.
        """
        if not self._waits or not (name == _AWAITED or _is_there()):
            return None
        self._waits = False
        if name != _AWAITED:
            _imp.release_lock()  # importlib holds it here: who waits for it may hold a module that `hf` imports
            try:
                _register()
            finally:
                _imp.acquire_lock()
            return None
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            load = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                load(module)
                _register()

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def install() -> None:
    """Register the quantizer when transformers' models are imported; now, if they are. Once is enough."""
    if _is_there():
        _register()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _is_there() -> bool:
    """Whether the awaited module has been imported to its end: it imports torch in its first lines."""
    spec = getattr(sys.modules.get(_AWAITED), "__spec__", None)
    return spec is not None and not getattr(spec, "_initializing", False)


def _register() -> None:
    """Import `hf`. Whoever imports transformers for something else must not fail for a version that we can't serve."""
    try:
        importlib.import_module("micromix_compile.integrations.hf")
    except Exception as error:  # whatever another torch or transformers may raise
        logger.warning("packed checkpoints can't be loaded with this transformers: %s", error)

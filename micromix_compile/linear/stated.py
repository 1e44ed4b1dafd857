"""What a state dict says of packed tensors beside their bytes, which other formats and rotations would read otherwise.

It stands in the metadata that torch keeps for each module of a state dict. What has none, such as a file of
safetensors, has a config that says it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.numerics.layout import RowLayout

_KEY: Final = "micromix_layouts"


def note_layouts(destination: Mapping[str, Any], prefix: str, layouts: Mapping[str, RowLayout]) -> None:
    """Note in the state dict `destination` how the weights of the module at `prefix`, by name, are laid out."""
    metadata = getattr(destination, "_metadata", None)  # of a dict that is not torch's there is none
    if metadata is not None:
        noted = {name: _of_weights(layout) for name, layout in layouts.items()}
        metadata.setdefault(prefix[:-1], {})[_KEY] = noted


def differing_layouts(metadata: Mapping[str, Any], prefix: str, layouts: Mapping[str, RowLayout]) -> list[str]:
    """Messages on the weights whose layout, as the state dict's `metadata` of the module notes it, is another one."""
    noted = metadata.get(_KEY, {})
    return [
        f"the packed weight {prefix}{name} is laid out as {noted[name]} in the state dict, and as {own} in the model: "
        f"quantize the model by the same recipe first"
        for name, own in ((name, _of_weights(layout)) for name, layout in layouts.items())
        if noted.get(name, own) != own
    ]


def _of_weights(layout: RowLayout) -> dict[str, Any]:
    """What decides how the bytes of a weight are read; how activations are rounded does not."""
    return {"split": layout.split, "fp6": layout.fp6 if layout.k6 else None, "rotated": layout.rotated}

"""What transformers hands a rank of a packed checkpoint: the rank's own part of each tensor, one after the other.

transformers maps a checkpoint's files into memory, and passes on a tensor of them without a copy. The rank's part of it
is taken there, so that what others hold never gets to the rank's device, or into memory that is not the file's.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from transformers.core_model_loading import ConversionOps, WeightConverter

from micromix_compile.linear.experts import PARTS
from micromix_compile.numerics.layout import PackedWeight, packed_shapes, weight_split

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.numerics.shards import Cut


class Stored(NamedTuple):
    """One of a checkpoint's packed tensors: its field of a `PackedWeight`, its whole shape, and what is the rank's."""

    field: str
    shape: tuple[int, ...]
    cut: Cut


class KeepParts(ConversionOps):  # type: ignore[misc]
    """Takes the rank's part of each of the `stored` tensors, by their names in the model; others pass."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored

    def __deepcopy__(self, _: Any) -> KeepParts:
        return self  # transformers copies what converts for each tensor

    def convert(self, input_dict: Mapping[str, list[Tensor]], *, full_layer_name: str, **_: Any) -> dict[str, Tensor]:
        """One tensor, under its name. One of another shape stays whole: what looks at shapes names it."""
        ((tensor,),) = input_dict.values()
        stored = self.stored.get(full_layer_name)
        if stored is not None and tuple(tensor.shape) == stored.shape:
            tensor = stored.cut.part(stored.field, tensor)
        return {full_layer_name: tensor}


def stored_parts(
    linears: Mapping[str, Mapping[str, Any]], parts: Mapping[str, Cut], config: MicroMixConfig, scale: str
) -> dict[str, Stored]:
    """The checkpoint's tensors of packed weights of which a rank keeps `parts`. scale: under which name scales come."""
    stored = {}
    for fqn, cut in parts.items():
        k4, k6, k8 = linears[fqn]["split"]
        experts = linears[fqn].get("experts")
        split = weight_split((k4, k6, k8), config.weights)
        shapes = packed_shapes(linears[fqn]["out_features"], split, experts)
        names = (".weight_q4", ".weight_q6", ".weight_q8", f".{scale}") if experts is None else PARTS
        for field, name, shape in zip(PackedWeight._fields, names, shapes, strict=True):
            stored[fqn + name] = Stored(field, shape, cut)
    return stored


def converter(stored: Mapping[str, Stored], prefix: str) -> WeightConverter:
    """What has transformers read only the rank's part of each tensor, wherever the model will be.

    prefix: what the checkpoint's names may lack, or have in front of the model's.
    """
    names = {re.escape(name.removeprefix(f"{prefix}.")) for name in stored}
    alike = sorted({re.sub(r"\\\.\d+(?=\\\.)", r"\\.\\d+", name) for name in names})
    return WeightConverter([rf"\b({'|'.join(alike)})$"], [r"\1"], [KeepParts(stored)], force_cpu=True)

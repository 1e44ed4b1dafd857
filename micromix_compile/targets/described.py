"""What a device runs for one linear, in words: kernels and matrix instructions by format. Nothing is run."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, NamedTuple

from micromix_compile.numerics.layout import weight_split
from micromix_compile.targets import cpu
from micromix_compile.targets.grouped import TritonGrouped
from micromix_compile.targets.target import Device, target_for

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import Split
    from micromix_compile.targets.target import Target

SEGMENTS: Final = ("MXFP4", "MXFP6", "MXFP8")
"""The formats of a split, in its order."""

FOLDED_KIND: Final = "wgmma e4m3"
"""The matrix instruction of folded products, as `ptx.mma_kind` names it."""

_CPU_INSTRUCTIONS: Final = {"amx-bf16": "TDPBF16PS", "avx512-bf16": "VDPBF16PS", "portable": "float32 arithmetic"}
_NAME: Final = re.compile(r"sm_(\d{1,2})(\d)a?")


class Product(NamedTuple):
    """How a linear is multiplied. rows: in which calls. kernel: its name. kinds: format of weights -> instruction."""

    rows: str
    kernel: str
    kinds: dict[str, str]


def named_target(name: str, *, exact: bool = False) -> Target:
    """Who computes on a GPU that need not be here: "sm_100" is compute capability 10.0.

    Raises ValueError for another name.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"target must be sm_ and a compute capability without its dot, such as sm_100, got {name!r}")
    capability = int(match[1]), int(match[2])
    return target_for(Device(type="cuda", model=name, capability=capability, exact=exact))


def products_of(
    target: Target, split: Split, *, weights: str, activations: str, experts: bool = False
) -> list[Product]:
    """How a target multiplies a linear with this split. weights, activations: the config's. experts: whether the weight
    is of a layer's experts, which one product takes together.

    On Hopper these are the products of bfloat16 models, unless all must be exact.
    """
    present = [name for name, channels in zip(SEGMENTS, split, strict=True) if channels]
    if target.emulated is not None:
        return [Product("any", "plain PyTorch", dict.fromkeys(_weights_of(present, weights), "no matrix instruction"))]
    if target.takes == "folded" and experts:
        assert isinstance(target.grouped, TritonGrouped), "who folds has products of experts"
        assert target.grouped.folded is not None, "and they fold, too"
        kernels = target.grouped.folded.kernels(weight_split(split, weights))
        return [Product("any", kernels, dict.fromkeys(_weights_of(present, weights), FOLDED_KIND))]
    if target.takes == "folded":
        return _folded(target, weight_split(split, weights), _weights_of(present, weights))
    if isinstance(target.exact, cpu.CompiledExact):
        isa = cpu.status().isa
        return [Product("any", f"C++, {isa}", dict.fromkeys(_weights_of(present, weights), _CPU_INSTRUCTIONS[isa]))]
    if (tiles := target.exact.tiles) is None:
        kernel = type(target.exact).__name__
        return [Product("any", kernel, dict.fromkeys(_weights_of(present, weights), "not known"))]
    (four, other), kernel = tiles.kinds, "grouped_mx_mm" if experts else "mixed_mx_mm"
    both_four = activations == "same"
    by_channels = {name: four if name == "MXFP4" and both_four else other for name in present}
    if weights == "mxfp4":  # one format of weights, whose instruction depends on that of the activations
        return [Product("any", kernel, {"MXFP4": " and ".join(dict.fromkeys(by_channels.values()))})]
    return [Product("any", kernel, by_channels)]


def _weights_of(present: list[str], weights: str) -> list[str]:
    return present if weights == "same" else ["MXFP4"]


def _folded(target: Target, split: Split, formats: list[str]) -> list[Product]:
    tiles = target.folded.tiles
    assert tiles is not None, "who folds has tiles"
    last, kernels = tiles.last_packed(split)
    return [
        Product(f"up to {last}", kernels, dict.fromkeys(formats, FOLDED_KIND)),
        Product(
            f"{last + 1} and more",
            "expand_weights, then the library",
            dict.fromkeys(formats, "the library's FP8 product"),
        ),
    ]

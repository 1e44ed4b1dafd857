"""Which Parameter the weight of a product is a view of: all of it, transposed or not, or a part of its rows or columns.

What a view shows is told by its strides and where it begins, whatever operations made it: slices, `chunk`, `split`,
`narrow`, `.T`, `view`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx, nn

from micromix_compile.passes.mutations import memory_of
from micromix_compile.recipe.parts import Part

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from micromix_compile.passes.pre_grad.products import Operands

    Found = tuple[bool, Part | None]
    """(whether it is transposed, which part it is; None for all)."""

CUT_BY_INPUT: Final = "a part of it is multiplied whose size or place depends on the input"
CUT_ALONG_INPUTS: Final = "a part of it is multiplied that has some of its input channels only"
CUT_OTHERWISE: Final = "a part of it is multiplied that is no run of whole rows or columns"
OF_ANOTHER_SHAPE: Final = "it is multiplied as a matrix of another shape"


def seen_through(operands: Operands, inputs: Mapping[fx.Node, object]) -> Operands:
    """The same product with the Parameter itself where its weight is a view of one that shows all input channels."""
    origin = parameter_under(operands.weight, inputs)
    found = None if origin is None else _place(_example(operands.weight), _example(origin))
    if origin is None or found is None or isinstance(found, str):
        return operands
    transposed = operands.transposed != found[0]
    if found[1] is not None and found[1].dim != transposed:
        return operands
    return replace(operands, weight=origin, transposed=transposed, part=found[1])


def why_no_view(weight: fx.Node, inputs: Mapping[fx.Node, object]) -> tuple[nn.Parameter, str] | None:
    """(the Parameter, why its view is no linear's weight) of what `seen_through` left; None of what is no view."""
    origin = parameter_under(weight, inputs)
    parameter = None if origin is None else inputs[origin]
    if not isinstance(parameter, nn.Parameter) or parameter.dim() != 2:
        return None
    found = _place(_example(weight), _example(origin))
    return parameter, found if isinstance(found, str) else CUT_ALONG_INPUTS


def parameter_under(weight: fx.Node, inputs: Mapping[fx.Node, object]) -> fx.Node | None:
    """The Parameter, an input of the graph, whose memory `weight` shows as a matrix, or a stack of them; not itself."""
    origin = weight
    while origin.args and isinstance(origin.args[0], fx.Node):
        origin = origin.args[0]
    if origin is weight or not isinstance(inputs.get(origin), nn.Parameter):
        return None
    memory = memory_of(origin)
    if memory is None or memory != memory_of(weight):
        return None
    seen, whole = _example(weight), _example(origin)
    plain = seen.dtype == whole.dtype and not seen.is_neg() and seen.dim() == whole.dim() and seen.dim() in (2, 3)
    return origin if plain else None


def _place(seen: torch.Tensor, whole: torch.Tensor) -> Found | str:
    """How a view lies in a matrix (R, C), or a stack of such, or why nothing of ours is there."""
    if not all(isinstance(one, int) for one in (*seen.shape, *seen.stride(), seen.storage_offset())):
        return CUT_BY_INPUT
    start = seen.storage_offset() - whole.storage_offset()
    for is_transposed in (False, True):
        shape, stride = (_turned(sizes) if is_transposed else tuple(sizes) for sizes in (seen.shape, seen.stride()))
        if stride != whole.stride():
            continue
        if shape == whole.shape and start == 0:
            return is_transposed, None
        for dim in (0, 1) if whole.dim() == 2 else ():
            first, rest = divmod(int(start), max(stride[dim], 1))
            part = Part(dim, first, first + shape[dim])
            if shape[1 - dim] == whole.shape[1 - dim] and not rest and part.fits(whole):
                return is_transposed, part
    return OF_ANOTHER_SHAPE if seen.numel() == whole.numel() else CUT_OTHERWISE


def _turned(sizes: Sequence[int]) -> tuple[int, ...]:
    return (*sizes[:-2], sizes[-1], sizes[-2])


def _example(node: fx.Node | None) -> Any:
    assert node is not None, "it is a view of one"
    return node.meta["example_value"]

"""Find activations whose channels can be scaled for nothing: linears read them, and what makes them can be divided.

x / s makes up for weight columns times s. Where a norm's weight multiplies x last, or a linear makes x or one factor
of x, dividing that weight, or that linear's rows and bias, divides x.
"""

from __future__ import annotations

import logging
import operator
from typing import TYPE_CHECKING

import torch
from torch import fx, nn

from micromix_compile.passes.pass_manager import Slots, SmoothableSite
from micromix_compile.reference import FLOAT_DTYPES

if TYPE_CHECKING:
    from micromix_compile.passes.pass_manager import LinearSite, PassContext

logger = logging.getLogger("micromix_compile")

VIEW_METHODS = ("view", "reshape", "contiguous", "to", "float", "type_as")
"""What leaves the channels as they are; rounding to another dtype commutes with powers of two."""

MUL_TARGETS = ("mul", operator.mul, torch.mul, torch.ops.aten.mul.Tensor)
"""Dynamo writes methods for operators under a default device."""
NORM_TARGETS = {
    torch.nn.functional.layer_norm: ("weight", "bias"),
    torch.layer_norm: ("weight", "bias"),
    torch.ops.aten.layer_norm.default: ("weight", "bias"),
    torch.nn.functional.rms_norm: ("weight",),
    torch.rms_norm: ("weight",),
    torch.ops.aten.rms_norm.default: ("weight",),
}
"""Norms, and their arguments after (input, normalized_shape) that make the output's scale."""


def find_smoothable(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `context.smoothable` from `context.sites`. Changes nothing."""
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = dict(zip(placeholders, context.example_inputs, strict=True))
    finder = _Finder(
        parameters={node: value for node, value in inputs.items() if isinstance(value, nn.Parameter)},
        sites={site.node: site for site in context.sites},
    )
    groups: dict[fx.Node, list[LinearSite]] = {}
    for site in context.sites:
        groups.setdefault(_source(site.x), []).append(site)
    for x, readers in groups.items():
        divided = finder.smoothable(x, readers)
        if divided is None:
            logger.debug("the input of %s can't be smoothed", context.owner.name_of(readers[0].parameter))
            continue
        multiplied = tuple((site.weight, 0 if site.transposed else 1) for site in readers)
        context.smoothable.append(SmoothableSite(x=x, divided=divided, multiplied=multiplied))
    return len(context.smoothable)


class _Finder:
    """parameters: what graph inputs hold. sites: the linears, by node."""

    def __init__(self, parameters: dict[fx.Node, nn.Parameter], sites: dict[fx.Node, LinearSite]) -> None:
        self._parameters = parameters
        self._sites = sites

    def smoothable(self, x: fx.Node, readers: list[LinearSite]) -> Slots | None:
        """What to divide so that `x`, which `readers` read through views, is divided; None if it must stay."""
        if not all(map(_reads_alone, readers)) or not self._only_linears_read(x):
            return None
        return self._divisors(x, readers[0].in_features)

    def _only_linears_read(self, x: fx.Node) -> bool:
        """Whether `x`, and every view of it, is nothing but the input of linears."""
        for user in _readers(x):
            site = self._sites.get(user)
            if site is not None:
                if site.x is not x or site.bias is x:
                    return False
            elif not (_is_view(user) and user.args[0] is x and self._only_linears_read(user)):
                return False
        return True

    def _divisors(self, node: object, channels: int) -> Slots | None:
        """What to divide so that `node`, (..., channels), is divided."""
        if not isinstance(node, fx.Node) or _channels(node) != channels:
            return None
        if node in self._parameters:
            return self._own((node, 0)) if self._parameters[node].dim() == 1 else None
        if node in self._sites:
            return self._linear(self._sites[node])
        if _is_view(node):
            return self._factor(node.args[0], channels)
        if node.target in NORM_TARGETS:
            return self._norm(node, channels)
        if node.target in MUL_TARGETS and not node.kwargs and node.args[0] is not node.args[1]:
            found = (self._factor(factor, channels) for factor in node.args)
            return next((slots for slots in found if slots is not None), None)
        return None

    def _factor(self, node: object, channels: int) -> Slots | None:
        """The divisors of what only one node reads."""
        if not isinstance(node, fx.Node) or len(_readers(node)) != 1:
            return None
        return self._divisors(node, channels)

    def _linear(self, site: LinearSite) -> Slots | None:
        if not _reads_alone(site):
            return None
        rows = (site.weight, 1 if site.transposed else 0)
        return self._own(rows) if site.bias is None else self._own(rows, (site.bias, 0))

    def _norm(self, node: fx.Node, channels: int) -> Slots | None:
        names = NORM_TARGETS[node.target]
        given = {**dict(zip(names, node.args[2:], strict=False)), **node.kwargs}
        weight, *others = (given.get(name) for name in names)
        if self._divisors(weight, channels) is None:
            return None
        return self._own(*((part, 0) for part in (weight, *others) if isinstance(part, fx.Node)))

    def _own(self, *slots: tuple[fx.Node, int]) -> Slots | None:
        """`slots` if all are Parameters that one node reads."""
        own = all(node in self._parameters and len(node.users) == 1 for node, _ in slots)
        return slots if own else None


def _reads_alone(site: LinearSite) -> bool:
    """Whether nothing else reads the linear's weight, or its transpose."""
    return len(site.weight.users) == len(site.operand.users) == 1


def _source(node: fx.Node) -> fx.Node:
    """The activation under views."""
    while _is_view(node) and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _is_view(node: fx.Node) -> bool:
    """Whether `node` has the channels of its first argument, maybe in another shape or float dtype."""
    if node.op != "call_method" or node.target not in VIEW_METHODS or not isinstance(node.args[0], fx.Node):
        return False
    if node.target == "view" and (node.kwargs or isinstance(node.args[1], torch.dtype)):
        return False  # the same bits read as another type
    return _channels(node) is not None and _channels(node) == _channels(node.args[0])


def _readers(node: fx.Node) -> list[fx.Node]:
    """The users of a node that look at its values, not only at its shape."""
    shapes = int | torch.SymInt | torch.Size
    return [user for user in node.users if not isinstance(user.meta.get("example_value"), shapes)]


def _channels(node: fx.Node) -> int | None:
    """The size of the last dimension, if that is known and `node` is a tensor of float32, bfloat16 or float16."""
    example = node.meta.get("example_value")
    if not isinstance(example, torch.Tensor) or example.dtype not in FLOAT_DTYPES or not example.dim():
        return None
    size = example.shape[-1]
    return size if isinstance(size, int) else None

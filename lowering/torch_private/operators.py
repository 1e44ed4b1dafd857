"""Operators and functions of torch without a public name, and what operators say of their arguments."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import fx

BUILTIN_LINEAR: Final = torch._C._nn.linear
"""What torch.nn.functional.linear is in some graphs."""
ENCODER_LAYER: Final = torch._transformer_encoder_layer_fwd
MULTI_HEAD_ATTENTION: Final = torch._native_multi_head_attention
ENTER_AUTOCAST: Final = torch.amp.autocast_mode._enter_autocast
GROUPED_MM: Final = torch._grouped_mm
scaled_mm: Final = torch._scaled_mm
scaled_grouped_mm: Final = torch._scaled_grouped_mm


def is_overload(target: object) -> bool:
    """Whether a node's target is an operator with one schema."""
    return isinstance(target, OpOverload)


def is_higher_order(target: object) -> bool:
    """Whether it takes functions: kernels of Triton, functions with graphs inside."""
    return isinstance(target, HigherOrderOperator)


def overloads_of(target: object) -> list[Any]:
    """The overloads of an operator that is named without one; empty for anything else."""
    if not isinstance(target, OpOverloadPacket):
        return []
    return [getattr(target, name) for name in target.overloads()]


def schema_of(target: object) -> Any:
    """The schema of an operator, also of one that is named without its only overload; None for anything else."""
    overloads = overloads_of(target)
    return getattr(overloads[0] if len(overloads) == 1 else target, "_schema", None)


def arguments_of(node: fx.Node) -> dict[str, Any]:
    """What a call of an operator gets, by the names of its schema, defaults included. Raises TypeError for others."""
    return bound(_known_schema(node.target), node.args, node.kwargs)


def argument_names(target: object) -> tuple[str, ...]:
    """The names of an operator's arguments, in order. Raises TypeError for what is no operator."""
    return tuple(one.name for one in _known_schema(target).arguments)


def _known_schema(target: object) -> Any:
    schema = schema_of(target)
    if schema is None:
        raise TypeError(f"{target} is no operator with one schema")
    return schema


def bound(schema: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a call binds to the names of a schema, in its order, with its defaults. Keywords that it lacks come last."""
    found: dict[str, Any] = {}
    for place, one in enumerate(schema.arguments):
        if place < len(args):
            found[one.name] = args[place]
        elif one.name in kwargs:
            found[one.name] = kwargs[one.name]
        elif one.has_default_value():
            found[one.name] = one.default_value
    return {**found, **kwargs}

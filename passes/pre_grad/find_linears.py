"""Pass 1: find the linear layers of a Dynamo graph, and say why each other candidate is not one."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, fx, nn

from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.passes.manager import LinearSite, PassContext
from micromix_compile.passes.mutations import memory_of, written_memory

if TYPE_CHECKING:
    from torch.fx.node import Argument

LINEAR_TARGETS = (torch.nn.functional.linear, torch._C._nn.linear, torch.ops.aten.linear.default)
ADDMM_TARGETS = (torch.addmm, torch.ops.aten.addmm.default)
MATMUL_TARGETS = (torch.mm, torch.matmul, operator.matmul, torch.ops.aten.mm.default)
MATMUL_METHODS = ("matmul", "mm", "__matmul__")

CUTS = ("chunk", "getitem", "narrow", "select", "slice", "split", "split_with_sizes", "tensor_split", "unbind")

_KEYWORDS = {"mat1": "input", "mat2": "weight", "other": "weight"}


def find_linears(gm: fx.GraphModule, context: PassContext) -> int:
    """Fill `context.sites` and `context.refusals`. Changes nothing.

    A linear is F.linear, or addmm, mm or matmul with a 2-dimensional Parameter on the right (Conv1D of GPT-2), as it is
    or transposed there (Falcon).
    """
    placeholders = gm.graph.find_nodes(op="placeholder")
    inputs = dict(zip(placeholders, context.example_inputs, strict=True))
    written = written_memory(gm.graph)
    orientation: dict[fx.Node, bool] = {}
    depth = 0
    for node in gm.graph.nodes:
        depth += _entered_transforms(node)
        operands = _operands(node)
        if operands is None:
            continue
        x, operand, bias, transposed = operands
        weight = operand
        if transposed and _is_transpose(operand) and isinstance(inputs.get(operand.args[0]), nn.Parameter):
            weight, transposed = operand.args[0], False  # type: ignore[assignment]
        name, reason = _refusal(weight, x, bias, inputs, context)
        if reason is None and depth:
            name, reason = f"{name} (torch.func)", "it runs under a transform of torch.func, such as vmap"
        if reason is None and memory_of(weight) in written:
            reason = "its weight is written to in the graph that uses it"
        if reason is None and (
            orientation.setdefault(weight, transposed) != transposed
            or context.owner.is_used_otherwise(inputs[weight], transposed=transposed)
        ):
            name, reason = f"{name} (transposed)", "its weight is used both as it is and transposed"
        if reason is not None:
            if transposed and not isinstance(inputs.get(weight), nn.Parameter):
                continue  # a product of two activations
            context.refusals[name] = reason
            continue
        site = LinearSite(
            node=node, x=x, weight=weight, operand=operand, bias=bias, transposed=transposed, parameter=inputs[weight]
        )
        context.sites.append(site)
    return len(context.sites)


def _entered_transforms(node: fx.Node) -> int:
    """1 where a graph enters a transform of torch.func, -1 where it leaves one."""
    name = getattr(node.target, "__name__", "")
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node | None, bool] | None:
    """(x, weight, bias, transposed) of a candidate, else None."""
    if node.op not in ("call_function", "call_method"):
        return None
    names: tuple[str, ...]
    if node.target in LINEAR_TARGETS:
        names, transposed = ("input", "weight", "bias"), False
    elif node.target in ADDMM_TARGETS:
        names, transposed = ("bias", "input", "weight"), True
    elif node.target in MATMUL_TARGETS or (node.op == "call_method" and node.target in MATMUL_METHODS):
        names, transposed = ("input", "weight"), True
    else:
        return None
    found: dict[str, Argument] = dict(zip(names, node.args, strict=False))
    if not set(node.kwargs) <= {*names, *_KEYWORDS}:
        return None  # factors, or an output that is given
    found |= {_KEYWORDS.get(key, key): value for key, value in node.kwargs.items()}
    x, weight, bias = found.get("input"), found.get("weight"), found.get("bias")
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node):
        return None
    return x, weight, bias if isinstance(bias, fx.Node) else None, transposed


def _is_transpose(node: fx.Node) -> bool:
    """Whether `node` transposes a matrix; what has more dimensions is no linear's weight anyway."""
    if str(node.target).removesuffix(".default") in ("aten.numpy_T", "aten.mT"):  # of `.T` and `.mT` from torch 2.15 on
        return True
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] in ("T", "mT")
    if node.kwargs or node.target not in ("t", torch.t, "transpose", torch.transpose, "permute", torch.permute):
        return False
    if node.target in ("t", torch.t):
        return True
    given = node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    swapped = tuple(dim % 2 for dim in dims if isinstance(dim, int))
    return swapped == (1, 0) or (swapped == (0, 1) and node.target in ("transpose", torch.transpose))


def _computed_name(weight: fx.Node, inputs: dict[fx.Node, object], context: PassContext) -> str:
    """A weight that is computed goes by the Parameter that it comes from, if it is one's slice, view or multiple."""
    node = weight
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    parameter = inputs.get(node)
    if not isinstance(parameter, nn.Parameter) or parameter.dim() < 2:
        return weight.name
    name = context.owner.name_of(parameter)
    return name if parameter.dim() > 2 else f"{name} (computed)"


def why_no_plain_weight(weight: Tensor) -> str | None:
    """Why a tensor subclass (quantized, sharded, ...) is no weight to quantize; None for a plain Parameter."""
    if type(weight) in (nn.Parameter, Tensor):
        return None
    return f"its weight is a {type(weight).__module__}.{type(weight).__qualname__}, not a plain Parameter"


def _cut_from(weight: fx.Node) -> fx.Node:
    """What `weight` is a part of, or itself."""
    while _cuts(weight) and weight.args and isinstance(weight.args[0], fx.Node):
        weight = weight.args[0]
    return weight


def _cuts(node: fx.Node) -> bool:
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    return node.op in ("call_function", "call_method") and name.partition(".")[0] in CUTS


def _refusal(
    weight: fx.Node, x: fx.Node, bias: fx.Node | None, inputs: dict[fx.Node, object], context: PassContext
) -> tuple[str, str | None]:
    """(name, why the candidate must stay as it is or None)."""
    parameter = inputs.get(weight)
    if weight.op == "get_attr":
        return str(weight.target), "its weight is a constant of the graph (is freezing on?)"
    whole = inputs.get(_cut_from(weight))
    if isinstance(whole, nn.Parameter) and whole is not parameter and whole.dim() == 2:
        return context.owner.name_of(whole), "it is cut into parts, which are weights of their own"
    if not isinstance(parameter, nn.Parameter):
        return _computed_name(weight, inputs, context), "its weight is computed in the graph, not a Parameter"
    if parameter.dim() < 2:
        return weight.name, "its weight is a vector"
    name = context.owner.name_of(parameter)
    if special := why_no_plain_weight(parameter):
        return name, special
    if parameter.dim() != 2:
        return name, f"its weight has {parameter.dim()} dimensions, not 2"
    if parameter.dtype not in FLOAT_DTYPES:
        return name, f"its weight is {parameter.dtype}, not float32, bfloat16 or float16"
    example = x.meta.get("example_value")
    if isinstance(example, torch.Tensor) and example.dtype not in FLOAT_DTYPES:
        return name, f"its input is {example.dtype}, not float32, bfloat16 or float16"
    added = None if bias is None else bias.meta.get("example_value")
    if isinstance(added, torch.Tensor) and (added.dim() != 1 or added.shape[0] not in parameter.shape):
        return name, f"its bias has shape {tuple(added.shape)}, not one element per output"
    return name, context.owner.refusal(parameter)

"""Pass 1: find the linear layers of a Dynamo graph, and say why each other candidate is not one."""

from __future__ import annotations

import operator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, fx, nn

from micromix_compile.numerics.checks import FLOAT_DTYPES
from micromix_compile.passes.context import LinearSite, PassContext, Routing
from micromix_compile.passes.mutations import memory_of, written_memory
from micromix_compile.passes.pre_grad.products import Operands, convolution_of, is_transpose, operands_of
from micromix_compile.passes.pre_grad.shapes import reshaped
from micromix_compile.passes.pre_grad.views import CUT_OTHERWISE, parameter_under, seen_through, why_no_view
from micromix_compile.recipe.parts import as_matrix

if TYPE_CHECKING:
    from collections.abc import Mapping

    from micromix_compile.passes.context import Batch
    from micromix_compile.recipe.parts import Part

OF_EXPERTS: Final = (
    "a stack of matrices is covered where grouped or batched products read it; of transformers' experts they do after "
    'model.set_experts_implementation("grouped_mm")'
)
COMPUTED: Final = "its weight is computed in the graph, not a Parameter"
BOTH_WAYS: Final = "its weight is used both as it is and transposed"
TAKEN_OUT: Final = f"a matrix of it is taken out by index: {OF_EXPERTS}"
ON_THE_LEFT: Final = (
    "a part of it is multiplied from the left",
    f"a part of it is multiplied from the left: {OF_EXPERTS}",
)
CUTS: Final = ("chunk", "getitem", "narrow", "select", "slice", "split", "split_with_sizes", "tensor_split", "unbind")


def find_linears(graph: fx.Graph, context: PassContext) -> int:
    """Fill `context.sites` and `context.refusals`. Changes nothing.

    A linear is F.linear, or addmm, mm or matmul with a 2-dimensional Parameter on the right (Conv1D of GPT-2), as it is
    or transposed there (Falcon), or with some of its output channels; or a grouped product with a 3-dimensional one,
    which holds a matrix for each expert; or what is one of these but for the shapes of its operands; or a convolution
    of kernel size 1.
    """
    inputs = dict(zip(graph.find_nodes(op="placeholder"), context.example_inputs, strict=True))
    search = _Search(context=context, inputs=inputs, written=written_memory(graph))
    for node in graph.nodes:
        search.depth += _entered_transforms(node)
        found = operands_of(node) or convolution_of(node)
        if found is None:
            continue
        if found.turned and not isinstance(inputs.get(found.weight), nn.Parameter):
            if _is_convolution(inputs.get(_origin(found.weight)), context):
                context.refusals[_computed_name(found.weight, inputs, context)] = COMPUTED
            continue
        operands = found if found.turned else reshaped(found, inputs, search.written)
        left = None if operands else _weight_on_the_left(found, inputs)
        if left is not None:
            context.refusals[context.owner.name_of(left)] = ON_THE_LEFT[left.dim() > 2]
            continue
        operands = operands or seen_through(found, inputs)
        name, reason = search.refusal(operands)
        if reason is None:
            context.sites.append(search.site(node, operands))
        elif _may_be_linear(operands, inputs):
            context.refusals[name] = reason
    return len(context.sites)


@dataclass(kw_only=True)
class _Search:
    """What is known on the way through a graph.

    written: memory that the graph writes to. orientation: by weight and part, how its first use takes it. tokens: by
    where experts' rows end, which tokens those rows are of. copies: by which expert each row goes to, how many of a
    token there are. depth: in how many transforms of torch.func the next node is.
    """

    context: PassContext
    inputs: Mapping[fx.Node, Any]
    written: frozenset[int]
    orientation: dict[tuple[fx.Node, Part | None], bool] = field(default_factory=dict)
    tokens: dict[fx.Node, fx.Node] = field(default_factory=dict)
    copies: dict[fx.Node, int] = field(default_factory=dict)
    depth: int = 0

    def refusal(self, operands: Operands) -> tuple[str, str | None]:
        """(name, why the candidate must stay as it is or None)."""
        name, reason = _refusal(operands, self.inputs, self.context)
        if reason is not None:
            return name, reason
        weight, transposed, part = operands.weight, operands.transposed, operands.part
        if self.depth:
            return f"{name} (torch.func)", "it runs under a transform of torch.func, such as vmap"
        if memory_of(weight) in self.written:
            return name, "its weight is written to in the graph that uses it"
        differs = self.orientation.setdefault((weight, part), transposed) != transposed
        if differs or self.context.owner.is_used_otherwise(self.inputs[weight], transposed=transposed, part=part):
            return f"{name} (transposed)", BOTH_WAYS
        return name, None

    def site(self, node: fx.Node, operands: Operands) -> LinearSite:
        """The linear that a product is."""
        x, routing = operands.x, None
        if operands.offs is not None:
            x, rows = ungathered(x, self.written)
            if rows is not None:
                self.tokens.setdefault(operands.offs, rows)
            routing = Routing(operands.offs, rows, self.tokens.get(operands.offs))
        return LinearSite(
            node=node, x=x, weight=operands.weight, bias=operands.bias, transposed=operands.transposed,
            parameter=self.inputs[operands.weight], routing=routing, batch=self._known(operands.batch),
            turned=operands.turned, part=operands.part,
        )  # fmt: skip

    def _known(self, batch: Batch | None) -> Batch | None:
        """The same with what other products by the same index tell of its rows."""
        if batch is None or batch.experts is None:
            return batch
        if batch.copies is not None:
            self.copies.setdefault(batch.experts, batch.copies)
        return replace(batch, copies=self.copies.get(batch.experts))


def ungathered(x: fx.Node, written: frozenset[int]) -> tuple[fx.Node, fx.Node | None]:
    """(tokens, rows) where x = tokens[rows], so that tokens may be quantized once; else (x, None).

    written: memory that the graph writes to, for what is written to between may differ.
    """
    node = x
    while node.target == "to" and _example_of(node.args[0]).dtype == _example_of(node).dtype:
        node = node.args[0]  # type: ignore[assignment]
    if node.target is not operator.getitem or not isinstance(node.args[1], fx.Node):
        return x, None
    tokens, rows = node.args
    if not isinstance(tokens, fx.Node) or not isinstance(rows, fx.Node):
        return x, None
    is_index = _example_of(rows).dtype in (torch.int32, torch.int64) and _example_of(rows).dim() == 1
    if not is_index or _example_of(tokens).dim() != 2 or {memory_of(one) for one in (node, tokens, rows)} & written:
        return x, None
    return tokens, rows


def _example_of(node: Any) -> Any:
    return node.meta["example_value"]


def _entered_transforms(node: fx.Node) -> int:
    """1 where a graph enters a transform of torch.func, -1 where it leaves one."""
    name = getattr(node.target, "__name__", "")
    return name.endswith("_increment_nesting") - name.endswith("_decrement_nesting")


def _weight_on_the_left(operands: Operands, inputs: Mapping[fx.Node, object]) -> nn.Parameter | None:
    """The Parameter that a product has a part of on its left, and on its right what comes from none."""
    node = operands.x
    while node.args and isinstance(node.args[0], fx.Node) and (is_transpose(node) or _cuts(node)):
        node = node.args[0]
    left = inputs.get(node)
    if not isinstance(left, nn.Parameter) or left.dim() < 2 or not operands.transposed:
        return None
    return None if isinstance(inputs.get(_origin(operands.weight)), nn.Parameter) else left


def _may_be_linear(operands: Operands, inputs: Mapping[fx.Node, object]) -> bool:
    """Whether a user would take a product for a linear, and not for one of two activations."""
    weight = _origin(operands.weight) if operands.offs else operands.weight
    is_parameter = isinstance(inputs.get(weight), nn.Parameter) or parameter_under(weight, inputs) is not None
    return not operands.transposed or is_parameter


def _is_convolution(weight: object, context: PassContext) -> bool:
    """Whether it is a Parameter that a convolution could be a linear with; it is refused where none are wanted."""
    if not isinstance(weight, nn.Parameter) or weight.dim() == as_matrix(weight.detach()).dim():
        return False
    return context.owner.refusal(weight) is None


def _computed_name(weight: fx.Node, inputs: Mapping[fx.Node, object], context: PassContext) -> str:
    """A weight that is computed goes by the Parameter that it comes from, if it is one's slice, view or multiple."""
    parameter = inputs.get(_origin(weight))
    if not isinstance(parameter, nn.Parameter) or parameter.dim() < 2:
        return weight.name
    name = context.owner.name_of(parameter)
    return name if parameter.dim() > 2 else f"{name} (computed)"


def _origin(node: fx.Node) -> fx.Node:
    """The input of the graph that `node` is a slice, view or multiple of."""
    while node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


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


def _refusal(operands: Operands, inputs: Mapping[fx.Node, object], context: PassContext) -> tuple[str, str | None]:
    """(name, why it can't be a linear of ours, whatever else its graph does, or None)."""
    weight = operands.weight
    parameter = inputs.get(weight)
    if weight.op == "get_attr":
        return str(weight.target), "its weight is a constant of the graph (is freezing on?)"
    if (left := why_no_view(weight, inputs)) is not None:
        return context.owner.name_of(left[0]), left[1]
    whole = inputs.get(_cut_from(weight))
    if isinstance(whole, nn.Parameter) and whole is not parameter and whole.dim() == 2:
        return context.owner.name_of(whole), CUT_OTHERWISE
    if isinstance(whole, nn.Parameter) and whole is not parameter and whole.dim() == 3:
        return context.owner.name_of(whole), TAKEN_OUT
    if not isinstance(parameter, nn.Parameter):
        return _computed_name(weight, inputs, context), COMPUTED
    if parameter.dim() < 2:
        return weight.name, "its weight is a vector"
    if special := _refused_tensors(parameter, operands):
        return context.owner.name_of(parameter), special
    name = context.owner.name_of(parameter, operands.part)
    return name, context.owner.refusal(parameter, operands.part)


def _refused_tensors(parameter: nn.Parameter, operands: Operands) -> str | None:
    """Why a product of these tensors is not covered, or None."""
    if special := why_no_plain_weight(parameter):
        return special
    is_stack = operands.offs is not None or operands.batch is not None
    matrix = as_matrix(parameter.detach())
    if parameter.dim() > matrix.dim() and (is_stack or not operands.turned):  # no convolution multiplies by it
        return f"its weight has {parameter.dim()} dimensions, not 2"
    if matrix.dim() != 2 + is_stack:
        return f"its weight has {parameter.dim()} dimensions, not {2 + is_stack}"
    if parameter.dtype not in FLOAT_DTYPES:
        return f"its weight is {parameter.dtype}, not float32, bfloat16 or float16"
    example = operands.x.meta.get("example_value")
    if isinstance(example, torch.Tensor) and example.dtype not in FLOAT_DTYPES:
        return f"its input is {example.dtype}, not float32, bfloat16 or float16"
    added = None if operands.bias is None else operands.bias.meta.get("example_value")
    outputs = operands.part.size if operands.part else matrix.shape[-1 if operands.transposed else -2]
    if isinstance(added, torch.Tensor) and (added.dim() != 1 or added.shape[0] != outputs):
        return f"its bias has shape {tuple(added.shape)}, not one element per output"
    return None

"""Which nodes of a Dynamo graph multiply by what may be a weight, and which operand is what."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import fx

from micromix_compile.lowering.torch_private.operators import BUILTIN_LINEAR, GROUPED_MM, bound, schema_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.passes.context import Batch
    from micromix_compile.recipe.parts import Part

aten = torch.ops.aten

PYTHONS_NAMES: Final = {"input": "self"}
"""What torch's Python functions call the arguments of operators. Those of a linear are called the same."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Product:
    """How an operator multiplies: x @ weight + bias if `transposed`, else x @ weight.T + bias.

    schema: of the operator. x, weight, bias, offs: names of its arguments; the last says where the rows of each of a
    stack of weights end, as of experts.
    """

    schema: Any
    x: str = "self"
    weight: str
    bias: str | None = None
    transposed: bool = True
    offs: str | None = None


LINEAR: Final = Product(
    schema=schema_of(aten.linear.default), x="input", weight="weight", bias="bias", transposed=False
)
ADDMM: Final = Product(schema=schema_of(aten.addmm.default), x="mat1", weight="mat2", bias="self")
MM: Final = Product(schema=schema_of(aten.mm.default), weight="mat2")
MATMUL: Final = Product(schema=schema_of(aten.matmul.default), weight="other")
BMM: Final = Product(schema=schema_of(aten.bmm.default), weight="mat2")
GROUPED_PRODUCT: Final = Product(schema=schema_of(aten._grouped_mm.default), weight="mat2", offs="offs")

FUNCTIONS: Final[dict[Any, Product]] = {
    **dict.fromkeys((torch.nn.functional.linear, BUILTIN_LINEAR, aten.linear.default), LINEAR),
    **dict.fromkeys((torch.addmm, aten.addmm.default), ADDMM),
    **dict.fromkeys((torch.mm, aten.mm.default), MM),
    **dict.fromkeys((torch.matmul, operator.matmul), MATMUL),
    **dict.fromkeys((torch.bmm, aten.bmm.default), BMM),
    **dict.fromkeys((GROUPED_MM, aten._grouped_mm.default), GROUPED_PRODUCT),
}
GROUPED_BY_NAME: Final = ("transformers.grouped_mm_fallback", "transformers.grouped_mm_fallback.default")
"""The same product as transformers has it in float32, which is known only where transformers is."""
METHODS: Final = {"mm": MM, "matmul": MATMUL, "__matmul__": MATMUL, "bmm": BMM}


@dataclass(frozen=True, kw_only=True, slots=True)
class Operands:
    """What a product reads; `transposed` as in `Product`.

    offs: where the rows of each expert end, of a grouped one. batch: of a batched one with a stack of weights.
    turned: how many dimensions of x are behind its channels, as in (..., C, T) of a weight on the left, and in
    (B, C, H, W) of a convolution. part: of a weight that is not multiplied as a whole.
    """

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    offs: fx.Node | None = None
    batch: Batch | None = None
    turned: int = 0
    part: Part | None = None


CONVOLUTIONS: Final[dict[Any, Any]] = {
    **dict.fromkeys((torch.conv1d, aten.conv1d.default), schema_of(aten.conv1d.default)),
    **dict.fromkeys((torch.conv2d, aten.conv2d.default), schema_of(aten.conv2d.default)),
}


def convolution_of(node: fx.Node) -> Operands | None:
    """The operands of a convolution that multiplies each place by one matrix; None for other nodes."""
    if node.op != "call_function" or node.target not in CONVOLUTIONS:
        return None
    given = bound(CONVOLUTIONS[node.target], node.args, node.kwargs)
    x, weight, bias = given["input"], given["weight"], given["bias"]
    kernel = weight.meta["example_value"].shape[2:] if isinstance(weight, fx.Node) else ()
    ones, padding = _each(given["stride"]), given["padding"]
    if not isinstance(x, fx.Node) or not kernel or any(one != 1 for one in (*kernel, *ones, given["groups"])):
        return None
    if not isinstance(padding, str) and any(_each(padding)):  # of one place "same" pads nothing
        return None
    bias = bias if isinstance(bias, fx.Node) else None
    return Operands(x=x, weight=weight, bias=bias, transposed=False, turned=len(kernel))


def _each(sizes: Any) -> Sequence[Any]:
    return sizes if isinstance(sizes, list | tuple) else (sizes,)


def operands_of(node: fx.Node) -> Operands | None:
    """The operands of a product, None for other nodes, and for products with factors or an output that is given."""
    if node.op not in ("call_function", "call_method"):
        return None
    product = _product_of(node)
    if product is None:
        return None
    given = _given(node, product)
    x, weight = given.pop(product.x, None), given.pop(product.weight, None)
    bias = given.pop(product.bias, None) if product.bias else None
    offs = given.pop(product.offs, None) if product.offs else None
    if (
        not isinstance(x, fx.Node)
        or not isinstance(weight, fx.Node)
        or not (isinstance(offs, fx.Node) or not product.offs)
    ):
        return None
    defaults = bound(product.schema, (), {})
    if any(name not in defaults or value != defaults[name] for name, value in given.items()):
        return None
    bias = bias if isinstance(bias, fx.Node) else None
    return Operands(x=x, weight=weight, bias=bias, transposed=product.transposed, offs=offs)


def _product_of(node: fx.Node) -> Product | None:
    if node.op == "call_method":
        return METHODS.get(str(node.target))
    if str(node.target) in GROUPED_BY_NAME:
        return Product(schema=schema_of(node.target), x="input", weight="weight", offs="offs")
    return FUNCTIONS.get(node.target)


def _given(node: fx.Node, product: Product) -> dict[str, Any]:
    """Arguments by the names of the operator's schema."""
    names = {} if product.x == "input" else PYTHONS_NAMES
    return bound(product.schema, node.args, {names.get(name, name): value for name, value in node.kwargs.items()})


def is_transpose(node: fx.Node) -> bool:
    """Whether `node` transposes a matrix or, in a stack, each."""
    example = node.meta.get("example_value")
    rank = example.dim() if isinstance(example, torch.Tensor) else 2
    name = str(node.target).removesuffix(".default")  # of `.T` and `.mT` from torch 2.15 on
    if name in ("aten.numpy_T", "aten.mT"):
        return name == "aten.mT" or rank == 2
    if node.op == "call_function" and node.target is getattr:
        return node.args[1] == "mT" or (node.args[1] == "T" and rank == 2)
    if node.kwargs or node.target not in ("t", torch.t, "transpose", torch.transpose, "permute", torch.permute):
        return False
    if node.target in ("t", torch.t):
        return True
    given = node.args[1:]
    dims = given[0] if len(given) == 1 and isinstance(given[0], list | tuple) else given
    order = [dim for dim in dims if isinstance(dim, int)]
    if node.target in ("transpose", torch.transpose):
        return sorted(dim % rank for dim in order) == [rank - 2, rank - 1]
    rank = len(order)
    return [dim % rank for dim in order] == [*range(rank - 2), rank - 1, rank - 2]

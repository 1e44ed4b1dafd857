"""What passes are given: the linears that were found, how they are to be rewritten, and whom to ask."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from micromix_compile.recipe.parts import as_matrix
from micromix_compile.targets.target import target_of

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch
    from torch import Tensor, fx, nn

    from micromix_compile.numerics.layout import RowLayout
    from micromix_compile.recipe.parts import Part
    from micromix_compile.targets.target import Target


class Routing(NamedTuple):
    """Which rows a grouped product multiplies by which of its experts' matrices.

    offs: (E,), where each expert's output rows end. rows: (R,), which row of x each output row reads; None where x has
    them in that order already. tokens: (R,), which of the layer's tokens each output row is of; None where that is not
    known.
    """

    offs: fx.Node
    rows: fx.Node | None
    tokens: fx.Node | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """How a batched product multiplies by a stack of E matrices, other than a grouped one.

    experts: (R,), which matrix each row of x is multiplied by; None where x (E, T, C) has rows for all. copies: how
    many rows, one behind the other, are of one token; where x was these copies it is the tokens (T, C) now.
    is_all_tokens: x holds the layer's tokens for each matrix.
    """

    experts: fx.Node | None = None
    copies: int | None = None
    is_all_tokens: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearSite:
    """One linear layer found in a graph: node = x @ weight.T + bias, or x @ weight + bias if `transposed`.

    routing: of a product with a layer's experts, whose weight holds a matrix each; x then holds the rows before they
    are sorted by expert. batch: of a batched product with such a weight, in the place of `routing`. turned: how many
    dimensions of x are behind its channels: of node = weight @ x with x (..., C, T), and of convolutions. part: the
    output channels that are multiplied, where it is not all of the weight.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    parameter: nn.Parameter
    routing: Routing | None = None
    batch: Batch | None = None
    turned: int = 0
    part: Part | None = None

    @property
    def in_features(self) -> int:
        """Input channels C."""
        return as_matrix(self.parameter).shape[-2 if self.transposed else -1]

    @property
    def out_features(self) -> int:
        """Output channels N."""
        if self.part is not None:
            return self.part.size
        return as_matrix(self.parameter).shape[-1 if self.transposed else -2]

    @property
    def is_convolution(self) -> bool:
        """Whether its weight is one of a convolution."""
        return self.parameter.dim() > as_matrix(self.parameter).dim()


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """How one linear is to be rewritten.

    group: what its activation's order is looked up by; linears with equal groups share one channel_perm.
    layout: how its activation is quantized.
    tensors: examples of (channel_perm, w4, w6, w8, w_scale), for their shapes.
    """

    group: int
    layout: RowLayout
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]


class Owner(Protocol):
    """What the passes ask of whoever holds the model's state."""

    def name_of(self, parameter: nn.Parameter, part: Part | None = None) -> str:
        """Fully qualified name of the linear that owns `parameter`, or of the one that is a part of it."""

    def refusal(self, parameter: nn.Parameter, part: Part | None = None) -> str | None:
        """Why the linear must stay as it is, or None."""

    def is_used_otherwise(self, parameter: nn.Parameter, *, transposed: bool, part: Part | None = None) -> bool:
        """Whether another graph uses the weight the other way round."""

    def plan(self, parameter: nn.Parameter, *, transposed: bool, part: Part | None = None) -> LinearPlan | None:
        """How to rewrite the linear, or None while it isn't calibrated."""

    def observe(
        self, x: Tensor, parameters: Sequence[nn.Parameter], transposed: Sequence[bool], source: Tensor | None,
        routings: Sequence[Sequence[Tensor | None] | None], parts: Sequence[Part | None],
    ) -> Any:  # fmt: skip
        """Take statistics of `x`, the common input of the linears with these weights, flattened from `source`.

        routings: for each weight that is of experts the tensors of its `Routing`, None for others. parts: which part
        of each it is, None for all.
        Returns what `observe_output` wants to know of this call.
        """

    def observe_output(self, y: Tensor, parameter: nn.Parameter, watched: Any, part: Part | None) -> None:
        """Take statistics of `y`, the output of the linear with this weight. watched: what `observe` returned."""

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        """Append a graph input that is looked up anew for every call."""


@dataclass(kw_only=True)
class PassContext:
    """What passes share while they work on one graph.

    example_inputs: the graph's inputs as the compiler got them; Parameters are real tensors. Empty after autograd.
    sites: filled by find_linears. refusals: name -> why a linear was left alone.
    unopened: filled by open_attention: name -> why the fused operation that reads the weight was left alone.
    inputs: filled by rewrite_linears: per appended input, the Parameter's placeholder, its part, and which tensor of
        the plan.
    target_of: who computes on a device.
    keeps_expanded: whether folded products get their weights as E4M3, too.
    folded: filled by fold_products: for one or more appended inputs, in order, the inputs that they are made from, and
        the function that makes them, anew when the last changes.
    """

    owner: Owner
    example_inputs: Sequence[Any]
    dump: Sequence[str] = ()
    dump_dir: str = "."
    sites: list[LinearSite] = field(default_factory=list)
    refusals: dict[str, str] = field(default_factory=dict)
    unopened: dict[str, str] = field(default_factory=dict)
    inputs: list[tuple[fx.Node, Part | None, int]] = field(default_factory=list)
    target_of: Callable[[torch.device], Target] = target_of
    keeps_expanded: bool = False
    folded: list[tuple[tuple[fx.Node, ...], Callable[..., tuple[Tensor, ...]]]] = field(default_factory=list)

    def after_autograd(self) -> PassContext:
        """The same for the graph that Inductor gets: what spoke of Dynamo's graph is empty."""
        return replace(self, example_inputs=(), sites=[], refusals={}, unopened={}, inputs=[], folded=[])

"""What is known of one weight, and in which phase it is: calibrating, quantized or left as it is.

State hangs on the model's Parameters, because a compiled graph knows its weights by identity only: one graph may serve
many layers. Graphs are guarded by the key in it, so that a change of phase makes torch.compile compile again by itself.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from micromix_compile.recipe.parts import as_matrix, gaps

if TYPE_CHECKING:
    from collections.abc import Mapping
    from weakref import ref

    from torch import nn

    from micromix_compile.calibration.experts import ExpertObserver
    from micromix_compile.calibration.observer import ChannelObserver
    from micromix_compile.ops.prepared import Kept
    from micromix_compile.recipe.parts import Part
    from micromix_compile.recipe.types import GroupRecipe, LinearRecipe, Recipe
    from micromix_compile.recipe.watched import RecipeFile

    Members = Mapping[GroupRecipe, tuple[str, ...]]

Key = tuple[object, ...]
PackedTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""(channel_perm, w4, w6, w8, w_scale)."""

CALIBRATE: Key = ("calibrate",)
UNQUANTIZED: Key = ("unquantized",)


@dataclass(slots=True, eq=False)
class LinearState:
    """One weight: what it is called, who observes its input, what was decided, its packed form.

    file: what the recipe was read from, if it was; graphs are guarded by its content. transposed: known from its first
    use. looks_linear: as long as no graph was seen; otherwise it counts as a linear only where one uses it so. part:
    what it is of the Parameter, None for all. parts: of all of one, the parts that are linears of their own.
    """

    names: list[str]
    parameter: ref[nn.Parameter]
    own_key: Key = ()
    file: RecipeFile | None = None
    refusal: str | None = None
    looks_linear: bool = True
    transposed: bool | None = None
    observer: ChannelObserver | None = None
    experts: ExpertObserver | None = None
    linear: LinearRecipe | None = None
    packed: Kept[PackedTensors] | None = None
    calls: int = 0
    part: Part | None = None
    parts: dict[Part, LinearState] = field(default_factory=dict)

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A saved model does not take this with it, but something that `torch.load` may read with weights only."""
        return OrderedDict, ()

    @property
    def name(self) -> str:
        """The name it goes by; a tied weight is called after its last use, which is the linear."""
        return self.names[-1]

    @property
    def key(self) -> Key:
        """Phase, split and group, and those of parts in another phase; graphs that use the weight are guarded by it."""
        others = [(part, state.own_key) for part, state in sorted(self.parts.items()) if state.own_key != self.own_key]
        return (*self.own_key, *others)

    @property
    def may_be_experts(self) -> bool:
        """Whether it may be of experts, though only a product that uses it so would say it is a linear."""
        parameter = self.parameter()
        if self.refusal is not None or self.looks_linear or parameter is None:
            return False
        return as_matrix(parameter.detach()).dim() == 3

    @property
    def recipe_digest(self) -> str:
        """Of the recipe's file as it is now."""
        return "" if self.file is None else self.file.digest

    @property
    def was_observed(self) -> bool:
        """Whether calibration saw a token of its input."""
        return self.observer is not None and self.observer.tokens > 0

    def uncut_names(self) -> list[str]:
        """What is no linear of its own: its name, or those of what is between its parts."""
        parameter = self.parameter()
        if self.refusal is not None or not self.parts or parameter is None:
            return [self.name]
        dim = next(iter(self.parts)).dim
        parts = [part for part in self.parts if part.dim == dim]
        return [f"{self.name}{gap}" for gap in gaps(parts, parameter.shape[dim])]

    def weight(self) -> Tensor | None:
        """The Parameter as a matrix, or a stack of such, or the part of it, if it is still alive."""
        parameter = self.parameter()
        if parameter is None or self.part is None:
            return None if parameter is None else as_matrix(parameter.detach())
        return self.part.of(parameter.detach())

    def matrix(self) -> Tensor | None:
        """(N, C), or (E, N, C) of experts: the weight as `x @ weight.T` uses it, if it is still alive."""
        weight = self.weight()
        return weight.mT if weight is not None and self.transposed else weight

    def decide(self, linear: LinearRecipe | None, members: Members | None) -> None:
        """Note what the recipe says of it, None for nothing, and the phase that follows from that.

        members: of the recipe's groups; None where there is no recipe yet.
        """
        self.linear = linear
        if self.refusal is not None:
            self.own_key = UNQUANTIZED
        elif members is None:
            self.own_key = CALIBRATE
        elif linear is None:
            self.own_key = UNQUANTIZED
        else:
            self.own_key = ("quantized", *linear.split, linear.group.rotated, members[linear.group])


def members_of(recipe: Recipe) -> Members:
    """What the linears of each group are called in their modules, in the recipe's order."""
    members: dict[GroupRecipe, tuple[str, ...]] = {}
    for linear in recipe.linears.values():
        members[linear.group] = (*members.get(linear.group, ()), linear.fqn.rpartition(".")[2])
    return members

"""The packed form of a model's weights, made at first use and again after a weight has changed."""

from __future__ import annotations

from typing import TYPE_CHECKING

from micromix_compile.ops.pack import packed_weight
from micromix_compile.ops.prepared import Kept

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from micromix_compile.recipe.types import GroupRecipe, Recipe
    from micromix_compile.session.state import LinearState, PackedTensors


class PackedWeights:
    """What a recipe makes of weights, kept in their states; linears of a group share one order on each device."""

    def __init__(self) -> None:
        self._orders: dict[tuple[str, torch.device], Tensor] = {}

    def of(self, parameter: nn.Parameter, state: LinearState, recipe: Recipe) -> PackedTensors:
        """(channel_perm, w4, w6, w8, w_scale). What is seen as a change of a weight says `versions`."""
        if state.packed is None:
            state.packed = Kept(self._pack)
        return state.packed.of([parameter], parameter.device, state, recipe)

    def _pack(self, device: torch.device, state: LinearState, recipe: Recipe) -> PackedTensors:
        matrix = state.matrix()
        assert state.linear is not None, f"{state.name} has no recipe"
        assert matrix is not None, "its weight was given"
        return (self._order(state.linear.group, device), *packed_weight(matrix, state.linear, recipe))

    def _order(self, group: GroupRecipe, device: torch.device) -> Tensor:
        if (group.name, device) not in self._orders:
            self._orders[group.name, device] = group.order_on(device)
        return self._orders[group.name, device]

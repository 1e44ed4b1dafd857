"""One call of a group of linears: what of its input is kept until outputs, and gradients, have come."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from micromix_compile.calibration.experts import expert_name

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from micromix_compile.calibration.experts import Routed
    from micromix_compile.calibration.observer import ChannelObserver
    from micromix_compile.session.state import LinearState


class Watched:
    """One input (..., C) of a group of linears; a graph hands it on to what sees their outputs.

    state: of one of them; who observes it may be another one when gradients come. keep: bool, which of the input's M
    rows count; None if all do. routed: by weight of experts, which rows these read. takes_costs, takes_moments: what is
    measured of this call; moments those that are guided.
    """

    def __init__(
        self,
        state: LinearState,
        keep: Tensor | None,
        routed: Mapping[LinearState, Routed],
        *,
        takes_costs: bool,
        takes_moments: bool,
    ) -> None:
        self._state = state
        self._keep = keep
        self._routed = routed
        self._takes_costs = takes_costs
        self._takes_moments = takes_moments
        self._rows: Tensor | None = None  # (M, C) float32, with gradients
        self._importance: Tensor | None = None  # (M,) float32: sums of |g|**2 over the outputs whose gradients came

    def counted(self, values: Tensor) -> Tensor:
        """What counts of the input, or of an output: (rows, F) float32."""
        rows = _rows(values.detach())
        return rows if self._keep is None else rows[self._keep.to(rows.device)]

    def watch_gradients(self, x: Tensor, order: Tensor) -> None:
        """Have gradients at the input x, which requires them, and at the outputs to come, counted when they come.

        order: as of `CostProbe.add_input`.
        """
        # A copy: the model may change x in place before the backward pass.
        rows = self._rows = self._or_zero(x.detach().to(torch.float32, copy=True))
        importance = self._importance = rows.new_zeros(rows.shape[0])

        def backward(gradient: Tensor) -> None:
            # Of x, which autograd reaches behind all outputs of the group.
            if self._takes_costs and self._observer.probe is not None:
                self._observer.probe.add_slopes(rows, self._or_zero(gradient), order)
            if self._takes_moments:
                self._observer.update_guided(rows, importance)

        x.register_hook(backward)

    def output(self, state: LinearState, y: Tensor) -> None:
        """Take note of the output (..., N) of one of the linears, or have the gradient at it counted when it comes."""
        routed = self._routed.get(state)
        if self._rows is not None and y.requires_grad:
            y.register_hook(lambda slopes: self._add_slopes(state, slopes, routed))
        probe = self._observer.probe
        if self._rows is not None or not self._takes_costs or probe is None:
            return
        if routed is None:
            probe.add_output(state.name, self.counted(y))
            return
        for expert, own in enumerate(routed.outputs):
            probe.add_expert_output(expert_name(state.name, expert), y.detach()[own].to(torch.float32))

    def _add_slopes(self, state: LinearState, slopes: Tensor, routed: Routed | None) -> None:
        """Count gradients (..., N) at an output."""
        rows, importance, probe = self._rows, self._importance, self._observer.probe
        assert rows is not None, "gradients are watched"
        assert importance is not None, "with them"
        if routed is None:
            counted = self._or_zero(slopes)
            if self._takes_costs and probe is not None:
                probe.add_information(state.name, counted, rows)
            if self._takes_moments:
                importance.add_(counted.square().sum(1))
            return
        for expert, (own, read) in enumerate(zip(routed.outputs, routed.inputs, strict=True)):
            if self._takes_costs and probe is not None:
                probe.add_information(expert_name(state.name, expert), slopes[own].to(torch.float32), rows[read])
        if self._takes_moments and state.experts is not None:
            state.experts.update_guided(rows, slopes, routed)

    @property
    def _observer(self) -> ChannelObserver:
        observer = self._state.observer
        assert observer is not None, "it is let go of after the last gradient"
        return observer

    def _or_zero(self, values: Tensor) -> Tensor:
        """(M, F) float32: zeros where nothing counts, which may hold NaNs and has gradients like these."""
        rows = _rows(values)
        return rows if self._keep is None else rows.masked_fill(~self._keep.to(rows.device)[:, None], 0)


def _rows(values: Tensor) -> Tensor:
    return values.reshape(-1, values.shape[-1]).to(torch.float32)

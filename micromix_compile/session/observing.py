"""What is observed of a model: who watches the inputs of its linears, and whether that is enough."""

from __future__ import annotations

import dataclasses
import threading
from typing import TYPE_CHECKING

import torch

from micromix_compile.calibration.experts import ExpertObserver, Routed
from micromix_compile.calibration.observer import ChannelObserver
from micromix_compile.calibration.policies import policy_of
from micromix_compile.calibration.sensitivity import CostProbe
from micromix_compile.calibration.token_layout import TokenLayout
from micromix_compile.session.watched import Watched

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.session.names import Names
    from micromix_compile.session.state import LinearState

    RoutingTensors = Sequence[Tensor | None]
    """(offs, rows, tokens) of a `passes.context.Routing`."""


class Observation:
    """The observers and probes of a model's linears, which the states of their weights hold.

    configs: those that recipes are to be made for; what is measured for all of them follows the first.
    takes_statistics, takes_moments, takes_costs, takes_gradients: what is measured in the passes to come. With
    gradients moments are guided by them. is_guided: whether those were had.
    lock: of what is observed, and of the change from calibrating to quantized.
    """

    def __init__(self, names: Names, configs: Sequence[MicroMixConfig]) -> None:
        self.configs = configs
        self.takes_statistics = True
        self.takes_moments = self.rounds_weights
        self.takes_costs = self.needs_costs
        self.takes_gradients = False
        self.is_guided = False
        self.lock = threading.RLock()
        self._names = names
        self._pass = threading.local()
        self._layout = TokenLayout()
        self._enough_at: int | None = None
        self._leaves: list[tuple[Tensor, Tensor | None]] = []  # made to require gradients, and their own

    @property
    def rounds_weights(self) -> bool:
        """Whether a config has weights rounded while calibrating."""
        return any(config.rounds_weights for config in self.configs)

    @property
    def needs_plain_moments(self) -> bool:
        """Whether one of them has them rounded by moments that gradients don't guide."""
        return any(config.rounds_weights and config.weight_rounding != "guided" for config in self.configs)

    @property
    def needs_guidance(self) -> bool:
        """Whether one of them has them rounded by moments that gradients guide."""
        return any(config.weight_rounding == "guided" for config in self.configs)

    def feasible(self, config: MicroMixConfig) -> MicroMixConfig:
        """The config, with the rounding that does without gradients if there were none."""
        if config.weight_rounding != "guided" or self.is_guided:
            return config
        return dataclasses.replace(config, weight_rounding="gptq")

    @property
    def needs_costs(self) -> bool:
        """Whether a config spends a budget."""
        return any(policy_of(config).needs_costs for config in self.configs)

    @property
    def token_mask(self) -> Tensor | None:
        """(B, T): the attention mask of the forward pass that this thread observes."""
        return getattr(self._pass, "token_mask", None)

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self._pass.token_mask = mask

    def input(
        self, x: Tensor, states: Sequence[LinearState], transposed: Sequence[bool], source: Tensor | None,
        routings: Sequence[RoutingTensors | None],
    ) -> Watched:  # fmt: skip
        """Take statistics of `x`, the common input of the linears with these weights, flattened from `source`.

        routings: for each weight that is of experts the tensors of its `passes.context.Routing`, None for others.
        Returns what `output` wants to know of this call.
        """
        with self.lock:
            for state, flipped in zip(states, transposed, strict=True):
                state.transposed = flipped
            observer = self._observer(states, x)
            sorted_by = next((routing for routing in routings if routing is not None and routing[1] is None), None)
            if sorted_by is None:
                kept, tokens = observer.kept(x, self.token_mask, source), None
            else:
                kept, tokens = _of_sorted_rows(x, sorted_by, observer.kept_tokens(self.token_mask))
            if self.takes_statistics:
                observer.update(*((x, self.token_mask, source) if sorted_by is None else (x[kept],)))
            if self.takes_moments and not self.takes_gradients:
                observer.update_moment(*((x, self.token_mask, source) if sorted_by is None else (x[kept],)))
            routed = self._route(x, states, routings, kept, tokens)
            guides = self.takes_moments and self.takes_gradients
            watched = Watched(states[0], kept, routed, takes_costs=self.takes_costs, takes_moments=guides)
            if self.takes_costs:
                self._probe(observer, x).add_input(watched.counted(x), observer.order(), tokens)
            if self.takes_gradients and (self.takes_costs or self.takes_moments):
                self._require_gradient(x)
                watched.watch_gradients(x, observer.order())
            return watched

    def _require_gradient(self, x: Tensor) -> None:
        """Make x require gradients until the batch is released; it may hold one already, as a Parameter does."""
        if not x.requires_grad:
            self._leaves.append((x, x.grad))
            x.grad = None
            x.requires_grad_(True)

    def _route(
        self, x: Tensor, states: Sequence[LinearState], routings: Sequence[RoutingTensors | None], kept: Tensor | None,
        tokens: int | None,
    ) -> dict[LinearState, Routed]:  # fmt: skip
        """Which rows of `x` reach which expert, by weight. kept: which count. tokens: how many tokens they are of."""
        all_routed = {}
        for state, routing in zip(states, routings, strict=True):
            if routing is None:
                continue
            offs, rows, _ = routing
            assert offs is not None, "a grouped product knows where rows end"
            routed = all_routed[state] = Routed.of(offs, rows, kept)
            if state.experts is None:
                state.experts = ExpertObserver(len(offs))
            if self.takes_statistics:
                counted = x.shape[0] if kept is None else int(kept.sum())
                state.experts.update(routed, counted if tokens is None else tokens)
            if self.takes_moments and not self.takes_gradients:
                state.experts.update_moments(x, routed)
        return all_routed

    def output(self, y: Tensor, state: LinearState, watched: Watched) -> None:
        """Take statistics of `y`, the output of the linear with this weight. watched: what its input returned."""
        with self.lock:
            if state.observer is not None:
                watched.output(state, y)

    def _observer(self, states: Sequence[LinearState], x: Tensor) -> ChannelObserver:
        """The one that these linears share: if they have several, the first, with all that the others saw."""
        known = dict.fromkeys(state.observer for state in states if state.observer is not None)
        observer, *others = known or [self._new_observer(states[0].name, x.shape[-1])]
        for other in others:
            observer.absorb(other)
            for state in self._names:
                if state.observer is other:
                    state.observer = observer
        for state in states:
            state.observer = observer
        return observer

    def _new_observer(self, name: str, channels: int) -> ChannelObserver:
        counted = tuple(dict.fromkeys(t for config in self.configs for t in policy_of(config).counted(config)))
        squares = self.rounds_weights or self.needs_costs
        return ChannelObserver(name, channels, counted, with_squares=squares, layout=self._layout)

    def _probe(self, observer: ChannelObserver, x: Tensor) -> CostProbe:
        if observer.probe is None:
            rounding = self.configs[0].scale_rounding
            observer.probe = CostProbe(x.shape[-1], rounding, gradients=self.takes_gradients)
        return observer.probe

    def observers(self) -> Iterator[ChannelObserver]:
        """The distinct observers made so far, in the model's order."""
        yield from dict.fromkeys(state.observer for state in self._names if state.observer is not None)

    def release_batch(self) -> None:
        """Let go of the last batch that was run backward."""
        for leaf, gradient in self._leaves:
            leaf.requires_grad_(False)
            leaf.grad = gradient
        self._leaves.clear()

    def forget_gradients(self) -> None:
        """Drop what was measured of costs, and moments that are guided."""
        for observer in self.observers():
            observer.probe = observer.guided = None

    def release(self) -> None:
        """Let go of all that was observed: second moments are K * K numbers a group."""
        self.release_batch()
        for state in self._names:
            state.observer = state.experts = None

    @property
    def batches(self) -> int:
        """Batches that the busiest linear has seen."""
        return max((observer.batches for observer in self.observers()), default=0)

    def is_enough(self) -> bool:
        """Whether every linear saw the configured batches or tokens, or one saw a batch more than that."""
        config, observers = self.configs[0], list(self.observers())
        enough = [
            observer
            for observer in observers
            if observer.batches >= config.calibration_batches or observer.tokens >= config.calibration_tokens
        ]
        if not enough:
            return False
        if self._enough_at is None:
            self._enough_at = self.batches
        return (len(enough) == len(observers) and not self.missing()) or self.batches > self._enough_at

    def missing(self) -> list[str]:
        """Linears that calibration has not reached."""
        return [
            state.name
            for state in self._names
            if state.refusal is None
            and state.looks_linear
            and not state.parts
            and state.name not in self._names.refusals
            and not state.was_observed
        ]


def _of_sorted_rows(x: Tensor, routing: RoutingTensors, kept_tokens: Tensor | None) -> tuple[Tensor, int]:
    """(which rows of x (R, C), sorted by expert, count: bool (R,); how many tokens those are of).

    Rows of zeros tell nothing; in some models they are the tokens that were not sent to an expert (Llama 4).
    """
    offs, _, tokens = routing
    assert offs is not None, "a grouped product knows where rows end"
    kept = (torch.arange(x.shape[0], device=x.device) < offs[-1]) & x.detach().any(1)
    if tokens is None:
        return kept, int(kept.sum())
    if kept_tokens is not None and bool((tokens < len(kept_tokens)).all()):
        kept &= kept_tokens.to(x.device)[tokens.to(torch.int64)]
    return kept, len(tokens[kept].unique())

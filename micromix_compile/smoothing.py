"""Smoothing: channels of an activation become smaller and the weights that read them larger, or the other way round.

Y = X W^T = (X / s)(W s)^T (SmoothQuant, arXiv 2211.10438). Dividing what makes X, a norm's weight or the rows of the
linear before, costs nothing when the model runs. Factors are powers of two, which change no bit of a product or a sum.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from micromix_compile.calibration import observe_batch, observing
from micromix_compile.config import DEFAULT_SKIP, MicroMixConfig
from micromix_compile.lowering import torch_compat
from micromix_compile.observer import ChannelObserver
from micromix_compile.passes import SMOOTH_PASSES, run_passes
from micromix_compile.progress import track
from micromix_compile.session import Session, close_graph, open_graph

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from micromix_compile.passes import SmoothableSite

logger = logging.getLogger("micromix_compile")


def smooth_(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any] | Tensor],
    *,
    alpha: float = 0.5,
    skip: Sequence[str] = DEFAULT_SKIP,
    progress: bool = True,
) -> nn.Module:
    """Scale channels between linears and what makes their inputs, in place. To be done before `calibrate`.

    An input is smoothed if only linears read it, and a norm's elementwise weight or another linear's rows make it, the
    latter maybe times something; no weight involved may be tied or used elsewhere. Others stay, as the log says at
    level debug. Outputs keep their bits while no number leaves the normal range of its dtype. Code that torch.compile
    doesn't see, or that no batch reaches, must not read these weights or activations.

    batches: as for `calibrate`. alpha: how much of the difference between channels goes from activations to weights, 0
    to 1 (see `smoothing_factors`). skip: fnmatch patterns of names of linears that stay as they are.
    Returns `model`. Raises ValueError for another alpha, a model in training mode, if nothing can be smoothed, or if an
    activation holds a NaN.
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    original = torch_compat.original_module(model)
    session = Session(MicroMixConfig(skip=tuple(skip)))
    session.prepare(original)
    groups = _Groups(session)
    try:
        with torch.no_grad(), observing(original, partial(_compile_watched, session, groups)) as watched:
            for batch in track(batches, "measuring activations", show=progress):
                observe_batch(session, watched, batch)
            smoothed = list(groups.independent(_shared_parameters(original)))
            for group in reversed(smoothed):  # a weight's rows before its columns, whose sizes follow
                _smooth(group, alpha)
        _warn_of_others(session, [p for p in original.parameters() if not groups.has_seen(p)])
    finally:
        groups.clear()
    if not smoothed:
        raise ValueError(f"{session.model_id} has no input of linears that can be smoothed, or no batch reached it")
    logger.info("smoothed the inputs of %d groups of linears of %s", len(smoothed), session.model_id)
    return model


def _warn_of_others(session: Session, unseen: Sequence[nn.Parameter]) -> None:
    """Say which linears no batch reached: they may read what was divided."""
    names = [session.name_of(p) for p in unseen if session.knows(p) and session.refusal(p) is None]
    if names:
        logger.warning(
            "smoothing did not reach %d linears of %s (%s, ...): if they read an activation that was smoothed, their "
            "outputs are wrong now, so take batches along every path of the model",
            len(names),
            session.model_id,
            names[0],
        )


def smoothing_factors(activation_max: Tensor, weight_max: Tensor, alpha: float) -> Tensor:
    """What to divide each channel of an activation by.

    activation_max, weight_max: (C,) float32, largest magnitudes per channel. Returns (C,) float32, powers of two:
    activation_max ** alpha / weight_max ** (1 - alpha) (SmoothQuant, Eq. 4), rounded, over their median; 1 where either
    is zero or not finite.
    """
    known = (activation_max > 0) & (weight_max > 0) & activation_max.isfinite() & weight_max.isfinite()
    if not bool(known.any()):
        return torch.ones_like(activation_max)
    exponents = (alpha * activation_max.log2() - (1 - alpha) * weight_max.log2() + 0.5).floor()
    return torch.exp2(torch.where(known, exponents - exponents[known].median(), 0.0))


def _smooth(group: _Group, alpha: float) -> None:
    """Channels that some Parameter could not hold exactly keep the factor 1."""
    weight_max = torch.stack([slot.amax() for slot in group.multiplied]).amax(0)
    factors = smoothing_factors(group.observer.statistics().abs_max, weight_max, alpha)
    exact = [slot.holds(1 / factors) for slot in group.divided] + [slot.holds(factors) for slot in group.multiplied]
    factors = torch.where(torch.stack(exact).all(0), factors, 1.0)
    for slot in group.divided:
        slot.parameter.copy_(slot.times(1 / factors))
    for slot in group.multiplied:
        slot.parameter.copy_(slot.times(factors))


@dataclass(frozen=True, slots=True)
class _Slot:
    """The channels along one dimension of a Parameter."""

    parameter: nn.Parameter
    dim: int

    @property
    def key(self) -> tuple[int, int]:
        """Parameters compare by identity."""
        return id(self.parameter), self.dim

    def amax(self) -> Tensor:
        """Largest magnitude of each channel: (C,) float32 on the CPU."""
        return self._channels(self.parameter.abs()).amax(1).to("cpu", torch.float32)

    def times(self, factors: Tensor) -> Tensor:
        """The Parameter with its channels multiplied by `factors` (C,)."""
        shape = [-1 if dim == self.dim else 1 for dim in range(self.parameter.dim())]
        return (self.parameter * factors.to(self.parameter.device).view(shape)).to(self.parameter.dtype)

    def holds(self, factors: Tensor) -> Tensor:
        """Which channels (C,) can be multiplied by `factors` without a rounding."""
        back = _Slot(nn.Parameter(self.times(factors), requires_grad=False), self.dim).times(1 / factors)
        return self._channels(back == self.parameter).all(1).cpu()

    def _channels(self, values: Tensor) -> Tensor:
        """`values`, of the Parameter's shape, as (C, others)."""
        return values.unsqueeze(1) if values.dim() == 1 else values.movedim(self.dim, 0)


@dataclass(frozen=True, slots=True, eq=False)
class _Group:
    """A SmoothableSite in one layer."""

    divided: tuple[_Slot, ...]
    multiplied: tuple[_Slot, ...]
    observer: ChannelObserver


class _Groups:
    """What was observed, by the Parameters that it concerns: one graph may serve many layers."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._groups: dict[tuple[tuple[int, int], ...], _Group] = {}
        self._users: dict[tuple[int, int], set[_Group | None]] = {}

    def enter(self, sites: Sequence[SmoothableSite], values: Mapping[fx.Node, Any]) -> dict[fx.Node, ChannelObserver]:
        """Note what a graph, about to run on `values`, uses Parameters for. Returns the observers of its nodes."""
        users: dict[tuple[fx.Node, int], _Group] = {}
        observers: dict[fx.Node, ChannelObserver] = {}
        for site in sites:
            group = self._group(site, values)
            users |= dict.fromkeys((*site.divided, *site.multiplied), group)
            observers[site.x] = group.observer
        for node, value in values.items():
            if isinstance(value, nn.Parameter) and node.users:
                for dim in range(value.dim()):
                    self._users.setdefault((id(value), dim), set()).add(users.get((node, dim)))
        return observers

    def _group(self, site: SmoothableSite, values: Mapping[fx.Node, Any]) -> _Group:
        divided = tuple(_Slot(values[node], dim) for node, dim in site.divided)
        multiplied = tuple(_Slot(values[node], dim) for node, dim in site.multiplied)
        key = tuple(slot.key for slot in (*divided, *multiplied))
        if key not in self._groups:
            weight, dim = multiplied[0].parameter, multiplied[0].dim
            observer = ChannelObserver(self._session.name_of(weight), weight.shape[dim], ())
            self._groups[key] = _Group(divided, multiplied, observer)
        return self._groups[key]

    def has_seen(self, parameter: nn.Parameter) -> bool:
        """Whether a graph that ran reads it."""
        return (id(parameter), 0) in self._users

    def clear(self) -> None:
        """Let go of all Parameters: compiled graphs live on, and hold this."""
        self._groups.clear()
        self._users.clear()

    def independent(self, shared: frozenset[int]) -> Iterator[_Group]:
        """The groups that saw a token and whose Parameters have no other user and are not among `shared`."""
        for group in self._groups.values():
            slots = (*group.divided, *group.multiplied)
            is_alone = all(self._users[slot.key] == {group} and id(slot.parameter) not in shared for slot in slots)
            if is_alone and group.observer.tokens:
                yield group
            else:
                logger.debug("the input of %s stays: weights that other places use, or no token", group.observer.name)


def _shared_parameters(model: nn.Module) -> frozenset[int]:
    """Identities of the Parameters whose storage `model` holds under several names, in part or as a whole."""
    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    counts = Counter(_storage(tensor) for _, tensor in tensors)
    return frozenset(id(parameter) for parameter in model.parameters() if counts[_storage(parameter)] > 1)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _compile_watched(
    session: Session, groups: _Groups, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> Callable[..., Any]:
    """The graph as it is, run eagerly, its smoothable activations observed."""
    gm, context = open_graph(session, gm, example_inputs)
    placeholders = gm.graph.find_nodes(op="placeholder")
    run_passes(gm, SMOOTH_PASSES, context)
    close_graph(session, context)
    smoothable = tuple(context.smoothable)  # the context holds Parameters

    def run(*args: Any) -> Any:
        session.check_not_training()
        observers = groups.enter(smoothable, dict(zip(placeholders, args, strict=True)))
        return _Watcher(gm, observers, session.token_mask).run(*args)

    return run


class _Watcher(fx.Interpreter):
    """Runs a graph and shows values of its nodes to observers."""

    def __init__(
        self, gm: fx.GraphModule, observers: Mapping[fx.Node, ChannelObserver], token_mask: Tensor | None
    ) -> None:
        super().__init__(gm)
        self.extra_traceback = False  # errors of observers are the user's to read
        self._observers = observers
        self._token_mask = token_mask

    def run_node(self, n: fx.Node) -> Any:
        """As usual, then observed."""
        value = super().run_node(n)
        if n in self._observers:
            self._observers[n].update(value, self._token_mask)
        return value

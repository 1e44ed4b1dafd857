"""All the backend knows of one model under one set of options: names, observers, the recipe, packed weights.

State hangs on the model's Parameters, because a compiled graph knows its weights by identity only: one graph may serve
many layers. Graphs are guarded by a key in that state, so that a change of phase, from calibrating to quantized, makes
torch.compile compile again by itself.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import hashlib
import itertools
import logging
import threading
from collections import OrderedDict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import finalize, ref

import torch
from torch import Tensor, nn

from micromix_compile.calibration.assignment import assign, channel_order
from micromix_compile.calibration.memory import ROUNDING, naming_out_of_memory
from micromix_compile.calibration.observer import ChannelObserver
from micromix_compile.calibration.policies import policy_of
from micromix_compile.calibration.sensitivity import CostProbe
from micromix_compile.calibration.token_layout import TokenLayout
from micromix_compile.changes.versions import Snapshot
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.lowering.torch_private import torch_compat
from micromix_compile.ops.pack import packed_weight, round_weights
from micromix_compile.passes import LinearPlan, PassContext
from micromix_compile.passes.pre_grad.find_linears import why_no_plain_weight
from micromix_compile.passes.pre_grad.open_attention import say_unopened
from micromix_compile.progress import track
from micromix_compile.recipe.fingerprint import Checksums, weight_sample
from micromix_compile.recipe.types import GroupRecipe, LinearRecipe, Recipe
from micromix_compile.session.candidates import how_to_leave_training, left_alone, say_left_out, why_never_linear
from micromix_compile.session.distributed import check_not_distributed, check_real
from micromix_compile.session.matching import all_parameter_names, find_linear, model_id, named_modules

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from torch import fx
    from torch._guards import CompileId

    from micromix_compile.numerics.layout import PackedWeight

logger = logging.getLogger("micromix_compile")
_numbers = itertools.count()

Key = tuple[object, ...]
PackedTensors = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
CALIBRATE: Key = ("calibrate",)
UNDECIDED = MicroMixConfig(policy="mxfp8", uniform_order="model")
"""The config of a recipe that is observed and not yet split: a policy that needs no statistics."""

UNQUANTIZED: Key = ("unquantized",)
COVERAGE_CALLS = frozenset({3, 10, 30, 100, 300, 1000})


@dataclass(slots=True)
class LinearState:
    """One weight: what it is called, who observes its input, what was decided, its packed form.

    key: phase, split and group; the graphs that use the weight are guarded by it. file: what the recipe was read from,
    if it was; they are guarded by its content, too. transposed: known from its first use. looks_linear: as long as no
    graph was seen; otherwise it counts as a linear only where one uses it so.
    """

    names: list[str]
    parameter: ref[nn.Parameter]
    key: Key = ()
    file: RecipeFile | None = None
    refusal: str | None = None
    looks_linear: bool = True
    transposed: bool | None = None
    observer: ChannelObserver | None = None
    probe: CostProbe | None = None
    linear: LinearRecipe | None = None
    packed: PackedTensors | None = None
    snapshot: Snapshot | None = None
    calls: int = 0

    def __reduce__(self) -> tuple[type, tuple[()]]:
        """A saved model does not take this with it, but something that `torch.load` may read with weights only."""
        return OrderedDict, ()

    @property
    def name(self) -> str:
        """The name it goes by; a tied weight is called after its last use, which is the linear."""
        return self.names[-1]

    @property
    def recipe_digest(self) -> str:
        """Of the recipe's file as it is now."""
        return "" if self.file is None else self.file.digest


@dataclass(slots=True, eq=False)
class RecipeFile:
    """A recipe given by its path, and known by its content: a file that is written anew is another recipe."""

    path: Path
    _stamp: tuple[int, ...] = ()
    _digest: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of the file as it is now; of a file that can't be read any more, as it was."""
        with contextlib.suppress(OSError):
            status = self.path.stat()
            stamp = (status.st_mtime_ns, status.st_size, status.st_ino)
            if stamp != self._stamp:
                self._digest = hashlib.sha256(self.path.read_bytes()).hexdigest()
                self._stamp = stamp
        return self._digest


class Session:
    """One model's state while it is calibrated and after. It is what the passes call their owner.

    source: what the recipe was made from: an object, kept alive so that its identity can name the session, or a file.
    also: further configs that recipes are to be made for from the same calibration.
    """

    def __init__(
        self,
        config: MicroMixConfig,
        recipe: Recipe | None = None,
        *,
        source: object = None,
        also: Sequence[MicroMixConfig] = (),
    ) -> None:
        number = next(_numbers)
        self.config = config
        self.configs = (config, *also)
        self.recipe = recipe
        self.model_id = "a function"
        self.lock = threading.RLock()  # of what is observed, and of the change from calibrating to quantized
        self.versions: set[CompileId] = set()
        """What Dynamo has compiled in the present phase."""
        self._pass = threading.local()
        self.state_attribute = f"_micromix_{number}"
        self._source = source
        self._layout = TokenLayout()
        self._model: ref[nn.Module] | None = None
        self._refusals: dict[str, str] = {}
        self.takes_statistics = True
        self.takes_costs = self.needs_costs
        self.takes_gradients = False
        self.is_packed = False  # the model holds packed linears already: nothing is to be calibrated
        self._states: list[LinearState] = []
        self._perms: dict[tuple[str, torch.device], Tensor] = {}
        self._coverage_checked: set[int] = set()
        self._enough_at: int | None = None
        finalize(self, _forget, self._states, self.state_attribute)

    @property
    def token_mask(self) -> Tensor | None:
        """(B, T): the attention mask of the forward pass that this thread observes."""
        return getattr(self._pass, "token_mask", None)

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self._pass.token_mask = mask

    # Names

    def prepare(self, model: nn.Module) -> None:
        """Name every 2-dimensional weight of `model` and put it into the present phase.

        Raises ValueError if nothing in `model` can be quantized, if the recipe is for another model, or if its weights
        are spread over processes.
        """
        self.model_id = model_id(model)
        self._model = ref(model)
        check_not_training(model)
        check_not_distributed(model)
        self._name_parameters(model)
        self.is_packed = any(isinstance(module, MicroMixLinear) for module in model.modules())
        if self.is_packed:
            return
        if not self.has_candidates:
            reasons = "; ".join(f"{state.name}: {state.refusal}" for state in self._states)
            raise ValueError(
                f"{self.model_id} has no linear layer to quantize ({reasons or 'no 2-dimensional weight'})"
            )
        if self.recipe is not None and not any(state.linear for state in self._states):
            raise ValueError(
                f"the recipe was made for {self.recipe.model_id}, and this model is {self.model_id}: "
                f"it has no {next(iter(self.recipe.linears), 'linear')}"
            )

    def _name_parameters(self, model: nn.Module) -> None:
        self._states[:] = [state for state in self._states if state.parameter() is not None]
        modules = named_modules(model)
        for parameter, names in all_parameter_names(model).items():
            if parameter.dim() >= 2 and not self.knows(parameter):
                self._add(parameter, names, modules)

    @property
    def model(self) -> nn.Module | None:
        """The model that was prepared, while it lives."""
        return None if self._model is None else self._model()

    def is_model(self, module: nn.Module) -> bool:
        """Whether `module` is the model that was prepared."""
        return self.model is module

    def adopt(self, parameter: nn.Parameter, name: str) -> None:
        """Take in a weight that is new: one that replaced another in the model, or one that belongs to no module.

        The latter gets the name by which its function reads it. Raises ValueError if the recipe is for other weights.
        """
        if self.model is not None:
            self._name_parameters(self.model)
        if self.knows(parameter):
            return
        taken = {name for state in self._states for name in state.names}
        unique = next(
            n for n in itertools.chain((name,), (f"{name}#{i}" for i in itertools.count(1))) if n not in taken
        )
        self._add(parameter, [unique], {})

    def _add(self, parameter: nn.Parameter, names: list[str], modules: Mapping[str, nn.Module]) -> None:
        reason, looks_linear = why_never_linear(parameter, names, modules)
        file = self._source if isinstance(self._source, RecipeFile) else None
        state = LinearState(names=names, parameter=ref(parameter), file=file, looks_linear=looks_linear)
        pattern = next((p for p in self.config.skip for name in names if fnmatch.fnmatch(name, p)), None)
        if pattern is not None:
            state.refusal = f"its name matches skip={pattern!r}"
        elif reason is not None:
            state.refusal = reason
        elif special := why_no_plain_weight(parameter):
            state.refusal = special
        elif self.recipe is not None:
            state.linear = find_linear(self.recipe, parameter, names, model_id=self.model_id)
        state.key = self._key_of(state)
        setattr(parameter, self.state_attribute, state)
        self._states.append(state)

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` has a state here."""
        state = getattr(parameter, self.state_attribute, None)
        return isinstance(state, LinearState) and state.parameter() is parameter

    def state(self, parameter: nn.Parameter) -> LinearState:
        """The state of a weight that was prepared or adopted."""
        state = getattr(parameter, self.state_attribute)
        assert isinstance(state, LinearState), "prepare() or adopt() gave every weight its state"
        return state

    def _key_of(self, state: LinearState) -> Key:
        if state.refusal is not None:
            return UNQUANTIZED
        if self.recipe is None:
            return CALIBRATE
        if state.linear is None:
            return UNQUANTIZED
        members = tuple(
            linear.fqn.rpartition(".")[2]
            for linear in self.recipe.linears.values()
            if linear.group is state.linear.group
        )
        return ("quantized", *state.linear.split, members)

    def note_refusals(self, refusals: Mapping[str, str]) -> None:
        """Remember why candidates in a graph were left alone."""
        self._refusals.update(refusals)
        if self.recipe is not None:
            say_left_out(refusals, self.recipe.linears, strict=self.config.strict)
        if self._model is None or self.is_packed or self.recipe is not None:
            return
        if refusals and all(s.refusal or s.name in self._refusals for s in self._states):
            reasons = "; ".join(f"{name}: {reason}" for name, reason in self._refusals.items())
            raise ValueError(f"{self.model_id} has no linear layer to quantize ({reasons})")

    def check_not_training(self) -> None:
        """Raise ValueError if the model has been put into training mode."""
        if self.model is not None:
            check_not_training(self.model)

    # What the passes ask (passes.pass_manager.Owner)

    def name_of(self, parameter: nn.Parameter) -> str:
        """Fully qualified name of the linear that owns `parameter`."""
        return self.state(parameter).name

    def refusal(self, parameter: nn.Parameter) -> str | None:
        """Why the linear must stay as it is, or None."""
        return self.state(parameter).refusal

    def is_used_otherwise(self, parameter: nn.Parameter, *, transposed: bool) -> bool:
        """Whether another graph uses the weight the other way round."""
        known = self.state(parameter).transposed
        return known is not None and known != transposed

    def plan(self, parameter: nn.Parameter, *, transposed: bool) -> LinearPlan | None:
        """How to rewrite the linear, or None while it has no recipe."""
        state = self.state(parameter)
        if state.linear is None:
            return None
        state.transposed = transposed
        return LinearPlan(
            group=id(state.linear.group),
            split=state.linear.split,
            fp6=self.config.fp6,
            scale_rounding=str(self.config.scale_rounding),
            tensors=self.packed(parameter),
        )

    def observe(
        self, x: Tensor, parameters: Sequence[nn.Parameter], transposed: Sequence[bool], source: Tensor | None = None
    ) -> None:
        """Take statistics of `x`, the common input of the linears with these weights, flattened from `source`."""
        with self.lock:
            self._observe(x, [self.state(parameter) for parameter in parameters], transposed, source)

    def _observe(
        self, x: Tensor, states: Sequence[LinearState], transposed: Sequence[bool], source: Tensor | None
    ) -> None:
        for state, flipped in zip(states, transposed, strict=True):
            state.transposed = flipped
        observer = next((state.observer for state in states if state.observer is not None), None)
        if observer is None:
            counted = tuple(dict.fromkeys(t for config in self.configs for t in policy_of(config).counted(config)))
            observer = ChannelObserver(
                states[0].name,
                x.shape[-1],
                counted,
                with_moment=self.rounds_weights,
                with_squares=self.needs_costs,
                layout=self._layout,
            )
        for state in states:
            state.observer = observer
        if self.takes_statistics:
            observer.update(x, self.token_mask, source)
        if self.takes_costs:
            self._probe(states, x).watch_input(x, observer.order(), observer.kept(x, self.token_mask, source))

    def observe_output(self, y: Tensor, parameter: nn.Parameter) -> None:
        """Take statistics of `y`, the output of the linear with this weight."""
        state = self.state(parameter)
        with self.lock:
            if self.takes_costs and state.probe is not None and state.observer is not None:
                state.probe.watch_output(state.name, y, state.observer.kept(y, self.token_mask))

    def _probe(self, states: Sequence[LinearState], x: Tensor) -> CostProbe:
        probe = next((state.probe for state in states if state.probe is not None), None)
        if probe is None:
            probe = CostProbe(x.shape[-1], self.config.scale_rounding, gradients=self.takes_gradients)
        for state in states:
            state.probe = probe
        return probe

    @property
    def rounds_weights(self) -> bool:
        """Whether a config has weights rounded while calibrating."""
        return any(config.rounds_weights for config in self.configs)

    @property
    def needs_costs(self) -> bool:
        """Whether a config spends a budget."""
        return any(policy_of(config).needs_costs for config in self.configs)

    def probes(self) -> list[CostProbe]:
        """The distinct probes made so far."""
        return list(dict.fromkeys(state.probe for state in self._states if state.probe is not None))

    def forget_costs(self) -> None:
        """Drop what was measured of costs."""
        for state in self._states:
            state.probe = None

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        """Append a graph input that is looked up anew for every call."""
        return torch_compat.add_static_input(graph, name, example)

    # Packed weights

    def packed(self, parameter: nn.Parameter) -> PackedTensors:
        """(channel_perm, w4, w6, w8, w_scale) of a weight; packed at first use, and again after the weight changed.

        What is seen as a change says `versions`.
        """
        state = self.state(parameter)
        if state.packed is None or state.snapshot is None or not state.snapshot.holds(parameter):
            snapshot = Snapshot(parameter)
            assert state.linear is not None, f"{state.name} has no recipe"
            assert self.recipe is not None, "a linear's recipe is a part of the whole"
            group = state.linear.group
            key = group.name, parameter.device
            if key not in self._perms:
                self._perms[key] = group.order_on(parameter.device)
            state.packed = (self._perms[key], *packed_weight(_oriented(parameter, state), state.linear, self.recipe))
            state.snapshot = snapshot
        return state.packed

    # From calibrating to quantized

    def observers(self) -> Iterator[ChannelObserver]:
        """The distinct observers made so far, in the model's order."""
        yield from dict.fromkeys(state.observer for state in self._states if state.observer is not None)

    @property
    def observed_batches(self) -> int:
        """Batches that the busiest linear has seen."""
        return max((observer.batches for observer in self.observers()), default=0)

    def has_seen_enough(self) -> bool:
        """Whether every linear saw the configured batches or tokens, or one saw a batch more than that."""
        config, observers = self.config, list(self.observers())
        enough = [
            observer
            for observer in observers
            if observer.batches >= config.calibration_batches or observer.tokens >= config.calibration_tokens
        ]
        if not enough:
            return False
        if self._enough_at is None:
            self._enough_at = self.observed_batches
        unseen = bool(self.unobserved())
        return (len(enough) == len(observers) and not unseen) or self.observed_batches > self._enough_at

    @property
    def takes_no_options(self) -> bool:
        """Whether it holds packed linears, and no recipe is for any of its other weights: nothing else will change."""
        return self.is_packed and not any(state.linear for state in self._states)

    @property
    def has_candidates(self) -> bool:
        """Whether there is a weight that might be quantized."""
        return not all(state.refusal for state in self._states)

    def unobserved(self) -> list[str]:
        """Linears that calibration has not reached."""
        return [
            state.name
            for state in self._states
            if state.refusal is None
            and state.looks_linear
            and state.name not in self._refusals
            and (state.observer is None or not state.observer.tokens)
        ]

    def convert(self) -> Recipe:
        """Decide orders and splits from what was observed; graphs compile anew, quantized, at their next call.

        Raises ValueError if no linear was reached.
        """
        self.recipe = next(self.recipes(progress=True))
        for state in self._states:
            state.linear = self.recipe.linears.get(state.name)
            state.key = self._key_of(state)
        self.versions.clear()
        return self.recipe

    def release(self) -> None:
        """Let go of all that was observed: second moments are K * K numbers a group."""
        for probe in self.probes():
            probe.release()
        for state in self._states:
            state.observer = state.probe = None

    def recipes(self, *, progress: bool) -> Iterator[Recipe]:
        """What was observed, decided for each of `configs` in turn. Raises ValueError if no linear was reached."""
        observed, members = self._observed()
        for left, config in zip(reversed(range(len(self.configs))), self.configs, strict=True):
            recipe = assign(observed, config)
            if config.rounds_weights:
                with naming_out_of_memory(*ROUNDING):
                    packed = self._round(recipe, members, keep_moments=left > 0, progress=progress)
                recipe = dataclasses.replace(recipe, packed=packed)
            yield recipe

    def _observed(self) -> tuple[Recipe, dict[str, list[LinearState]]]:
        """All that was observed as a recipe that decides nothing yet, and the members of its groups by name."""
        groups: dict[ChannelObserver, GroupRecipe] = {}
        members: dict[str, list[LinearState]] = {}
        linears: dict[str, LinearRecipe] = {}
        for state in self._states:
            parameter = state.parameter()
            if state.observer is None or not state.observer.tokens or parameter is None:
                continue
            if state.observer not in groups:
                groups[state.observer] = self._group_recipe(state.observer)
            group = groups[state.observer]
            members.setdefault(group.name, []).append(state)
            in_features = group.statistics.abs_mean.numel()
            linears[state.name] = LinearRecipe(
                fqn=state.name,
                in_features=in_features,
                out_features=parameter.numel() // in_features,
                group=group,
                weight_sample=weight_sample(parameter),
                weight_checksums=Checksums.of(_oriented(parameter, state)) if self.rounds_weights else None,
            )
        left = [state for state in self._states if state.name not in linears]
        own = {state.name: self._why_not(state) for state in left if state.looks_linear}
        refused = {**{name: reason for name, reason in self._refusals.items() if name not in linears}, **own}
        if not linears:
            reasons = "; ".join(f"{name}: {reason}" for name, reason in refused.items())
            raise ValueError(f"calibration of {self.model_id} reached no linear layer ({reasons or 'it has none'})")
        alone = self._left_alone(linears)
        return Recipe(
            config=UNDECIDED, model_id=self.model_id, linears=linears, refused=refused, left_alone=alone
        ), members

    def _left_alone(self, linears: Mapping[str, LinearRecipe]) -> tuple[int, int] | None:
        model = None if self._model is None else self._model()
        return None if model is None else left_alone(all_parameter_names(model), named_modules(model), linears)

    def _group_recipe(self, observer: ChannelObserver) -> GroupRecipe:
        """One group, its order and split still open."""
        members = [state for state in self._states if state.observer is observer]
        weights = {state.name: weight for state in members if (weight := _matrix(state)) is not None}
        probe = next((state.probe for state in members if state.probe is not None), None)
        costs = None if probe is None else probe.costs(weights, observer.order())
        statistics = observer.statistics(costs)
        perm = channel_order(statistics, UNDECIDED)
        return GroupRecipe(name=observer.name, channel_perm=perm, split=(0, 0, perm.numel()), statistics=statistics)

    def _round(
        self, recipe: Recipe, members: Mapping[str, list[LinearState]], *, keep_moments: bool, progress: bool
    ) -> dict[str, PackedWeight]:
        """Round all weights, group by group; frees the second moments on the way unless they are still needed."""
        packed: dict[str, PackedWeight] = {}
        for name, group in track(recipe.groups.items(), "rounding weights", show=progress):
            observer = members[name][0].observer
            assert observer is not None, "a group has an observer"
            assert observer.moment is not None, "moments are kept where weights are rounded"
            weights = {state.name: weight for state in members[name] if (weight := _matrix(state)) is not None}
            packed |= round_weights(weights, group, observer.moment, recipe.config)
            if not keep_moments:
                observer.moment = None
        return packed

    def _why_not(self, state: LinearState) -> str:
        if state.observer is not None and not state.observer.tokens:
            return "its input had no token that counts: all were masked, or there was none"
        return state.refusal or self._refusals.get(state.name) or "calibration did not reach it"

    # Coverage

    def count_call(self, states: Sequence[LinearState]) -> None:
        """Note that linears ran quantized; warn if others seldom or never do while these run again and again.

        torch.compile falls back to eager, unquantized code without an error at its recompile limit.
        """
        for state in states:
            state.calls += 1
            if state.calls in COVERAGE_CALLS and state.calls not in self._coverage_checked:
                self._check_coverage(state.calls)

    def _check_coverage(self, calls: int) -> None:
        self._coverage_checked.add(calls)
        idle = [state.name for state in self._states if state.linear is not None and 2 * state.calls < calls]
        if idle:
            logger.warning(
                "%d linears of %s have a recipe but ran quantized seldom or never (%s, ...): they aren't reached, or "
                "torch.compile gave up on their graph at torch._dynamo.config.recompile_limit=%d",
                len(idle),
                self.model_id,
                idle[0],
                torch._dynamo.config.recompile_limit,
            )


def _forget(states: Sequence[LinearState], attribute: str) -> None:
    """Take a session's state, packed weights included, off the Parameters that carry it."""
    for state in states:
        parameter = state.parameter()
        if parameter is not None:
            vars(parameter).pop(attribute, None)


def check_not_training(model: nn.Module) -> None:
    """Raise ValueError if `model`, as a whole, is in training mode."""
    if model.training:
        raise ValueError(
            f"{type(model).__name__} is in training mode, where dropout falsifies calibration and quantized linears "
            f"have no gradient: {how_to_leave_training(model)}"
        )


def _matrix(state: LinearState) -> Tensor | None:
    """(N, C): the weight as `x @ weight.T` uses it, if it is still alive."""
    parameter = state.parameter()
    return None if parameter is None else _oriented(parameter, state)


def _oriented(parameter: nn.Parameter, state: LinearState) -> Tensor:
    return parameter.detach().T if state.transposed else parameter.detach()


def open_graph(
    session: Session, gm: fx.GraphModule, example_inputs: Sequence[Any]
) -> tuple[fx.GraphModule, PassContext]:
    """A copy of a Dynamo graph that passes may change, and their context; every weight in it is known to `session`."""
    session.check_not_training()
    check_real(example_inputs)
    gm = torch_compat.copy_graph_module(gm)
    for node, value in zip(gm.graph.find_nodes(op="placeholder"), example_inputs, strict=True):
        if isinstance(value, nn.Parameter) and value.dim() >= 2 and not session.knows(value):
            session.adopt(value, torch_compat.parameter_name(node))
    config = session.config
    return gm, PassContext(owner=session, example_inputs=example_inputs, dump=config.dump, dump_dir=config.dump_dir)


def close_graph(session: Session, context: PassContext) -> None:
    """Guard what the graph was built on.

    Raises ValueError if it turns out that nothing can be quantized, or, if strict, if a fused operation hides linears.
    """
    say_unopened(context.unopened, strict=session.config.strict)
    session.note_refusals({**context.refusals, **context.unopened})
    for site in context.sites:
        torch_compat.guard_attribute(site.weight, session.state_attribute, "key")
    if context.sites and session.state(context.sites[0].parameter).file is not None:
        torch_compat.guard_attribute(context.sites[0].weight, session.state_attribute, "recipe_digest")

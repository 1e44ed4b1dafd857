"""All the backend knows of one model under one set of options: names, observers, the recipe, packed weights."""

from __future__ import annotations

from itertools import starmap
from typing import TYPE_CHECKING

from micromix_compile.calibration.sharding import check_model
from micromix_compile.linear.experts import runs_in_a_loop
from micromix_compile.lowering.torch_private.dynamo import add_static_input
from micromix_compile.passes import LinearPlan
from micromix_compile.passes.pre_grad.find_linears import BOTH_WAYS, TAKEN_OUT, why_no_plain_weight
from micromix_compile.recipe.parts import split_name
from micromix_compile.recipe.watched import RecipeFile
from micromix_compile.session import deciding
from micromix_compile.session.candidates import ON_REQUEST, how_to_leave_training, say_left_out, say_unknown
from micromix_compile.session.coverage import Coverage
from micromix_compile.session.distributed import check_not_distributed, is_packed
from micromix_compile.session.matching import find_linear, fits, match_parts, named_modules, without_unwanted
from micromix_compile.session.names import Names
from micromix_compile.session.observing import Observation
from micromix_compile.session.state import members_of
from micromix_compile.session.weights import PackedWeights

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor, fx, nn

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.lowering.torch_private.recompile_limit import CompileId
    from micromix_compile.recipe.parts import Part
    from micromix_compile.recipe.types import LinearRecipe, Recipe
    from micromix_compile.session.state import LinearState, PackedTensors
    from micromix_compile.session.watched import Watched

    Weight = tuple[nn.Parameter, Part | None]


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
        self.config = config
        self.recipe = recipe
        self.names = Names(convolutions=config.convolutions)
        self.observation = Observation(self.names, (config, *also))
        self.coverage = Coverage(self.names)
        self.versions: set[CompileId] = set()
        """What Dynamo has compiled in the present phase."""
        self._members = None if recipe is None else members_of(recipe)
        self._weights = PackedWeights()
        self._matched: dict[str, LinearRecipe] = {}
        """By the model's names: what the recipe has of weights that are the model's, or were before they changed."""
        self._source = source

    # The model and its weights

    def prepare(self, model: nn.Module) -> None:
        """Name every 2-dimensional weight of `model` and put it into the present phase.

        Raises ValueError if nothing in `model` can be quantized, if the recipe is for another model, if nothing is left
        of it, if weights are spread over processes, or if it is to be calibrated for shards that don't fit.
        """
        check_not_distributed(model)
        self.names.belong_to(model)
        if self.recipe is not None:
            self.recipe = without_unwanted(self.recipe, model)
            self._members = members_of(self.recipe)
        self.names.take_in(model, self._decide)
        self._take_in_parts()
        self.check_not_training()
        if self.is_packed:
            return
        if not self.has_candidates:
            reasons = "; ".join(f"{state.name}: {state.refusal}" for state in self.names)
            self._refuse_model(reasons or "no 2-dimensional weight")
        if self.recipe is None:
            for config in self.observation.configs:
                check_model(named_modules(model), config)
        elif not any(state.linear for state in self.names):
            raise ValueError(
                f"the recipe was made for {self.recipe.model_id}, and this model is {self.model_id}: "
                f"it has no {next(iter(self.recipe.linears), 'linear')}"
            )

    def adopt(self, parameter: nn.Parameter, name: str) -> None:
        """Take in a weight that is new, see `Names.adopt`. Raises ValueError if the recipe is for other weights."""
        self.names.adopt(parameter, name, self._decide)

    def _decide(self, state: LinearState, parameter: nn.Parameter) -> None:
        """Complete the state of a weight that is new."""
        state.file = self._source if isinstance(self._source, RecipeFile) else None
        skips = [config.why_skipped(state.names) for config in self.observation.configs]
        state.refusal = (skips[0] if all(skips) else state.refusal) or why_no_plain_weight(parameter)
        linear = None
        if self.recipe is not None and state.refusal is None:
            linear, weight = self._matched.get(state.name), state.weight()
            assert weight is not None, "it is alive"
            if linear is None or not fits(linear, weight):
                linear = find_linear(self.recipe, weight, state.names, model_id=self.model_id)
            if linear is None and state.part is not None:
                state.refusal = "calibration did not reach this part of the weight"
        if linear is not None and self.names.has_model:
            self._matched[state.name] = linear
        state.decide(linear, self._members)

    def _take_in_parts(self) -> None:
        """Name the parts of weights that the recipe has. Raises ValueError if one is another model's."""
        if self.recipe is None:
            return
        wholes = {parameter: s.names for s in self.names if (parameter := s.parameter()) is not None and not s.refusal}
        for parameter, part, _ in match_parts(self.recipe, wholes, model_id=self.model_id):
            self.names.cut(parameter, part, self._decide)

    @property
    def model(self) -> nn.Module | None:
        """The model that was prepared, while it lives."""
        return self.names.model

    @property
    def model_id(self) -> str:
        """What a recipe calls the model."""
        return self.names.model_id

    def is_model(self, module: nn.Module) -> bool:
        """Whether `module` is the model that was prepared."""
        return self.model is module

    def holds(self, module: nn.Module) -> bool:
        """Whether `module` is a part of the model that was prepared, or that model."""
        return self.model is not None and any(module is part for part in self.model.modules())

    def check_not_training(self) -> None:
        """Raise ValueError if the model is, as a whole, in training mode; one whose linears are packed may be."""
        model = self.model
        if model is not None and model.training and not self.takes_no_options:
            raise ValueError(
                f"{type(model).__name__} is in training mode, where dropout falsifies calibration and quantized "
                f"linears have no gradient: {how_to_leave_training(model)}"
            )

    @property
    def has_candidates(self) -> bool:
        """Whether there is a weight that might be quantized."""
        return self.names.has_candidates

    @property
    def is_packed(self) -> bool:
        """Whether the model holds packed linears, perhaps by now: what is left of it is not to be calibrated."""
        return self.model is not None and is_packed(self.model)

    @property
    def takes_no_options(self) -> bool:
        """Whether it holds packed linears, and no recipe is for any of its other weights: nothing else will change."""
        return self.is_packed and not any(state.linear and state.parameter() is not None for state in self.names)

    def note_refusals(self, refusals: Mapping[str, str], sites: Iterable[Weight] = ()) -> None:
        """Remember why candidates in a graph were left alone, and say what runs unquantized though nobody asked for it.

        sites: the weights of the others. Raises ValueError if no other is left; RuntimeError if strict, instead of
        saying something.
        """
        known = self.names.refusals
        known.update(refusals)
        self._say_left(refusals, sites)
        if not self.names.has_model or self.is_packed or self.recipe is not None:
            return
        if refusals and all(state.refusal or state.name in known for state in self.names):
            self._refuse_model("; ".join(f"{name}: {reason}" for name, reason in known.items()))

    def check_experts(self) -> None:
        """Say which experts with a recipe transformers runs in a loop, which no graph shows. RuntimeError if strict."""
        model = self.model
        held = {s.name: s.linear.fqn for s in self.names if s.linear is not None and s.linear.experts is not None}
        modules = named_modules(model) if model is not None and held else {}
        looped = {fqn: TAKEN_OUT for name, fqn in held.items() if runs_in_a_loop(modules.get(name.rpartition(".")[0]))}
        if self.config.strict or looped.items() - self.names.refusals.items():
            self.note_refusals(looped)

    def _say_left(self, refusals: Mapping[str, str], sites: Iterable[Weight]) -> None:
        """A recipe has what its model refused, so that only a function's refusals are news, or a linear without one."""
        recipe, strict = self.recipe, self.config.strict
        states = self.names if refusals else ()
        skipped = {state.name for state in states if self.config.why_skipped(state.names)}
        unasked = {name: reason for name, reason in refusals.items() if name.partition(" (")[0] not in skipped}
        unknown = {} if self.names.has_model else {name: r for name, r in unasked.items() if r != ON_REQUEST}
        if recipe is not None:
            say_left_out(unasked, recipe.linears, strict=strict)
            reason = f"the recipe of {recipe.model_id} has no such linear"
            unknown |= {state.name: reason for state in starmap(self.state, sites) if state.linear is None}
            held = {split_name(name)[0] for name in (*recipe.linears, *recipe.refused)}
            parts = {name: split_name(name.partition(" (")[0]) for name in unasked}
            unknown |= {name: reason for name, (whole, part) in parts.items() if part and whole not in held}
            unknown = {name: why for name, why in unknown.items() if name not in recipe.linears}
        say_unknown(unknown, () if recipe is None else recipe.refused, model_id=self.model_id, strict=strict)

    def _refuse_model(self, reasons: str) -> None:
        raise ValueError(f"{self.model_id} has no linear layer to quantize ({reasons})")

    @property
    def state_attribute(self) -> str:
        """The attribute of Parameters that holds their states."""
        return self.names.attribute

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` has a state here."""
        return self.names.knows(parameter)

    def state(self, parameter: nn.Parameter, part: Part | None = None) -> LinearState:
        """The state of a weight that was prepared or adopted, or of a part of it, which is taken in if it is new."""
        return self.names.state(parameter) if part is None else self.names.cut(parameter, part, self._decide)

    # What the passes ask (passes.context.Owner)

    def name_of(self, parameter: nn.Parameter, part: Part | None = None) -> str:
        """Fully qualified name of the linear that owns `parameter`, or of the one that is a part of it."""
        return self.state(parameter, part).name

    def refusal(self, parameter: nn.Parameter, part: Part | None = None) -> str | None:
        """Why the linear must stay as it is, or None."""
        return self.state(parameter, part).refusal

    def is_used_otherwise(self, parameter: nn.Parameter, *, transposed: bool, part: Part | None = None) -> bool:
        """Whether another graph uses the weight the other way round."""
        known = self.state(parameter, part).transposed
        return known is not None and known != transposed

    def plan(self, parameter: nn.Parameter, *, transposed: bool, part: Part | None = None) -> LinearPlan | None:
        """How to rewrite the linear, or None while it has no recipe."""
        state = self.state(parameter, part)
        if state.linear is None:
            return None
        assert self.recipe is not None, "a linear's recipe is a part of the whole"
        return LinearPlan(
            group=id(state.linear.group),
            layout=self.recipe.config.row_layout(state.linear.split, state.linear.group.rotated),
            tensors=self.packed(parameter, part, transposed=transposed),
        )

    def observe(
        self, x: Tensor, parameters: Sequence[nn.Parameter], transposed: Sequence[bool], source: Tensor | None = None,
        routings: Sequence[Sequence[Tensor | None] | None] | None = None, parts: Sequence[Part | None] | None = None,
    ) -> Watched:  # fmt: skip
        """Take statistics of `x`, the common input of the linears with these weights, flattened from `source`."""
        states = [self.state(*weight) for weight in zip(parameters, parts or [None] * len(parameters), strict=True)]
        return self.observation.input(x, states, transposed, source, routings or [None] * len(states))

    def observe_output(self, y: Tensor, parameter: nn.Parameter, watched: Watched, part: Part | None = None) -> None:
        """Take statistics of `y`, the output of the linear with this weight. watched: what `observe` returned."""
        self.observation.output(y, self.state(parameter, part), watched)

    def add_input(self, graph: fx.Graph, name: str, example: Tensor) -> fx.Node:
        """Append a graph input that is looked up anew for every call."""
        return add_static_input(graph, name, example)

    # Packed weights, recipes

    def packed(self, parameter: nn.Parameter, part: Part | None = None, *, transposed: bool) -> PackedTensors:
        """(channel_perm, w4, w6, w8, w_scale) of a weight; packed at first use, and again after the weight changed.

        Raises RuntimeError if a graph that was compiled for another layer uses it the other way round than one before.
        """
        assert self.recipe is not None, "a linear's recipe is a part of the whole"
        state = self.state(parameter, part)
        if state.transposed not in (None, transposed):
            raise RuntimeError(f"{state.name}: {BOTH_WAYS}; skip={state.name!r} leaves it alone")
        state.transposed = transposed
        return self._weights.of(parameter, state, self.recipe)

    def recipes(self, *, progress: bool) -> Iterator[Recipe]:
        """What was observed, decided for each config in turn. Raises ValueError if no linear was reached."""
        return deciding.recipes(self.names, self.observation, progress=progress)

    def convert(self) -> Recipe:
        """Decide orders and splits from what was observed; graphs compile anew, quantized, at their next call.

        Raises ValueError if no linear was reached.
        """
        self.recipe = next(self.recipes(progress=True))
        self._members = members_of(self.recipe)
        for state in self.names:
            linear = self.recipe.linears.get(state.name)
            if linear is not None and self.names.has_model:
                self._matched[state.name] = linear
            state.decide(linear, self._members)
        self.versions.clear()
        return self.recipe

"""The weights of one model: what they are called, and the state that each of them carries."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING
from weakref import finalize, ref

from micromix_compile.passes.pre_grad.find_linears import BOTH_WAYS, OF_EXPERTS
from micromix_compile.recipe.parts import as_matrix
from micromix_compile.session.candidates import why_never_linear
from micromix_compile.session.matching import all_parameter_names, model_id, named_modules
from micromix_compile.session.state import LinearState

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import nn

    from micromix_compile.recipe.parts import Part

    Decide = Callable[[LinearState, nn.Parameter], None]

_numbers = itertools.count()


class Names:
    """The states of a model's weights, in the model's order.

    Where a weight is taken in, `decide` completes its state before the weight gets it; what it raises leaves the weight
    unknown. convolutions: whether those of kernel size 1 count as linears. attribute: the Parameters' attribute that
    holds their states. refusals: name -> why a linear was left alone, as graphs told.
    """

    def __init__(self, *, convolutions: bool = False) -> None:
        self.convolutions = convolutions
        self.attribute = f"_micromix_{next(_numbers)}"
        self.model_id = "a function"
        self.refusals: dict[str, str] = {}
        self._model: ref[nn.Module] | None = None
        self._states: list[LinearState] = []
        finalize(self, _forget, self._states, self.attribute)

    def __iter__(self) -> Iterator[LinearState]:
        """Each whole weight, and behind it its parts."""
        for state in list(self._states):
            yield state
            yield from [state.parts[part] for part in sorted(state.parts)]

    @property
    def model(self) -> nn.Module | None:
        """The model whose weights these are, while it lives; None for a function."""
        return None if self._model is None else self._model()

    @property
    def has_model(self) -> bool:
        """Whether they are the weights of a model, be it alive or not."""
        return self._model is not None

    def belong_to(self, model: nn.Module) -> None:
        """The weights are those of `model`."""
        self.model_id = model_id(model)
        self._model = ref(model)

    def take_in(self, model: nn.Module, decide: Decide) -> None:
        """Name every weight of `model` that is new; of one dimension are no weights, but biases and norms."""
        self._states[:] = [state for state in self._states if state.parameter() is not None]
        modules = named_modules(model)
        for parameter, names in all_parameter_names(model).items():
            if parameter.dim() >= 2 and not self.knows(parameter):
                self._add(parameter, names, modules, decide)

    def adopt(self, parameter: nn.Parameter, name: str, decide: Decide) -> None:
        """Take in a weight that is new: one that replaced another in the model, or one that belongs to no module.

        The latter gets the name by which its function reads it.
        """
        if self.model is not None:
            self.take_in(self.model, decide)
        if self.knows(parameter):
            return
        taken = {name for state in self._states for name in state.names}
        candidates = itertools.chain((name,), (f"{name}#{i}" for i in itertools.count(1)))
        self._add(parameter, [next(one for one in candidates if one not in taken)], {}, decide)

    def cut(self, parameter: nn.Parameter, part: Part, decide: Decide) -> LinearState:
        """The state of a part of a weight that was taken in, which is a linear of its own.

        All parts of a weight are rows, or all are columns, as its first one is; others stay as they are.
        """
        whole = self.state(parameter)
        if part not in whole.parts:
            names = [f"{name}{part}" for name in whole.names]
            crosses = any(other.dim != part.dim for other in whole.parts)
            refusal = whole.refusal or (BOTH_WAYS if crosses else None)
            state = LinearState(names=names, parameter=whole.parameter, refusal=refusal, part=part)
            decide(state, parameter)
            whole.parts[part] = state
        return whole.parts[part]

    def _add(
        self, parameter: nn.Parameter, names: Sequence[str], modules: Mapping[str, nn.Module], decide: Decide
    ) -> None:
        reason, looks_linear = why_never_linear(parameter, names, modules, convolutions=self.convolutions)
        state = LinearState(names=list(names), parameter=ref(parameter), refusal=reason, looks_linear=looks_linear)
        decide(state, parameter)
        setattr(parameter, self.attribute, state)
        self._states.append(state)

    def knows(self, parameter: nn.Parameter) -> bool:
        """Whether `parameter` has a state here."""
        state = getattr(parameter, self.attribute, None)
        return isinstance(state, LinearState) and state.parameter() is parameter

    def state(self, parameter: nn.Parameter) -> LinearState:
        """The state of a weight that was taken in."""
        state = getattr(parameter, self.attribute)
        assert isinstance(state, LinearState), "take_in() or adopt() gave every weight its state"
        return state

    @property
    def has_candidates(self) -> bool:
        """Whether there is a weight that might be quantized."""
        return not all(state.refusal for state in self)

    def why_not(self, state: LinearState) -> str:
        """Why a weight that looks like a linear's has no recipe after calibration."""
        if state.observer is not None and not state.observer.tokens:
            return "its input had no token that counts: all were masked, or there was none"
        parameter = state.parameter()
        otherwise = "calibration did not reach it"
        if state.may_be_experts:
            otherwise = "its weight has 3 dimensions, not 2"
        elif parameter is not None and as_matrix(parameter.detach()).dim() == 3:
            otherwise = f"{otherwise}: {OF_EXPERTS}"
        return state.refusal or self.refusals.get(state.name) or otherwise


def _forget(states: Sequence[LinearState], attribute: str) -> None:
    """Take a session's state, packed weights included, off the Parameters that carry it."""
    for state in states:
        parameter = state.parameter()
        if parameter is not None:
            vars(parameter).pop(attribute, None)

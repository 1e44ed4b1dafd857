"""Which modules a packed linear may stand in for, and what it takes over from them: nothing of a module is dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

LINEARS: Final = (
    "torch.nn.modules.linear.Linear",
    "transformers.pytorch_utils.Conv1D",  # of GPT-2; its weight is (C, N)
    "transformers.models.falcon.modeling_falcon.FalconLinear",
)
"""The classes whose forward is x W^T + b; a user's class of such a name may do anything."""

READ_DIRECTLY: Final = {"transformers.models.mamba.modeling_mamba.MambaMixer": ("dt_proj",)}
"""By class, the linears of whose weights it makes products of its own. Jamba's does not in a model that is marked as
quantized."""

_CALL_HOOKS: Final = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_backward_pre_hooks",
    "_backward_hooks",
    "_is_full_backward_hook",
)
_STATE_HOOKS: Final = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


class OnlySpeaks:
    """A hook on a state dict that does no more than say something: what takes the module's place does without it."""


def is_linear_module(module: nn.Module) -> bool:
    """nn.Linear itself, or one of the others of `LINEARS`."""
    return _class_of(module) in LINEARS


def _class_of(module: nn.Module | None) -> str:
    return f"{type(module).__module__}.{type(module).__qualname__}"


def why_not_replaced(
    name: str, modules: Mapping[str, nn.Module], takes: Callable[[nn.Module], bool] = is_linear_module
) -> str | None:
    """Why what `name` names can't become a packed linear, or None if it can.

    name: of a linear module, or of a Parameter that belongs to none. modules: all of the model by their names. takes:
    which modules are those of linears.
    """
    module, parent = modules.get(name), modules.get(name.rpartition(".")[0])
    if name.rpartition(".")[2] in READ_DIRECTLY.get(_class_of(parent), ()):
        return f"{type(parent).__name__} reads its weight directly, not through a linear's forward"
    if module is None and name == "weight" and parent is not None and takes(parent):
        return "the linear is the model itself, which nothing can stand in for: put it into a module"
    if module is None:
        return f"it is a Parameter that {type(parent).__name__} reads directly, not the weight of a linear"
    if parametrize.is_parametrized(module):
        return "it is parametrized (torch.nn.utils.parametrize)"
    if not takes(module):
        return f"it is a {_class_of(module)}, not an nn.Linear"
    if special := why_special(module):
        return special
    others = [*module._parameters, *module._buffers, *module._modules]
    own = [name for name in others if name not in ("weight", "bias")]
    if own:
        return f"it holds more than a weight and a bias: {own[0]}"
    return None


def why_special(module: nn.Module) -> str | None:
    """What an instance of a class has that a packed one would lose."""
    if "forward" in vars(module):
        return "its forward is overridden on the instance"
    if vars(module).get("_compiled_call_impl") is not None:
        return "it is compiled by itself"
    hooks = [hook for name in _STATE_HOOKS for hook in vars(module).get(name, {}).values()]
    if not all(isinstance(hook, OnlySpeaks) for hook in hooks):
        return "it has hooks on its state dict, which expect a plain weight"
    return None


def take_over(packed: nn.Module, original: nn.Module) -> None:
    """Let `packed` have the hooks of `original`, in their order and with their handles, its mode and its attributes."""
    take_over_hooks(packed, original)
    for name, value in vars(original).items():
        vars(packed).setdefault(name, value)


def take_over_hooks(module: nn.Module, other: nn.Module) -> None:
    """Let `module` have the hooks of `other`, in their order and with their handles, and its mode."""
    for name in _CALL_HOOKS:
        vars(module)[name] = vars(other)[name]  # the very dictionary: a handle removes its hook from that
    module.training = other.training


def replace(modules: Mapping[str, nn.Module], replacements: Mapping[str, nn.Module]) -> None:
    """Put each module in its place, or none if that fails."""
    done: list[str] = []
    try:
        for name, module in replacements.items():
            _put(modules, name, module)
            done.append(name)
    except BaseException:
        for name in done:
            _put(modules, name, modules[name])
        raise


def _put(modules: Mapping[str, nn.Module], name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(modules[parent], child, module)


def leave_fast_paths(model: nn.Module, packed: type[nn.Module]) -> None:
    """Have encoders of nn.Transformer call their packed linears, where they would hand weights to a fused kernel.

    Both attributes are what torch.nn looks at to decide that; nothing else depends on them.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer) and _holds(module, packed):
            module.activation_relu_or_gelu = 0
        if isinstance(module, nn.TransformerEncoder) and _holds(module, packed):
            module.use_nested_tensor = False


def _holds(module: nn.Module, kind: type[nn.Module]) -> bool:
    return any(isinstance(child, kind) for child in module.modules())

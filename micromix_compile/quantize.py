"""Packed linear layers: what `quantize_` puts in a model instead of its linears."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor, nn

from micromix_compile import gpu_rounding, ops, packing, reference, rounding
from micromix_compile.assignment import padded_channels
from micromix_compile.candidates import how_to_leave_training
from micromix_compile.checkpoint import QUANT_METHOD, SCHEMA_VERSION
from micromix_compile.dequantized import DequantizedWeight
from micromix_compile.distributed import check_not_distributed
from micromix_compile.formats import BLOCK_SIZE
from micromix_compile.gradient import packed_product
from micromix_compile.matching import match_linears, model_id, named_modules, parameter_names
from micromix_compile.recipe import PackedWeight, Recipe, Split, weight_split
from micromix_compile.replacing import leave_fast_paths, replace, take_over, why_not_replaced
from micromix_compile.target import triton_family

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from micromix_compile.config import MicroMixConfig
    from micromix_compile.recipe import GroupRecipe, LinearRecipe

logger = logging.getLogger("micromix_compile")


def pack_weight(weight: Tensor, group: GroupRecipe, config: MicroMixConfig) -> PackedWeight:
    """Reorder, quantize and pack one weight.

    weight: (N, C) float32, bfloat16 or float16. Raises ValueError if the group is for another C.
    """
    if padded_channels(weight.shape[1]) != group.channel_perm.numel():
        raise ValueError(
            f"group {group.name} orders {group.channel_perm.numel()} channels, but the weight has {weight.shape[1]}"
        )
    split = weight_split(group.split, config.weights)
    return _pack(weight.detach(), group.channel_perm.to(weight.device), split, config)


def round_weights(
    weights: Mapping[str, Tensor], group: GroupRecipe, moment: Tensor, config: MicroMixConfig
) -> dict[str, PackedWeight]:
    """Round and pack the weights of one group together, as `config` asks (see `rounding`).

    weights: (N, C) by name. moment: (C, C) float32, the sum of x x^T over the calibrated inputs. A weight with a NaN
    or an infinity is rounded to nearest, which poisons its blocks only.
    """
    finite = {name: weight for name, weight in weights.items() if bool(weight.isfinite().all())}
    packed = {name: pack_weight(weight, group, config) for name, weight in weights.items() if name not in finite}
    if not finite:
        return packed
    device = moment.device
    perm = group.channel_perm.to(device)
    stacked = torch.cat([reference.reorder(w.to(device, torch.float32), perm) for w in finite.values()])
    split = weight_split(group.split, config.weights)
    formats = [
        name for name, k in zip(("e2m1", config.fp6, "e4m3"), split, strict=True) for _ in range(k // BLOCK_SIZE)
    ]
    rounded = rounding.round_weight(
        stacked,
        formats,
        reference.reorder(reference.reorder(moment, perm).T, perm),
        scale_rounding=config.scale_rounding,
        search=config.scale_search,
        compensate=config.weight_rounding == "gptq",
        steps=gpu_rounding.STEPS if triton_family(stacked) is not None else None,
    )
    for (name, weight), part in zip(finite.items(), rounded.split([len(w) for w in finite.values()]), strict=True):
        packed[name] = _pack(part.to(weight.device), torch.arange(perm.numel(), device=weight.device), split, config)
    return packed


def _pack(weight: Tensor, channel_perm: Tensor, split: Split, config: MicroMixConfig) -> PackedWeight:
    q4, q6, q8, scale = ops.reorder_quantize(weight, channel_perm, *split, config.fp6, str(config.scale_rounding))
    parts = (q4, packing.pack_fp6(q6, config.fp6), q8, scale)
    return PackedWeight(*packing.in_one_storage(parts, weight.device))


def packed_weight(weight: Tensor, linear: LinearRecipe, recipe: Recipe) -> PackedWeight:
    """The packed form of one weight (N, C): the recipe's own if calibration rounded it, else rounded to nearest.

    So is a weight that has changed since it was calibrated, which the log says. Raises ValueError if the recipe's
    config wants weights rounded while calibrating, and this one was not.
    """
    ready = recipe.packed.get(linear.fqn)
    checksums = linear.weight_checksums
    if ready is not None and checksums is not None and checksums.fit(weight):
        is_there = all(part.device == weight.device for part in ready)
        return ready if is_there else PackedWeight(*packing.in_one_storage(ready, weight.device))
    if ready is not None:
        logger.warning("%s has changed since it was calibrated: it is rounded to nearest", linear.fqn)
    elif recipe.config.rounds_weights:
        raise ValueError(
            f"the recipe has no rounded weight for {linear.fqn}: weight_rounding={recipe.config.weight_rounding!r} and "
            f"scale_search={recipe.config.scale_search} take effect while calibrating, so calibrate with them"
        )
    return pack_weight(weight, linear.group, recipe.config)


class ChannelOrder(nn.Module):
    """The order of one activation's channels: channel_perm (K,) int32.

    A module and not a buffer of each linear, because a move to another device keeps shared modules shared.
    """

    channel_perm: Tensor

    def __init__(self, channel_perm: Tensor) -> None:
        super().__init__()
        self.register_buffer("channel_perm", channel_perm)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but a copy for each linear that shares it: checkpoint formats refuse tensors that share memory."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}channel_perm"] = destination[f"{prefix}channel_perm"].clone()


class _WeightReader:
    """`module.weight` of a packed linear. What stands in its place while a checkpoint is loaded goes first.

    No property, which nothing in the module's own namespace could stand in for.
    """

    def __get__(self, module: MicroMixLinear | None, owner: type | None = None) -> Any:
        if module is None:
            return self
        loading = module._buffers.get("weight")
        return module.dequantized() if loading is None else loading


class MicroMixLinear(nn.Linear):
    """A linear layer that holds packed weights only.

    order: one module shared by all linears of a group. Buffers: weight_q4, weight_q6, weight_q8 and weight_scale as in
    `PackedWeight`. bias: (N,) or None. weight: (N, C), made from these whenever it is read, and read-only; weight_dtype
    is its dtype, that of the weight which was packed, and follows conversions of the module.

    forward: (..., C) float -> (..., N) of the same dtype. The gradient with respect to the input and the bias is that
    of the dequantized weight; packed weights have none, so that adapters around them can be trained, not they.
    """

    weight_q4: Tensor
    weight_q6: Tensor
    weight_q8: Tensor
    weight_scale: Tensor

    def __init__(
        self,
        *,
        in_features: int,
        out_features: int,
        split: Split,
        config: MicroMixConfig,
        bias: nn.Parameter | None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a weight
        self.in_features = in_features
        self.out_features = out_features
        self.split = split
        self.fp6 = config.fp6
        self.scale_rounding = str(config.scale_rounding)
        self.weight_dtype = dtype or torch.get_default_dtype()
        k4, k6, k8 = weight_split(split, config.weights)
        n, channels = out_features, sum(split)
        self.order = ChannelOrder(torch.empty(channels, dtype=torch.int32, device=device))
        for name, shape in (
            ("q4", (n, k4 // 2)),
            ("q6", (3, n, k6 // 4)),
            ("q8", (n, k8)),
            ("scale", (n, channels // 32)),
        ):
            self.register_buffer(f"weight_{name}", torch.empty(shape, dtype=torch.uint8, device=device))
        self.register_parameter("bias", bias)

    if not TYPE_CHECKING:
        weight = _WeightReader()

    def dequantized(self) -> Tensor:
        """The weight (N, C) in the model's order of channels, as `weight_dtype`; its values are made when read."""
        shape = (self.out_features, self.in_features)
        if torch.compiler.is_compiling():
            return self._dequantize()  # an operation of the graph, which goes away where only the dtype is read
        return DequantizedWeight(self._dequantize, shape, self.weight_dtype, self.weight_scale.device)

    def _dequantize(self) -> Tensor:
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale, self.order.channel_perm)
        out: Tensor = torch.ops.micromix.dequantize_weight(*weight, self.in_features, self.fp6, self.weight_dtype)
        return out

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for `weight`, unless a buffer is called so: forward would not use it."""
        if name == "weight" and name not in self._buffers:
            raise AttributeError("the weight of a packed linear can't be set: put an nn.Linear in its place")
        super().__setattr__(name, value)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """As usual. A buffer called `weight` hides the packed one as long as it is there."""
        if name == "weight":
            self._buffers.setdefault(name, None)
        super().register_buffer(name, tensor, persistent)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        converted = fn(torch.empty(0, dtype=self.weight_dtype, device=self.weight_scale.device))
        self.weight_dtype = converted.dtype
        return self

    def load_packed(self, packed: PackedWeight, channel_perm: Tensor) -> None:
        """Take over packed tensors without a copy."""
        self.order.channel_perm = channel_perm
        self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale = packed

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As usual, but the scales are called `weight`, and tensors that share an allocation get storages of their own.

        Whoever loads these tensors as a plain linear is stopped by the shape of `weight`. Formats that refuse tensors
        that share memory would refuse all of one allocation. With keep_vars the buffers themselves are asked for.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if keep_vars or "weight" in vars(self):  # the latter while transformers sets one tensor after the other
            return
        destination[f"{prefix}weight"] = destination.pop(f"{prefix}weight_scale")
        for name in ("weight_q4", "weight_q6", "weight_q8", "weight"):
            destination[f"{prefix}{name}"] = packing.with_own_storage(destination[f"{prefix}{name}"])

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """As usual; the scales are `weight`, or `weight_scale` as older versions wrote them."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}weight_scale"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *args)

    def compact(self) -> None:
        """Move the packed tensors into one allocation, see `packing.in_one_storage`."""
        parts = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        self.load_packed(PackedWeight(*packing.in_one_storage(parts, parts[0].device)), self.order.channel_perm)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., N), under autocast in its dtype. Raises ValueError for another C."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"x must have {self.in_features} channels, got shape {tuple(x.shape)}")
        if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        weight = (self.weight_q4, self.weight_q6, self.weight_q8, self.weight_scale)
        layout = (self.split, self.fp6, self.scale_rounding)
        out = packed_product(x.reshape(-1, self.in_features), self.bias, self.order.channel_perm, weight, *layout)
        return out.reshape(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        k4, k6, k8 = self.split
        return f"{self.in_features}, {self.out_features}, mxfp4={k4}, mxfp6={k6} ({self.fp6}), mxfp8={k8}"


def quantize_(model: nn.Module, recipe: Recipe) -> nn.Module:
    """Replace the recipe's linears by `MicroMixLinear` in place; the original weights are freed. Returns `model`.

    Weights that something else still uses (tied embeddings) stay alive through that user. Hooks of a replaced linear
    move to the packed one. A linear that would lose something stays as it is: one with an overridden forward, a
    parametrization, a class of its own or more than a weight and a bias, and what nn.MultiheadAttention reads past its
    linears. The log says so, and `model.micromix_refused`, a dict of names and reasons, lists them. A Hugging Face
    model can be saved with save_pretrained afterwards.

    Raises ValueError if the recipe was made for another model, naming both, if one of its linears is packed already,
    or if one has to stay and the recipe's config is strict. The model is as it was then: nothing is replaced before
    everything is packed, for which there must be memory.
    """
    wrapped = model
    model = getattr(wrapped, "_orig_mod", wrapped)  # torch.compile's
    if model.training:
        raise ValueError(f"{type(model).__name__} is in training mode: {how_to_leave_training(model)}")
    check_not_distributed(model)
    names = parameter_names(model)
    modules = named_modules(model)
    if already := [fqn for fqn in recipe.linears if isinstance(modules.get(fqn), MicroMixLinear)]:
        raise ValueError(f"{model_id(model)} is packed already: {already[0]} is a MicroMixLinear")
    matched = match_linears(recipe, names, model_id=model_id(model))
    places, refused = _places([(names[parameter], linear) for parameter, linear in matched], modules)
    _say_refused(refused, strict=recipe.config.strict)
    replacements = _packed_modules(places, modules, recipe)
    replace(modules, replacements)
    described = {name: _description(linear) for name, linear in places.items()}
    share_orders(model, {name: linear.group.name for name, linear in places.items()})
    _describe(model, recipe.config, described)
    model.micromix_refused = refused
    logger.info("quantized %d linears: %s", len(described), recipe.bits_text)
    return wrapped


def _places(
    matched: Sequence[tuple[Sequence[str], LinearRecipe]], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, LinearRecipe], dict[str, str]]:
    """By name: the linears to replace, and why others stay. An embedding that is tied to a linear stays as a matter
    of course."""
    places: dict[str, LinearRecipe] = {}
    refused: dict[str, str] = {}
    for names, linear in matched:
        for name in names:
            reason = why_not_replaced(name, modules)
            if reason is None:
                places[name] = linear
            elif not isinstance(modules.get(name), nn.Embedding):
                refused[name] = reason
    return places, refused


def _say_refused(refused: Mapping[str, str], *, strict: bool) -> None:
    """Raise ValueError if `strict`, and something is refused."""
    if refused and strict:
        raise ValueError(f"strict=True: {'; '.join(f'{name} stays as it is: {why}' for name, why in refused.items())}")
    for name, reason in refused.items():
        logger.warning("%s stays as it is: %s", name, reason)


def _packed_modules(
    places: Mapping[str, LinearRecipe], modules: Mapping[str, nn.Module], recipe: Recipe
) -> dict[str, nn.Module]:
    """The packed linear for each name. Modules keep apart, as their biases do; a tied weight is packed once."""
    made: dict[nn.Module, MicroMixLinear] = {}
    packed: dict[tuple[int, bool], PackedWeight] = {}
    with torch.no_grad():
        for name, linear in places.items():
            module = modules[name]
            weight = module.weight
            assert isinstance(weight, nn.Parameter), "a linear module has a weight"
            matrix = weight.detach() if isinstance(module, nn.Linear) else weight.detach().T
            key = id(weight), isinstance(module, nn.Linear)
            if key not in packed:
                packed[key] = packed_weight(matrix, linear, recipe)
            if module not in made:
                made[module] = _pack_module(module, weight, packed[key], linear, recipe.config)
    return {name: made[modules[name]] for name in places}


def _pack_module(
    module: nn.Module, weight: nn.Parameter, packed: PackedWeight, linear: LinearRecipe, config: MicroMixConfig
) -> MicroMixLinear:
    bias = module.bias
    made = MicroMixLinear(
        in_features=linear.in_features,
        out_features=linear.out_features,
        split=linear.split,
        config=config,
        bias=nn.Parameter(bias.detach(), requires_grad=False) if isinstance(bias, nn.Parameter) else None,
        device="meta",
        dtype=weight.dtype,
    )
    made.load_packed(packed, linear.group.channel_perm.to(weight.device))
    take_over(made, module)
    return made


def _description(linear: LinearRecipe) -> dict[str, Any]:
    shape = {"in_features": linear.in_features, "out_features": linear.out_features}
    return {**shape, "split": list(linear.split), "group": linear.group.name}


def share_orders(model: nn.Module, groups: Mapping[str, str]) -> None:
    """Let the packed linears of a group, name -> group, hold one order: sharing is how one quantize serves them all.

    Also has fused paths of torch.nn around them left.
    """
    leave_fast_paths(model, MicroMixLinear)
    first: dict[str, ChannelOrder] = {}
    for name, group in groups.items():
        module = model.get_submodule(name)
        assert isinstance(module, MicroMixLinear), f"{name} is packed"
        module.order = first.setdefault(group, module.order)


def _describe(model: nn.Module, config: MicroMixConfig, linears: dict[str, dict[str, Any]]) -> None:
    """Leave what a loader needs in a Hugging Face model's config."""
    if hasattr(model, "save_pretrained") and hasattr(model, "config"):
        fields = {"quant_method": QUANT_METHOD, "schema_version": SCHEMA_VERSION, "config": config.to_file()}
        model.config.quantization_config = {**fields, "linears": linears}  # type: ignore[union-attr]

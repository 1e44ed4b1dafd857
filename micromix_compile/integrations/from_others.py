"""Checkpoints that others quantized to MX become packed ones, with exactly the values that they hold.

One format with the model's own order of channels is a packed linear of one segment and the identity as its order.
Activations are quantized as the checkpoint says. Where all weights of a model are MXFP4, they may have any format. In
others a linear has one format for both: weights that are narrower than their activations are held in the format of
these, of the same values. Others than MX activations, or none, have no twin here: they are refused, unless the caller
names what to round to instead.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from micromix_compile.config import MicroMixConfig
from micromix_compile.integrations import checkpoint
from micromix_compile.integrations.mx_bytes import FP6, SCALE, THEIR_FORMATS, experts_from, one_segment, packed_from
from micromix_compile.integrations.schemes import Quantization, Scheme, modelopt_field, quantization_of
from micromix_compile.integrations.tensor_files import FLOATS, TensorFiles, write_tensors
from micromix_compile.linear.experts import PARTS, expert_shapes, is_experts
from micromix_compile.linear.replacing import why_not_replaced
from micromix_compile.numerics.formats import BLOCK_SIZE, ScaleRounding
from micromix_compile.recipe.schema import named, shown

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from torch import Tensor

ACTIVATIONS: Final = ("same", "fp8", "mxfp6", "mxfp8")
"""What a caller may name: formats of a row layout, or MXFP8 whatever the weights are."""
ROUNDINGS: Final = {"mxfp4": ScaleRounding.EVEN, "mxfp6": ScaleRounding.EVEN, "mxfp8": ScaleRounding.RCEIL}
"""How those libraries choose the scales of activations, which no checkpoint says. compressed-tensors' MXFP8 takes twice
the scale of RCEIL where a block's largest value is 448 times a power of two, which changes no value but what is below
the normal range of E4M3."""
_STORED: Final = {torch.uint8: ("U8",), torch.float8_e4m3fn: ("F8_E4M3",)}


@dataclass(frozen=True, kw_only=True, slots=True)
class LinearPlan:
    """What becomes of a linear (out_features, in_features), or of a weight of so many experts.

    form, activations: of `THEIR_FORMATS`, of its weight and of what its segment rounds activations to.
    """

    in_features: int
    out_features: int
    experts: int | None = None
    form: str
    activations: str
    scale_rounding: ScaleRounding

    def describe(self, config: MicroMixConfig) -> dict[str, Any]:
        """Its entry in our quantization_config. Linears of as many channels and one format share an order."""
        rounding = {} if self.scale_rounding == config.scale_rounding else {"scale_rounding": str(self.scale_rounding)}
        return {
            "in_features": self.in_features,
            "out_features": self.out_features,
            **({} if self.experts is None else {"experts": self.experts}),
            "split": list(one_segment(self.activations, self.in_features)),
            "rotated": 0,
            "group": f"{self.in_features} channels of {self.activations}",
            **rounding,
        }

    def stored(self, fqn: str) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of each of its tensors in the file: codes, and scales."""
        if self.experts is None:
            shapes = THEIR_FORMATS[self.form].shapes(self.out_features, self.in_features)
            return {f"{fqn}.{part}": described for part, described in shapes.items()}
        shape = (self.experts, self.out_features, self.in_features // BLOCK_SIZE)
        return {f"{fqn}_blocks": (torch.uint8, (*shape, BLOCK_SIZE // 2)), f"{fqn}_scales": (torch.uint8, shape)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Conversion:
    """What was read, and what becomes of it. named: the activations that the caller named, if so."""

    linears: Mapping[str, LinearPlan]
    named: str | None

    @property
    def all_mxfp4(self) -> bool:
        """Whether all weights are, which stay so whatever the activations are."""
        return all(plan.form == "mxfp4" for plan in self.linears.values())

    def held(self, plan: LinearPlan) -> str:
        """The format in which a weight is held, so that its activations are what they should be."""
        return plan.form if self.all_mxfp4 else plan.activations

    @property
    def config(self) -> MicroMixConfig:
        """Of the packed checkpoint. The scale rounding of most linears; others have their own."""
        plans = self.linears.values()
        rounding = Counter(plan.scale_rounding for plan in plans).most_common(1)[0][0]
        activations = {plan.activations for plan in plans}
        return MicroMixConfig(
            policy=next(iter(activations)) if len(activations) == 1 else "budget",
            weights="mxfp4" if self.all_mxfp4 and activations != {"mxfp4"} else "same",
            activations="same" if self.named in (None, "mxfp8") else self.named,
            rotate="none",
            fp6=FP6,
            scale_rounding=rounding,
            weight_rounding="nearest",
            scale_search=False,
            uniform_order="model",
        )

    @property
    def text(self) -> str:
        """For people: formats, and what activations are."""
        plans = self.linears.values()
        counts = Counter((plan.form, self.held(plan), plan.experts is not None) for plan in plans)
        formats = ", ".join(
            f"{count} {form}"
            + (" of experts" if experts else "")
            + ("" if form == held else f" held as {held}, of the same values")
            for (form, held, experts), count in sorted(counts.items())
        )
        said = "as the checkpoint says" if self.named is None else f"{self.named}, as was asked for"
        return f"{len(plans)} linears, {formats}; activations {said}"


def write_packed(source: Path, target: Path, activations: str | None) -> Conversion:
    """Write the packed twin of a checkpoint of others into `target`, an empty directory.

    activations: one of `ACTIVATIONS`, instead of what the checkpoint says of them. Raises FileNotFoundError, or
    ValueError that names the file or the tensor, what it is and what is read.
    """
    config = checkpoint.read_config(source / "config.json")
    quantization = _quantization(source, config)
    files = TensorFiles(source)
    model = _skeleton(source, config, len(files.described))
    try:
        conversion = Conversion(linears=_plans(model, quantization, activations, files), named=activations)
        _check_tensors(model, conversion.linears, files)
        write_tensors(target, _shards(files, conversion), len(files.paths))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error
    ours = conversion.config
    described = {name: plan.describe(ours) for name, plan in conversion.linears.items()}
    fields = {"quant_method": checkpoint.QUANT_METHOD, "schema_version": checkpoint.SCHEMA_VERSION}
    config["quantization_config"] = {**fields, "config": ours.to_file(), "linears": described}
    (target / "config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
    checkpoint.seal(target)
    return conversion


def _quantization(source: Path, config: Mapping[str, Any]) -> Quantization:
    path, said = source / "config.json", config.get("quantization_config")
    try:
        if said is None and (source / "hf_quant_config.json").is_file():
            path = source / "hf_quant_config.json"
            said = modelopt_field(checkpoint.read_config(path))
        if not isinstance(said, dict):
            raise ValueError(f"quantization_config must be a mapping, got {shown(said)}: it is not quantized")
        return quantization_of(said)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _skeleton(source: Path, config: Mapping[str, Any], tensors: int) -> nn.Module:
    """The model without weights. Raises ValueError where transformers can't make one."""
    path, layers = source / "config.json", config.get("num_hidden_layers", 0)
    if isinstance(layers, int) and layers > tensors:
        raise ValueError(f"{path}: num_hidden_layers is {shown(layers)}, and there are {tensors} tensors")
    try:
        described = AutoConfig.from_pretrained(source, local_files_only=True)
        if hasattr(described, "quantization_config"):
            del described.quantization_config
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(described)
        model.tie_weights()  # transformers 5.0 waits for the weights
    except Exception as error:  # whatever its fields may lead to
        raise ValueError(f"{path}: transformers makes no causal language model of it: {error!r}") from error
    skeleton: nn.Module = model
    return skeleton


def _plans(
    model: nn.Module, quantization: Quantization, activations: str | None, files: TensorFiles
) -> dict[str, LinearPlan]:
    """By name. Raises ValueError where the model has no such linear, or the activations no twin."""
    modules = dict(model.named_modules())
    plans: dict[str, LinearPlan] = {}
    for name, module in modules.items():
        scheme = quantization.scheme_of(name, [one.__name__ for one in type(module).__mro__])
        if scheme is None:
            continue
        if is_experts(module):
            shapes = {f"{name}.{weight}": shape for weight, shape in expert_shapes(module).items()}
            stored = {fqn: shape for fqn, shape in shapes.items() if f"{fqn}_blocks" in files.described}
            plans |= {fqn: _plan(fqn, *shape, scheme, activations) for fqn, shape in stored.items()}
        elif isinstance(module, nn.Linear | nn.Embedding):
            if (reason := why_not_replaced(name, modules)) is not None:
                raise ValueError(f"{name} is quantized, and cannot become a packed linear: {reason}")
            assert isinstance(module, nn.Linear), "an embedding can't be replaced"
            plans[name] = _plan(name, None, module.out_features, module.in_features, scheme, activations)
    if not plans:
        raise ValueError(f"quantization_config names no linear of {type(model).__name__}")
    return plans


def _plan(name: str, experts: int | None, n: int, channels: int, scheme: Scheme, activations: str | None) -> LinearPlan:
    if channels % BLOCK_SIZE:
        raise ValueError(f"{name}.in_features must be a multiple of {BLOCK_SIZE}, got {channels}")
    segment = _segment(name, scheme, activations)
    rounding = ROUNDINGS[segment] if activations is None else ScaleRounding.FIT
    return LinearPlan(
        in_features=channels, out_features=n, experts=experts, form=scheme.weights, activations=segment,
        scale_rounding=rounding,
    )  # fmt: skip


def _segment(name: str, scheme: Scheme, activations: str | None) -> str:
    """The segment in which a linear's channels are, so that its activations are what they should be."""
    if activations is not None:
        return "mxfp8" if activations == "mxfp8" else scheme.weights
    if scheme.activations is None:
        raise ValueError(
            f"{name}: the checkpoint says of its activations: {scheme.unlike}; packed linears round them to MX, or to "
            f"E4M3 with one power of two a row. Name what they are to be, activations= or --activations: "
            f"{', '.join(ACTIVATIONS)}"
        )
    if THEIR_FORMATS[scheme.activations].bits < THEIR_FORMATS[scheme.weights].bits:
        raise ValueError(
            f"{name}: {scheme.activations} activations of {scheme.weights} weights are not read; read are activations "
            f"at least as wide as their weights. Name others, activations= or --activations: {', '.join(ACTIVATIONS)}"
        )
    return scheme.activations


def _check_tensors(model: nn.Module, plans: Mapping[str, LinearPlan], files: TensorFiles) -> None:
    """Raise ValueError unless the files hold the tensors of the model and of its quantized linears, and no others."""
    wanted: dict[str, tuple[tuple[str, ...] | None, tuple[int, ...]]] = {
        name: (FLOATS if tensor.is_floating_point() else None, tuple(tensor.shape))
        for name, tensor in model.state_dict().items()
    }
    for name, plan in plans.items():
        del wanted[name if plan.experts else f"{name}.weight"]
        wanted |= {part: (_STORED[dtype], shape) for part, (dtype, shape) in plan.stored(name).items()}
    for name, (dtype, shape) in files.described.items():
        if name not in wanted:
            raise ValueError(
                f"tensor {named(name)} {dtype} {shape} belongs to nothing in {type(model).__name__}{_experts(name)}"
            )
        dtypes, right = wanted[name]
        if shape != right or (dtypes is not None and dtype not in dtypes):
            raise ValueError(f"tensor {name} must be {' or '.join(dtypes or ('any',))} {right}, got {dtype} {shape}")
    for name in _missing(model, wanted, files):
        raise ValueError(f"there is no tensor {name} {wanted[name][1]}")


def _experts(name: str) -> str:
    return ": weights of experts, one Parameter of the model, are not packed" if ".experts." in name else ""


def _missing(model: nn.Module, wanted: Mapping[str, Any], files: TensorFiles) -> Iterator[str]:
    """Names that the files lack, unless it is a tied weight that they have under another name."""
    tied: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        tied.setdefault(id(parameter), []).append(name)
    alike = {name: names for names in tied.values() for name in names}
    for name in wanted:
        if not any(one in files.described for one in (name, *alike.get(name, ()))):
            yield name


def _shards(files: TensorFiles, conversion: Conversion) -> Iterator[dict[str, Tensor]]:
    """The tensors of our checkpoint, file by file: those of a linear where its codes were."""
    codes, scales = {}, set()
    for name, plan in conversion.linears.items():
        first, second = plan.stored(name)
        codes[first] = name
        scales.add(second)
    for names in files.names_in:
        shard: dict[str, Tensor] = {}
        for name in names:
            if name in codes:
                plan = conversion.linears[codes[name]]
                shard |= _packed(files, codes[name], plan, conversion.held(plan))
            elif name not in scales:
                shard[name] = files.read(name)
        yield shard


def _packed(files: TensorFiles, fqn: str, plan: LinearPlan, held: str) -> dict[str, Tensor]:
    order = torch.arange(plan.in_features, dtype=torch.int32)
    between = "." if plan.experts is None else "_"
    try:
        if plan.experts is None:
            tensors = {part: files.read(f"{fqn}.{part}") for part in (THEIR_FORMATS[plan.form].codes, SCALE)}
            packed = packed_from(tensors, plan.form, held)
            names = [f"{fqn}.{part}" for part in ("weight_q4", "weight_q6", "weight_q8", "weight")]
        else:
            packed = experts_from(*(files.read(name) for name in plan.stored(fqn)))
            names = [fqn + part for part in PARTS]
    except ValueError as error:
        raise ValueError(f"{fqn}{between}{error}") from error
    return {**dict(zip(names, packed, strict=True)), f"{fqn}{between}order.channel_perm": order}

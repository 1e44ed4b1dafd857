"""What config.json says of a checkpoint that others quantized to MX: which linears, in which formats.

Read are compressed-tensors, where every group is MX, ModelOpt's MXFP8, and gpt-oss's MXFP4 of experts. Whatever is not
known to be without effect on the numbers is refused, with its name, its value and what is read.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final

from micromix_compile.numerics.formats import BLOCK_SIZE
from micromix_compile.recipe.schema import MAPPING, STRING, Each, check, shown

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

READ_FORMATS: Final = {
    "mxfp4-pack-quantized": "mxfp4",
    "mxfp6-pack-quantized": "mxfp6",
    "mxfp8-quantized": "mxfp8",
}
"""Of compressed-tensors, by our names."""
READ: Final = f"compressed-tensors ({', '.join(READ_FORMATS)}, or several of these), modelopt (MXFP8), mxfp4 (gpt-oss)"

WEIGHT_ONLY: Final = "no quantization (weight-only)"
_FORMAT_OF_BITS: Final = {4: "mxfp4", 6: "mxfp6", 8: "mxfp8"}
_PLACE: Final = "quantization_config"
_MX_ARGUMENTS: Final = {"type": "float", "strategy": "group", "group_size": BLOCK_SIZE, "symmetric": True}
_WITHOUT_EFFECT: Final = ("actorder", "observer", "observer_kwargs", "zp_dtype")
"""Arguments that say how scales were found, or what isn't there in a symmetric format."""
_ARGUMENTS: Final = (*_MX_ARGUMENTS, *_WITHOUT_EFFECT, "num_bits", "dynamic", "scale_dtype", "block_structure")


@dataclass(frozen=True, slots=True)
class Scheme:
    """How a linear is quantized. weights, activations: "mxfp4", "mxfp6" or "mxfp8"; activations may be None.

    unlike: what the config says of activations where they are None, for people.
    """

    weights: str
    activations: str | None
    unlike: str = ""


@dataclass(frozen=True, slots=True)
class Quantization:
    """Of a checkpoint. targets: names, "re:" and a regular expression, or classes, each with its scheme.

    ignore: the like, of what stays as it is; with `globs`, shell patterns of names instead.
    """

    targets: Mapping[str, Scheme]
    ignore: Sequence[str]
    globs: bool = False

    def scheme_of(self, name: str, classes: Sequence[str]) -> Scheme | None:
        """Of the module called `name`, whose class and base classes are called `classes`; None if it stays as it is.

        As compressed-tensors decides: a name goes before a regular expression, and that before a class.
        """
        if any(self._ignores(one, name, classes) for one in self.ignore):
            return None
        ordered = sorted(self.targets, key=lambda target: ("re:" in target, target))
        found = [target for target in ordered if _matches_name(target, name)]
        found += [target for target in ordered if target in classes]
        return self.targets[found[0]] if found else None

    def _ignores(self, one: str, name: str, classes: Sequence[str]) -> bool:
        return fnmatchcase(name, one) if self.globs else _matches_name(one, name) or one in classes


def _matches_name(target: str, name: str) -> bool:
    if target.startswith("re:"):
        return re.match(target.removeprefix("re:"), name) is not None
    return target == name


def quantization_of(quantization: Mapping[str, Any]) -> Quantization:
    """What a quantization_config says. Raises ValueError that names the field, its value and what is read."""
    method = quantization.get("quant_method")
    if method == "compressed-tensors":
        return _of_compressed_tensors(quantization)
    if method == "modelopt":
        return _of_modelopt(quantization)
    if method == "mxfp4":
        return _of_gpt_oss(quantization)
    raise ValueError(f"{_PLACE}.quant_method is {shown(method)}; read are {READ}")


def modelopt_field(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a hf_quant_config.json, where ModelOpt once said everything, as a quantization_config."""
    check(content.get("quantization"), MAPPING, "quantization")
    fields: dict[str, Any] = dict(content["quantization"])
    _must_be("group_size", fields.pop("group_size", BLOCK_SIZE), (BLOCK_SIZE,))
    names = {"exclude_modules": "ignore", "kv_cache_quant_algo": "kv_cache_scheme"}
    return {"quant_method": "modelopt", **{names.get(name, name): value for name, value in fields.items()}}


def _of_modelopt(quantization: Mapping[str, Any]) -> Quantization:
    """Its MXFP8 quantizes what goes into a linear like its weight."""
    _only(quantization, ("quant_method", "quant_algo", "ignore", "kv_cache_scheme", "producer"))
    _must_be("quant_algo", quantization.get("quant_algo"), ("MXFP8",))
    _must_be("kv_cache_scheme", quantization.get("kv_cache_scheme"), (None,))
    return Quantization({"Linear": Scheme("mxfp8", "mxfp8")}, _texts(quantization.get("ignore"), "ignore"), globs=True)


def _of_gpt_oss(quantization: Mapping[str, Any]) -> Quantization:
    """transformers' "mxfp4": weights of experts, and nothing else. It lists what stays as it is; whether experts of
    some layers do, their tensors say, too."""
    _only(quantization, ("quant_method", "modules_to_not_convert", "dequantize"))
    _must_be("dequantize", quantization.get("dequantize", False), (False,))
    _texts(quantization.get("modules_to_not_convert") or [], "modules_to_not_convert")
    return Quantization({"GptOssExperts": Scheme("mxfp4", None, WEIGHT_ONLY)}, ())


def _of_compressed_tensors(quantization: Mapping[str, Any]) -> Quantization:
    empty = ("kv_cache_scheme", "moe_sparsity_config", "sparsity_config", "transform_config")
    known = ("quant_method", "config_groups", "format", "ignore", "quantization_status", "global_compression_ratio")
    _only(quantization, (*known, *empty, "version"))
    _must_be("quantization_status", quantization.get("quantization_status"), ("compressed",))
    for name in empty:
        _must_be(name, quantization.get(name), (None, {}, {"format": "dense"}))
    groups = quantization.get("config_groups")
    check(groups, Each(MAPPING), f"{_PLACE}.config_groups")
    assert isinstance(groups, dict), "just checked"
    targets: dict[str, Scheme] = {}
    for name, group in groups.items():
        place = f"config_groups[{shown(name)}]"
        scheme = _scheme(group, group.get("format") or quantization.get("format"), place)
        targets.update(dict.fromkeys(_texts(group.get("targets"), f"{place}.targets"), scheme))
    return Quantization(targets, _texts(quantization.get("ignore") or [], "ignore"))


def _scheme(group: Mapping[str, Any], form: Any, place: str) -> Scheme:
    _only(group, ("targets", "weights", "input_activations", "output_activations", "format"), f"{place}.")
    _must_be(f"{place}.format", form, tuple(READ_FORMATS))
    _must_be(f"{place}.output_activations", group.get("output_activations"), (None,))
    weights = _arguments(group.get("weights"), f"{place}.weights")
    for name, value in {**_MX_ARGUMENTS, "dynamic": False}.items():
        _must_be(f"{place}.weights.{name}", weights.get(name), (value,))
    _must_be(f"{place}.weights.scale_dtype", weights.get("scale_dtype"), ("torch.uint8", None))
    bits = weights.get("num_bits")
    if _FORMAT_OF_BITS.get(bits if isinstance(bits, int) else 0) != READ_FORMATS[form]:
        raise ValueError(f"{_PLACE}.{place}.weights.num_bits must be that of {form}, got {shown(bits)}")
    if group.get("input_activations") is None:
        return Scheme(READ_FORMATS[form], None, WEIGHT_ONLY)
    return _with_activations(READ_FORMATS[form], _arguments(group["input_activations"], f"{place}.input_activations"))


def _with_activations(weights: str, arguments: Mapping[str, Any]) -> Scheme:
    wanted = {**_MX_ARGUMENTS, "dynamic": True, "scale_dtype": "torch.uint8"}
    bits = arguments.get("num_bits")
    if isinstance(bits, int) and bits in _FORMAT_OF_BITS and wanted.items() <= arguments.items():
        return Scheme(weights, _FORMAT_OF_BITS[bits])
    said = ", ".join(f"{name} {shown(value)}" for name, value in sorted(arguments.items()) if value is not None)
    return Scheme(weights, None, said)


def _arguments(value: Any, place: str) -> Mapping[str, Any]:
    check(value, MAPPING, f"{_PLACE}.{place}")
    _only(value, _ARGUMENTS, f"{place}.")
    arguments: Mapping[str, Any] = value
    return arguments


def _texts(value: Any, name: str) -> list[str]:
    check(value, [STRING], f"{_PLACE}.{name}")
    texts: list[str] = value
    for text in texts:
        try:
            re.compile(text.removeprefix("re:") if text.startswith("re:") else "")
        except re.error as error:
            raise ValueError(f"{_PLACE}.{name} holds {shown(text)}, no regular expression: {error}") from error
    return texts


def _only(fields: Mapping[str, Any], known: Sequence[str], place: str = "") -> None:
    for name in fields:
        if name not in known:
            raise ValueError(f"{_PLACE}.{place}{name} is not a field that is read; read are {', '.join(known)}")


def _must_be(name: str, value: Any, accepted: tuple[Any, ...]) -> None:
    if not any(value == one and type(value) is type(one) for one in accepted):
        read = ", ".join(map(repr, accepted))
        raise ValueError(f"{_PLACE}.{name} is {shown(value)}; read {'is' if len(accepted) == 1 else 'are'} {read}")

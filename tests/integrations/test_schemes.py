"""What config.json says of others' checkpoints, where it is compressed-tensors' own code that decides."""

from __future__ import annotations

from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.quant_scheme import PRESET_SCHEMES, preset_name_to_scheme
from compressed_tensors.utils import is_match, match_targets
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from micromix_compile.integrations.schemes import Quantization, Scheme, modelopt_field, quantization_of

NAMES = ("model.a.up_proj", "model.a.down_proj", "model.b.up_proj", "lm_head", "transformer.a.up_proj")
TARGETS = (*NAMES, "re:.*up_proj", "re:.*a\\..*", "re:model", "re:up_proj", "Linear", "Module", "Embedding", "up_proj")


def dumped(preset: str, form: str) -> dict[str, Any]:
    """The quantization_config that compressed-tensors writes for a preset."""
    scheme = preset_name_to_scheme(preset, ["Linear"])
    config = QuantizationConfig(config_groups={"g": scheme}, format=form, quantization_status="compressed")
    return config.model_dump(mode="json")


@pytest.mark.parametrize(
    ("preset", "form", "weights", "activations"),
    [
        ("MXFP4", "mxfp4-pack-quantized", "mxfp4", "mxfp4"),
        ("MXFP4A16", "mxfp4-pack-quantized", "mxfp4", None),
        ("MXFP4XFP8", "mxfp4-pack-quantized", "mxfp4", None),
        ("MXFP6A8", "mxfp6-pack-quantized", "mxfp6", "mxfp8"),
        ("MXFP6A16", "mxfp6-pack-quantized", "mxfp6", None),
        ("MXFP8", "mxfp8-quantized", "mxfp8", "mxfp8"),
        ("MXFP8A16", "mxfp8-quantized", "mxfp8", None),
    ],
)
def test_every_mx_preset_of_compressed_tensors_is_read(
    preset: str, form: str, weights: str, activations: str | None
) -> None:
    scheme = quantization_of(dumped(preset, form)).targets["Linear"]
    assert (scheme.weights, scheme.activations) == (weights, activations)
    assert (scheme.unlike == "") == (activations is not None)


@pytest.mark.parametrize("preset", sorted(name for name in PRESET_SCHEMES if not name.startswith("MXFP")))
@pytest.mark.parametrize("form", ["mxfp4-pack-quantized", "mxfp8-quantized"])
def test_no_other_preset_is_taken_for_mx_whatever_its_format_is_called(preset: str, form: str) -> None:
    with pytest.raises(ValueError, match=r"^quantization_config.config_groups\['g'\].weights"):
        quantization_of(dumped(preset, form))


@given(
    targets=st.lists(st.sampled_from(TARGETS), unique=True),
    ignore=st.lists(st.sampled_from(TARGETS), unique=True, max_size=2),
    name=st.sampled_from(NAMES),
)
def test_a_linear_has_the_scheme_that_compressed_tensors_gives_it(
    targets: list[str], ignore: list[str], name: str
) -> None:
    module = nn.Linear(1, 1)
    schemes = {target: Scheme("mxfp4", target) for target in targets}
    found = Quantization(schemes, ignore).scheme_of(name, [one.__name__ for one in type(module).__mro__])
    matched = match_targets(name, module, targets)
    expected = schemes[matched[0]] if matched and not is_match(name, module, ignore) else None
    assert found == expected


def test_modelopt_leaves_out_what_matches_a_shell_pattern() -> None:
    said = {"quant_algo": "MXFP8", "kv_cache_quant_algo": None, "group_size": 32, "exclude_modules": ["lm_head", "*b*"]}
    quantization = quantization_of(modelopt_field({"producer": {"name": "modelopt"}, "quantization": said}))
    assert [name for name in NAMES if quantization.scheme_of(name, ["Linear"])] == [NAMES[0], NAMES[1], NAMES[4]]
    assert quantization.scheme_of(NAMES[0], ["Embedding"]) is None


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"quant_algo": "MXFP8", "group_size": 16}, "quantization_config.group_size is 16; read is 32"),
        ({"quant_algo": "NVFP4"}, "quantization_config.quant_algo is 'NVFP4'; read is 'MXFP8'"),
        ({"quant_algo": "MXFP8", "kv_cache_quant_algo": "FP8"}, "kv_cache_scheme is 'FP8'; read is None"),
        ({"quant_algo": "MXFP8", "pre_quant_scale": True}, "pre_quant_scale is not a field that is read"),
        ([], r"quantization must be a mapping, got \[\]"),
    ],
)
def test_what_modelopt_says_beside_mxfp8_is_refused(said: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantization_of(modelopt_field({"quantization": said}))


@pytest.mark.parametrize("symmetric", [1, 0, "true", None])
def test_a_value_of_another_type_is_not_what_is_read(symmetric: object) -> None:
    config = dumped("MXFP4", "mxfp4-pack-quantized")
    config["config_groups"]["g"]["weights"]["symmetric"] = symmetric
    with pytest.raises(ValueError, match=r"weights.symmetric is .*; read is True"):
        quantization_of(config)

"""The options: defaults that hold, errors that name the field, its value and what is accepted, and the way to JSON."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from micromix_compile.config import (
    ACTIVATION_MODES,
    DUMPED,
    GRANULARITIES,
    POLICY_NAMES,
    ROTATIONS,
    TARGET_KINDS,
    WEIGHT_MODES,
    WEIGHT_ROUNDINGS,
    MicroMixConfig,
)
from micromix_compile.numerics.formats import FP6_FORMATS, ScaleRounding

NOT_A_NUMBER = "lam must be a number, got {}"
NOT_POSITIVE = "lam must be a positive finite number, got {}"
POLICY_TEXT = "policy must be one of budget, mxfp8-anchor, paper, released, mxfp4, mxfp6, mxfp8, got {}"
STRINGS = " must be a list or tuple of strings, got {}"

BAD_VALUES: list[tuple[str, Any, type[Exception], str]] = [
    ("policy", "fp5", ValueError, POLICY_TEXT),
    ("policy", None, ValueError, POLICY_TEXT),
    ("lam", 0.0, ValueError, NOT_POSITIVE),
    ("lam", -1, ValueError, NOT_POSITIVE),
    ("lam", float("inf"), ValueError, NOT_POSITIVE),
    ("lam", float("nan"), ValueError, NOT_POSITIVE),
    ("lam", "1.0", TypeError, NOT_A_NUMBER),
    ("lam", True, TypeError, NOT_A_NUMBER),
    ("target_bits", 3.9, ValueError, "target_bits must be in [4, 16], got {}"),
    ("target_bits", float("nan"), ValueError, "target_bits must be in [4, 16], got {}"),
    ("target_bits", "5", TypeError, "target_bits must be a number, got {}"),
    ("target_kind", "bytes", ValueError, "target_kind must be one of element, stored, time, got {}"),
    ("weight_rounding", "up", ValueError, "weight_rounding must be one of nearest, gptq, guided, got {}"),
    ("uniform_order", "mean", ValueError, "uniform_order must be one of model, sheltered, got {}"),
    ("scale_search", "yes", TypeError, "scale_search must be True or False, got {}"),
    ("seed", -1, ValueError, "seed must be an integer from 0 to 2**63 - 1, got {}"),
    ("seed", 2**63, ValueError, "seed must be an integer from 0 to 2**63 - 1, got {}"),
    ("seed", 0.5, TypeError, "seed must be an integer from 0 to 2**63 - 1, got {}"),
    ("fp6", "e4m3", ValueError, "fp6 must be one of e2m3, e3m2, got {}"),
    ("weights", "mxfp8", ValueError, "weights must be one of same, mxfp4, got {}"),
    ("activations", "int8", ValueError, "activations must be one of auto, same, fp8, mxfp6, got {}"),
    ("rotate", True, ValueError, "rotate must be one of auto, none, all, got {}"),
    ("scale_rounding", "nearest", ValueError, "scale_rounding must be one of floor, rceil, even, fit, got {}"),
    ("granularity", 16, ValueError, "granularity must be one of 32, 64, 128, got {}"),
    ("granularity", 64.0, TypeError, "granularity must be one of 32, 64, 128, got {}"),
    ("granularity", "64", TypeError, "granularity must be one of 32, 64, 128, got {}"),
    ("skip", "*lm_head", TypeError, "skip" + STRINGS),
    ("skip", ("*lm_head", 3), TypeError, "skip" + STRINGS),
    ("skip", None, TypeError, "skip" + STRINGS),
    ("convolutions", 1, TypeError, "convolutions must be True or False, got {}"),
    ("shards", 0, ValueError, "shards must be a positive integer, got {}"),
    ("shards", 2.0, TypeError, "shards must be a positive integer, got {}"),
    ("row_parallel", "*o_proj", TypeError, "row_parallel" + STRINGS),
    ("strict", "yes", TypeError, "strict must be True or False, got {}"),
    ("strict", 1, TypeError, "strict must be True or False, got {}"),
    ("exact", "no", TypeError, "exact must be True or False, got {}"),
    ("keep_expanded", 1, TypeError, "keep_expanded must be True or False, got {}"),
    ("calibration_batches", 0, ValueError, "calibration_batches must be a positive integer, got {}"),
    ("calibration_batches", 2.5, TypeError, "calibration_batches must be a positive integer, got {}"),
    ("calibration_batches", True, TypeError, "calibration_batches must be a positive integer, got {}"),
    ("calibration_tokens", -4, ValueError, "calibration_tokens must be a positive integer, got {}"),
    ("calibration_tokens", "many", TypeError, "calibration_tokens must be a positive integer, got {}"),
    ("dump", "all", TypeError, "dump" + STRINGS),
    ("dump", 7, TypeError, "dump" + STRINGS),
    ("dump", ["find_linears", "fuse"], ValueError, f"dump must list passes, all, {', '.join(DUMPED)}, got 'fuse'"),
    ("dump_dir", 7, TypeError, "dump_dir must be a string, got {}"),
]

pattern_lists = st.lists(st.text(max_size=10), max_size=3)
configs = st.builds(
    MicroMixConfig,
    policy=st.sampled_from(POLICY_NAMES),
    lam=st.floats(1e-6, 1e6) | st.integers(1, 9),
    target_bits=st.floats(4, 16) | st.integers(4, 16),
    target_kind=st.sampled_from(TARGET_KINDS),
    weight_rounding=st.sampled_from(WEIGHT_ROUNDINGS),
    scale_search=st.booleans(),
    uniform_order=st.sampled_from(("model", "sheltered")),
    seed=st.integers(0, 2**63 - 1),
    fp6=st.sampled_from(FP6_FORMATS),
    weights=st.sampled_from(WEIGHT_MODES),
    activations=st.sampled_from(ACTIVATION_MODES),
    rotate=st.sampled_from(ROTATIONS),
    scale_rounding=st.sampled_from(tuple(ScaleRounding)),
    granularity=st.sampled_from(GRANULARITIES),
    skip=pattern_lists,
    convolutions=st.booleans(),
    shards=st.integers(1, 64),
    row_parallel=pattern_lists,
    strict=st.booleans(),
    calibration_batches=st.integers(1, 10**6),
    calibration_tokens=st.integers(1, 10**9),
    dump=st.lists(st.sampled_from(("all", *DUMPED)), max_size=3).map(tuple),
    dump_dir=st.text(max_size=10),
)


def test_the_bad_values_cover_every_option() -> None:
    assert {name for name, *_ in BAD_VALUES} == set(MicroMixConfig.option_names())


@pytest.mark.parametrize(("name", "value", "error", "message"), BAD_VALUES)
def test_a_bad_value_is_refused_with_field_value_and_what_is_accepted(
    name: str, value: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^{re.escape(message.format(repr(value)))}$"):
        MicroMixConfig.from_mapping({name: value})


@given(config=configs)
def test_a_config_survives_json(config: MicroMixConfig) -> None:
    assert MicroMixConfig.from_mapping(json.loads(json.dumps(config.to_dict()))) == config


def test_an_unknown_option_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match="unknown option 'lambda'") as caught:
        MicroMixConfig.from_mapping({"policy": "paper", "lambda": 2.0})
    listed = str(caught.value).partition("the options are ")[2].split(", ")
    assert listed == [field.name for field in dataclasses.fields(MicroMixConfig)]


def test_no_options_are_the_defaults() -> None:
    assert MicroMixConfig.from_mapping({}) == MicroMixConfig()


def test_a_scale_rounding_may_be_given_by_name() -> None:
    config = MicroMixConfig.from_mapping({"scale_rounding": "even"})
    assert config.scale_rounding is ScaleRounding.EVEN
    assert type(config.to_dict()["scale_rounding"]) is str


def test_lists_become_tuples_so_that_a_config_can_be_hashed() -> None:
    config = MicroMixConfig.from_mapping({"skip": ["*head"], "dump": ["all"]})
    assert (config.skip, config.dump) == (("*head",), ("all",))
    assert hash(config) == hash(MicroMixConfig(skip=("*head",), dump=("all",)))


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        MicroMixConfig().lam = 2.0  # type: ignore[misc]

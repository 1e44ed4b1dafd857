"""Options of torch.compile: ours, Inductor's, and others."""

from __future__ import annotations

import pytest
import torch
from support.models import make_net
from torch._dynamo.exc import BackendCompilerFailed

from micromix_compile.verbs.options import parse_options

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


def test_a_dump_of_no_pass_is_an_error() -> None:
    with pytest.raises(
        ValueError, match=r"dump must list passes, all, open_attention, find_linears, .*, got 'find_linear'"
    ):
        parse_options(None, {"dump": ["rewrite_linears", "find_linear"]})


def test_unknown_options_are_answered_with_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"unknown option 'polcy'; .*recipe, mode, policy, target_bits, target_kind"):
        parse_options(None, {"polcy": "paper"})
    with pytest.raises(TypeError, match="recipe must be a Recipe or the path of one, got int"):
        parse_options(None, {"recipe": 3})
    with pytest.raises(BackendCompilerFailed, match="granularity must be one of 32, 64, 128, got 48"):
        torch.compile(make_net(), backend="micromix", options={"granularity": 48})(torch.randn(2, 5, 64))


def test_inductors_options_and_modes_pass_through() -> None:
    parsed = parse_options(None, {"mode": "max-autotune-no-cudagraphs", "epilogue_fusion": False, "lam": 2.0})
    assert parsed.inductor == {"max_autotune": True, "coordinate_descent_tuning": True, "epilogue_fusion": False}
    assert parsed.ours == {"lam": 2.0}

"""Rounding of weights: on the grid, never worse than to nearest, and equal to it where nothing can be made up for."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.models import make_net
from support.strategies import bell_blocks, finite_blocks, lattice_blocks, matrices, scale_roundings
from torch import Tensor

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.numerics import reference, rounding
from micromix_compile.numerics.formats import ELEM_FORMATS, ScaleRounding, elem_format
from micromix_compile.ops.pack import round_weights
from micromix_compile.recipe.types import ChannelStatistics, GroupRecipe

NEAREST = MicroMixConfig(
    policy="mxfp8-anchor", weight_rounding="nearest", scale_search=False, scale_rounding=ScaleRounding.RCEIL
)
GPTQ = dataclasses.replace(NEAREST, weight_rounding="gptq")
KEPT_FORMATS = ("e2m1", "e2m3", "e3m2", "e4m3")
moderate = st.one_of(lattice_blocks(min_exponent=-20, max_exponent=10), bell_blocks().map(lambda b: b % 16))


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, list[str], Tensor]:
    """A weight (N, K), formats per block, and the second moment of correlated inputs, some channels always zero."""
    blocks = draw(st.integers(1, 3))
    weight = draw(matrices(moderate, rows=st.integers(1, 4), channels=st.just(32 * blocks)))
    formats = draw(st.lists(st.sampled_from(KEPT_FORMATS), min_size=blocks, max_size=blocks))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    k = 32 * blocks
    inputs = torch.randn(draw(st.integers(1, 2 * k)), k, generator=generator) @ torch.randn(k, k, generator=generator)
    inputs *= (torch.rand(k, generator=generator) > draw(st.sampled_from((0.0, 0.2, 1.0)))).float()
    return weight, formats, inputs.T @ inputs


@given(matrices(finite_blocks), st.sampled_from(tuple(ELEM_FORMATS)))
def test_fast_rounding_equals_the_reference_codec(values: Tensor, name: str) -> None:
    fmt = elem_format(name)
    expected = reference.decode(reference.encode(values, fmt), fmt)
    assert torch.equal(rounding.round_elements(values, fmt), expected)
    assert torch.equal(torch.signbit(rounding.round_elements(values, fmt)), torch.signbit(expected))


@given(cases(), scale_roundings, st.booleans(), st.booleans())
def test_what_is_rounded_is_on_the_grid(
    case: tuple[Tensor, list[str], Tensor], scale_rounding: ScaleRounding, search: bool, compensate: bool
) -> None:
    """Packing rounds it again, and changes nothing."""
    weight, formats, moment = case
    options = {"scale_rounding": scale_rounding, "search": search, "compensate": compensate}
    rounded = rounding.round_weight(weight, formats, moment, **options)
    for name, block in zip(formats, rounded.split(32, dim=1), strict=True):
        codes, scale = reference.quantize(block, name, scale_rounding=scale_rounding)
        assert torch.equal(reference.dequantize(codes, scale, name), block)


@given(cases(), st.booleans())
def test_no_row_is_worse_than_to_nearest_in_the_moments_norm(
    case: tuple[Tensor, list[str], Tensor], search: bool
) -> None:
    weight, formats, moment = case
    nearest = rounding.round_weight(weight, formats, moment, search=search, compensate=False)
    rounded = rounding.round_weight(weight, formats, moment, search=search)
    damped = moment.double()
    mean = damped.diagonal().mean()
    damped = damped + torch.eye(len(damped)) * (rounding.DAMPING * mean if mean > 0 else 1.0)

    def error(of: Tensor) -> Tensor:
        wide = (of - weight).double()
        return torch.einsum("nk,kl,nl->n", wide, damped, wide)

    assert (error(rounded) <= error(nearest) * (1 + 1e-9)).all()


@given(cases(), st.booleans())
def test_uncorrelated_channels_have_nothing_to_make_up_for(
    case: tuple[Tensor, list[str], Tensor], search: bool
) -> None:
    weight, formats, moment = case
    diagonal = torch.diag(moment.diagonal())
    rounded = rounding.round_weight(weight, formats, diagonal, search=search)
    if not search:  # with it, damping shifts the weights of the search a little
        assert torch.equal(rounded, rounding.round_weight(weight, formats, diagonal, search=search, compensate=False))
    assert rounded.isfinite().all()


@given(cases())
def test_searched_scales_are_never_worse_in_the_weighted_error(case: tuple[Tensor, list[str], Tensor]) -> None:
    weight, formats, moment = case
    importance = moment.diagonal()
    plain, searched = (
        rounding.round_weight(weight, formats, importance, search=search, compensate=False) for search in (False, True)
    )

    def error(of: Tensor) -> Tensor:
        return ((of - weight).double().square() * importance.double()).unflatten(1, (-1, 32)).sum(-1)

    assert (error(searched) <= error(plain) * (1 + 1e-5)).all()


def plainly_compensated(weight: Tensor, formats: list[str], moment: Tensor) -> Tensor:
    """GPTQ one channel at a time in float64, with a fresh inverse of the part of H that is still open."""
    left, hessian = weight.double(), rounding._damp(moment)
    rounded = torch.empty_like(weight)
    for channel in range(weight.shape[1]):
        if channel % 32 == 0:
            block = left[:, channel : channel + 32].float()
            fmt = elem_format(formats[channel // 32])
            scale = reference.scale_value(reference.scale_byte(block.abs().amax(1), fmt, ScaleRounding.RCEIL))
        value = rounding.round_elements(left[:, channel].float() / scale, fmt) * scale
        rounded[:, channel] = value
        inverse = torch.linalg.inv(hessian[channel:, channel:])
        left[:, channel:] -= torch.outer((left[:, channel] - value) / inverse[0, 0], inverse[0])
    return rounded


@pytest.mark.parametrize("formats", [["e2m1"] * 3, ["e2m1", "e2m3", "e4m3"], ["e4m3", "e2m1", "e3m2"]])
def test_compensation_equals_the_plain_algorithm(formats: list[str]) -> None:
    """But for float32 ties: at most one value in a hundred may fall to the other side and move what follows."""
    inputs = torch.randn(300, 96) @ torch.randn(96, 96)
    weight, moment = torch.randn(16, 96), inputs.T @ inputs
    factor = rounding._inverse_factor(rounding._damp(moment))
    fast, _ = rounding._compensate(weight, formats, factor, ScaleRounding.RCEIL, False, rounding.PLAIN_STEPS)
    plain = plainly_compensated(weight, formats, moment)
    assert (fast != plain).float().mean() < 0.01


def test_correlated_inputs_are_made_use_of() -> None:
    """Outputs of a random layer come at least a third closer, in energy, than rounding to nearest brings them."""
    inputs = torch.randn(2000, 16) @ torch.randn(16, 128) + 0.1 * torch.randn(2000, 128)
    weight, formats = torch.randn(64, 128), ["e2m1"] * 4
    moment = inputs.T @ inputs
    errors = [
        (inputs @ (rounding.round_weight(weight, formats, moment, compensate=c) - weight).T).square().sum()
        for c in (True, False)
    ]
    assert errors[0] < 0.67 * errors[1]


def test_a_poisoned_weight_poisons_its_own_blocks_only() -> None:
    perm = torch.randperm(64).int()
    statistics = ChannelStatistics(
        abs_mean=torch.rand(64), abs_max=torch.rand(64), elements=1, tokens=1, batches=1, below={}
    )
    group = GroupRecipe(name="g", channel_perm=perm, split=(32, 0, 32), statistics=statistics)
    good, bad = torch.randn(8, 64), torch.randn(8, 64)
    bad[3, 5] = float("nan")
    config = GPTQ
    moment = torch.randn(64, 64)
    packed = round_weights({"good": good, "bad": bad}, group, moment @ moment.T, config)
    alone = round_weights({"good": good}, group, moment @ moment.T, config)
    assert all(torch.equal(a, b) for a, b in zip(packed["good"], alone["good"], strict=True))
    assert (packed["bad"].w_scale == 255).sum() == 1
    assert not (packed["good"].w_scale == 255).any()


@pytest.mark.parametrize("options", [{"weight_rounding": "gptq", "scale_search": True}, {"scale_search": True}])
@pytest.mark.usefixtures("fresh_compiler")
def test_rounded_weights_reach_every_way_of_running(options: dict[str, object], tmp_path: object) -> None:
    """Packed modules, the compiled model and the saved recipe hold the same bytes, which aren't those of nearest."""
    net = make_net(layers=1)
    batches = [torch.randn(2, 16, 64) for _ in range(3)]
    recipe = micromix.calibrate(net, batches, dataclasses.replace(NEAREST, **options))
    recipe.save(f"{tmp_path}/r.safetensors")
    loaded = micromix.Recipe.load(f"{tmp_path}/r.safetensors")
    assert set(loaded.packed) == set(recipe.linears)
    packed = micromix.quantize_(copy.deepcopy(net), loaded)
    compiled = torch.compile(net, backend="micromix", options={"recipe": recipe})
    itself = torch.compile(
        copy.deepcopy(net),
        backend="micromix",
        options={
            "policy": "mxfp8-anchor",
            "scale_rounding": "rceil",
            "weight_rounding": "nearest",
            "scale_search": False,
            **options,
            "calibration_batches": 3,
        },
    )
    plain = micromix.quantize_(copy.deepcopy(net), micromix.calibrate(net, batches, NEAREST))
    x = torch.randn(2, 7, 64)
    with torch.no_grad():
        for batch in batches:
            itself(batch)
        expected = packed(x)
        for other in (compiled, itself):
            assert (other(x) - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert not torch.equal(packed.layers[0].down.weight_q4, plain.layers[0].down.weight_q4)


def test_a_recipe_without_rounded_weights_says_what_to_do() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 8, 64)], NEAREST)
    asked = micromix.assign(recipe, GPTQ)
    with pytest.raises(ValueError, match=r"no rounded weight for layers.0.gate: weight_rounding='gptq' .* calibrate"):
        micromix.quantize_(net, asked)


def test_options_that_change_no_number_keep_the_rounded_weights() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 8, 64)], GPTQ)
    assert micromix.assign(recipe, dataclasses.replace(GPTQ, strict=True)).packed is recipe.packed
    assert not micromix.assign(recipe, dataclasses.replace(GPTQ, policy="mxfp8")).packed


def test_other_splits_round_to_nearest_and_say_so(caplog: pytest.LogCaptureFixture) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 8, 64)], GPTQ)
    other = micromix.assign(recipe, dataclasses.replace(GPTQ, policy="mxfp8"))
    assert other.config.weight_rounding == "nearest"
    assert "rounded for other options" in caplog.text
    micromix.quantize_(net, other)


@pytest.mark.usefixtures("fresh_compiler")
def test_a_weight_that_changed_after_calibration_is_rounded_to_nearest() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 8, 64)], GPTQ)
    compiled = torch.compile(net, backend="micromix", options={"recipe": recipe})
    x = torch.randn(2, 8, 64)
    with torch.no_grad():
        before = compiled(x)
        for parameter in net.layers[0].down.parameters():
            parameter.mul_(-1)
        after = compiled(x)
        assert (before - after).abs().max() > 0.1 * before.abs().max()


def test_all_elem_formats_round_their_own_values_to_themselves() -> None:
    for fmt in ELEM_FORMATS.values():
        codes = torch.arange(fmt.max_code + 1, dtype=torch.uint8)
        values = reference.decode(codes, fmt)
        assert torch.equal(rounding.round_elements(values, fmt), values)

"""Convolutions of kernel size 1 on request: the bits of linears, in all ways in; what is none is refused by name."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.graphs import trace
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from transformers import PreTrainedConfig, PreTrainedModel

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.linear.convolution import MicroMixConvolution, why_not_pointwise
from micromix_compile.linear.packed import MicroMixLinear
from micromix_compile.passes import find_linears
from micromix_compile.passes.manager import counted
from micromix_compile.session.session import Session

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.versions
QUICK = MicroMixConfig(policy="mxfp8-anchor", convolutions=True)
NEAREST = MicroMixConfig(policy="mxfp8-anchor", convolutions=True, weight_rounding="nearest", scale_search=False)


class Places(nn.Module):
    """Two convolutions of one input, one of the other kind, and a convolution that is no linear."""

    def __init__(self) -> None:
        super().__init__()
        self.spread = nn.Conv2d(64, 64, 3, padding=1, groups=64)
        self.first, self.second = nn.Conv2d(64, 96, 1), nn.Conv2d(64, 96, 1, bias=False, padding="same")
        self.third = nn.Conv1d(96, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x)
        h = self.first(x) * self.second(x).sigmoid()
        return self.third(h.view(x.shape[0], -1).view(x.shape[0], 96, -1))  # as a convolution's output can be seen


class Tokens(nn.Module):
    """The same of linears."""

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.spread = copy.deepcopy(places.spread)
        self.first, self.second, self.third = nn.Linear(64, 96), nn.Linear(64, 96, bias=False), nn.Linear(96, 64)
        weights = {name: value for name, value in places.state_dict().items() if "spread" not in name}
        self.load_state_dict({n: v.flatten(1) if v.dim() > 2 else v for n, v in weights.items()}, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.spread(x).movedim(1, -1)
        h = self.first(x) * self.second(x).sigmoid()
        return self.third(h.reshape(x.shape[0], -1, 96)).mT


@pytest.fixture(scope="module")
def places() -> Places:
    torch.manual_seed(0)
    return Places().eval()


@pytest.fixture(scope="module")
def inputs() -> Tensor:
    return torch.randn(2, 64, 5, 7)


def test_convolutions_have_the_bits_of_linears_compiled_and_packed(
    places: Places, inputs: Tensor, tmp_path: Path
) -> None:
    tokens = Tokens(places).eval()
    recipe = micromix.calibrate(places, [inputs], NEAREST, progress=False)
    same = micromix.calibrate(tokens, [inputs], NEAREST, progress=False)
    assert set(recipe.linears) == {"first", "second", "third"}
    assert recipe.refused == {"spread": "it is a convolution with kernel_size (3, 3), not 1"}
    assert recipe.parameters + recipe.left_alone[0] == sum(p.numel() for p in places.parameters())
    assert recipe.linears["first"].group is recipe.linears["second"].group
    for name, linear in same.linears.items():
        assert linear.split == recipe.linears[name].split
        assert torch.equal(linear.group.channel_perm, recipe.linears[name].group.channel_perm)
    recipe.save(tmp_path / "recipe")
    packed = micromix.quantize_(copy.deepcopy(places), recipe)
    assert not packed.micromix_refused
    assert packed.first.weight.shape == (96, 64, 1, 1)
    assert (packed.first.weight - places.first.weight).norm() < 0.05 * places.first.weight.norm()
    with torch.no_grad():
        want = micromix.quantize_(copy.deepcopy(tokens), same)(inputs)
        assert torch.equal(packed(inputs), want)
        assert 0 < (want - places(inputs)).norm() < 0.1 * want.norm()
        options = {"recipe": tmp_path / "recipe", "strict": True}
        with counted() as counts:
            fast = torch.compile(places, backend="micromix", options=options)(inputs)
        assert (counts["rewrite_linears"], counts["share_activations"]) == (3, 1)
        linears = torch.compile(tokens, backend="micromix", options={"recipe": same})(inputs)
        assert torch.equal(fast, linears)
        torch.testing.assert_close(torch.compile(packed, backend="micromix")(inputs), want)


class Config(PreTrainedConfig):
    model_type = "places"


class Model(PreTrainedModel):
    """The same in transformers."""

    config_class = Config

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.places = Places()
        self.post_init()

    def forward(self, x: Tensor) -> Tensor:
        return self.places(x)


def test_packed_convolutions_are_saved_loaded_dequantized_and_packed_while_loading(
    inputs: Tensor, tmp_path: Path
) -> None:
    model = Model(Config()).eval()
    recipe = micromix.calibrate(model, [inputs], NEAREST, progress=False)
    model.save_pretrained(tmp_path / "plain")
    packed = micromix.quantize_(model, recipe)
    packed.save_pretrained(tmp_path / "packed")
    loaded = Model.from_pretrained(tmp_path / "packed")
    on_load = Model.from_pretrained(tmp_path / "plain", quantization_config=micromix.MicroMixQuantConfig(recipe=recipe))
    with torch.no_grad():
        want = packed(inputs)
        assert torch.equal(loaded(inputs), want)
        assert torch.equal(on_load(inputs), want)
        weight = loaded.places.first.weight + 0
        plain = loaded.dequantize()
        assert type(plain.places.first) is nn.Conv2d
        assert torch.equal(plain.places.first.weight, weight)
        assert (plain(inputs) - want).norm() < 0.1 * want.norm()


def test_without_the_wish_they_stay_and_say_how_to_take_them(places: Places, inputs: Tensor) -> None:
    model = nn.Sequential(places, nn.Linear(35, 64)).eval()
    recipe = micromix.calibrate(model, [inputs], MicroMixConfig(policy="mxfp8", strict=True), progress=False)
    assert list(recipe.linears) == ["1"]
    why = "it is a convolution of kernel size 1, which is taken with convolutions=True"
    assert recipe.refused == dict.fromkeys(("0.first", "0.second", "0.third"), why)


def test_the_option_beside_a_recipe_drops_them_or_says_to_calibrate(places: Places, inputs: Tensor) -> None:
    model = nn.Sequential(places, nn.Linear(35, 64)).eval()
    off, recipe = [
        micromix.calibrate(model, [inputs], dataclasses.replace(NEAREST, convolutions=one)) for one in (False, True)
    ]
    assert (list(off.linears), len(recipe.linears)) == (["1"], 4)
    fewer = micromix.assign(recipe, dataclasses.replace(NEAREST, convolutions=False, strict=True))
    packed = micromix.quantize_(copy.deepcopy(model), fewer)
    assert [name for name, module in packed.named_modules() if isinstance(module, MicroMixLinear)] == ["1"]
    fast = torch.compile(model, backend="micromix", options={"recipe": recipe, "convolutions": False, "strict": True})
    with torch.no_grad():
        assert torch.allclose(fast(inputs), packed(inputs), atol=1e-5)
    assert list(micromix.recipe_of(model).linears) == ["1"]
    assert micromix.recipe_of(model).refused.items() > off.refused.items()
    with pytest.raises(ValueError, match="convolutions must be False for the recipe of Sequential, which leaves them"):
        micromix.assign(off, NEAREST)


@pytest.mark.parametrize("wanted", [False, True])
def test_a_function_s_convolutions_are_linears_on_request_too(wanted: bool, caplog: pytest.LogCaptureFixture) -> None:
    convolution, linear = nn.Conv1d(64, 64, 1).eval(), nn.Linear(64, 64).eval()
    options = {"policy": "mxfp8", "calibration_batches": 1, "strict": True, "convolutions": wanted}
    fast = torch.compile(lambda x: linear(convolution(x).mT), backend="micromix", options=options)
    with torch.no_grad(), caplog.at_level("WARNING", "micromix_compile"):
        fast(torch.randn(2, 64, 9))
    assert f"a function now runs quantized: {1 + wanted} linears" in caplog.text


@pytest.mark.parametrize(
    ("layer", "reason"),
    [
        (nn.Conv2d(8, 8, 1), None),
        (nn.Conv1d(8, 8, 1, dilation=2, padding="valid"), None),
        (nn.Conv2d(8, 8, (1, 3)), "it is a convolution with kernel_size (1, 3), not 1"),
        (nn.Conv1d(8, 8, 1, stride=2), "it is a convolution with stride (2,), not 1"),
        (nn.Conv2d(8, 8, 1, padding=(0, 1)), "it is a convolution with padding (0, 1), not 0"),
        (nn.Conv1d(8, 8, 1, groups=2), "it is a convolution with groups 2, not 1"),
        (nn.Conv3d(8, 8, 1), "it is a torch.nn.modules.conv.Conv3d, not an nn.Conv1d or nn.Conv2d"),
        (nn.ConvTranspose1d(8, 8, 1), "it is a torch.nn.modules.conv.ConvTranspose1d, not an nn.Conv1d or nn.Conv2d"),
    ],
)
def test_what_is_no_linear_at_each_place_is_refused_with_its_reason(layer: Any, reason: str | None) -> None:
    assert why_not_pointwise(layer) == reason


@pytest.mark.parametrize(
    ("call", "found"),
    [({}, 1), ({"padding": "same"}, 1), ({"dilation": 3}, 1), ({"stride": 2}, 0), ({"padding": (0, 1)}, 0)],
)
def test_a_weight_of_size_1_is_a_linear_only_where_it_is_used_as_one(call: dict[str, Any], found: int) -> None:
    session = Session(QUICK)
    session.passes = (find_linears,)  # type: ignore[attr-defined]
    net = nn.Sequential(nn.Conv2d(64, 32, 1)).eval()
    session.prepare(net)
    weight = net[0].weight
    _, context, _ = trace(lambda x: nn.functional.conv2d(x, weight, **call), torch.randn(2, 64, 3, 3), session=session)
    assert len(context.sites) == found


@pytest.mark.parametrize("wanted", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 5, 64), (8, 5, 64)])
def test_a_weight_of_that_shape_in_another_product_is_no_convolution(shape: tuple[int, ...], wanted: bool) -> None:
    session = Session(MicroMixConfig(convolutions=wanted))
    session.passes = (find_linears,)  # type: ignore[attr-defined]
    queries = nn.Parameter(torch.randn(8, 64, 1))
    _, context, _ = trace(lambda x: x @ queries, torch.randn(shape), session=session)
    assert not context.sites
    assert list(context.refusals.values()) == ["its weight has 3 dimensions, not 2"]


class Normed(nn.Module):
    """A linear and convolutions whose weights are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 64)
        self.line, self.plane = weight_norm(nn.Conv1d(64, 64, 1)), weight_norm(nn.Conv2d(64, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.plane(self.line(self.linear(x).mT)[..., None])


def test_convolutions_with_computed_weights_are_named_where_convolutions_are_wanted() -> None:
    x, reason = torch.randn(2, 8, 64), "its weight is computed in the graph, not a Parameter"
    recipe = micromix.calibrate(Normed().eval(), [x], QUICK, progress=False)
    assert list(recipe.linears) == ["linear"]
    assert recipe.refused == {f"{name}.parametrizations.weight.original1": reason for name in ("line", "plane")}
    unwanted = MicroMixConfig(policy="mxfp8-anchor", strict=True)
    assert not micromix.calibrate(Normed().eval(), [x], unwanted, progress=False).refused


class Added(nn.Module):
    """A convolution, one that is not reached, and a Parameter of such a shape that is only added."""

    def __init__(self) -> None:
        super().__init__()
        self.reached, self.unreached = nn.Conv1d(64, 64, 1), nn.Conv1d(64, 64, 1)
        self.table = nn.Parameter(torch.randn(8, 64, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.reached(x) + self.table[0]


def test_what_is_not_multiplied_is_taken_for_no_experts() -> None:
    model, x = Added().eval(), torch.randn(2, 64, 9)
    recipe = micromix.calibrate(model, [x], QUICK, progress=False)
    assert list(recipe.linears) == ["reached"]
    assert recipe.refused == {"unreached": "calibration did not reach it"}
    del model.unreached
    strict = dataclasses.replace(QUICK, strict=True)
    assert not micromix.calibrate(model, [x], strict, progress=False).refused


def test_a_packed_convolution_takes_one_example_and_refuses_other_shapes(places: Places, inputs: Tensor) -> None:
    net = nn.Sequential(nn.Conv1d(64, 32, 1)).eval()
    recipe = micromix.calibrate(net, [inputs.flatten(2)], QUICK, progress=False)
    packed = micromix.quantize_(net, recipe)[0]
    assert isinstance(packed, MicroMixConvolution)
    x = inputs.flatten(2)
    assert torch.equal(packed(x[0]), packed(x)[0])
    assert packed(x).is_contiguous()
    turned = x.mT.contiguous().mT
    assert packed(turned).is_contiguous() == nn.Conv1d(64, 32, 1)(turned).is_contiguous()
    with pytest.raises(ValueError, match=r"x must have 2 or 3 dimensions, got shape \(2, 64, 5, 7\)"):
        packed(inputs)
    with pytest.raises(ValueError, match=r"x must have 64 channels, got shape \(2, 35, 32\)"):
        packed(torch.randn(2, 32, 35))

"""`calibrate`: statistics as forward hooks see them, the model as it was, and refusals with reasons."""

from __future__ import annotations

import copy
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.compiled import assert_statistics_equal_hooks, batches, close, compiled_with
from support.models import Net, fake_quantized, make_net
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers.pytorch_utils import Conv1D

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from micromix_compile.recipe.types import ChannelCosts

pytestmark = [pytest.mark.versions, pytest.mark.usefixtures("fresh_compiler")]


@pytest.mark.parametrize("breaks", [False, True])
def test_statistics_equal_those_of_forward_hooks(breaks: bool) -> None:
    net, inputs = make_net(layers=3, breaks=breaks), batches(4)
    recipe = micromix.calibrate(net, inputs)
    assert sorted(recipe.linears) == sorted(f"layers.{i}.{name}" for i in range(3) for name in ("gate", "up", "down"))
    assert recipe.linears["layers.1.gate"].group is recipe.linears["layers.1.up"].group
    assert_statistics_equal_hooks(recipe, net, inputs)


def test_calibration_leaves_the_model_as_it_was() -> None:
    net = make_net(layers=1)
    before = copy.deepcopy(net.state_dict())
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = net(x)
        micromix.calibrate(net, batches())
        assert torch.equal(net(x), expected)
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


class Shifts(nn.Module):
    """A model that changes its inputs in place."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 32)

    def forward(self, x: Tensor, more: list[Tensor]) -> Tensor:
        return self.fc(x.add_(more[0].mul_(2)))


def test_what_is_run_twice_are_the_batches_as_they_came() -> None:
    model, given = Shifts().eval(), [(torch.randn(2, 8, 64), torch.randn(2, 8, 64)) for _ in range(2)]
    x, more = torch.empty(2, 8, 64), torch.empty(2, 8, 64)

    def refilled() -> Iterator[dict[str, Any]]:
        for one, other in given:
            yield {"x": x.copy_(one), "more": [more.copy_(other)]}

    def costs(batches: Iterable[Any], model: nn.Module) -> ChannelCosts:
        found = micromix.calibrate(model, batches, progress=False).linears["fc"].group.statistics.costs
        assert found is not None
        return found

    plain = costs([one + 2 * other for one, other in given], nn.Sequential(OrderedDict(fc=model.fc)).eval())
    got = costs(refilled(), model)
    torch.testing.assert_close(got.activations, plain.activations)
    torch.testing.assert_close(got.weights, plain.weights)


def test_batches_get_no_gradient_and_may_be_a_part_of_a_graph() -> None:
    model, leaf = nn.Sequential(nn.Linear(64, 32)).eval(), torch.randn(2, 8, 64, requires_grad=True)
    recipe = micromix.calibrate(model, [leaf, 2 * leaf], progress=False)
    assert recipe.linears["0"].group.statistics.tokens == 32
    assert leaf.grad is None
    with pytest.raises(TypeError, match=r"a batch that is run twice must be one that copy\.deepcopy copies: cannot"):
        micromix.calibrate(model, [{"input": leaf, "lock": threading.Lock()}], progress=False)


def test_in_inference_mode_the_same_recipe_and_an_ordinary_model_are_made() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32)).eval()
    want = micromix.calibrate(model, [torch.ones(2, 8, 64).cumsum(1)], progress=False)
    with torch.inference_mode():
        each = micromix.calibrate_each(model, [torch.ones(2, 8, 64).cumsum(1)], [MicroMixConfig()], progress=False)
        recipe = next(each)
        assert torch.is_inference_mode_enabled()
        assert list(each) == []
        micromix.quantize_(model, recipe)
    for name, packed in want.packed.items():
        assert all(torch.equal(one, other) for one, other in zip(packed, recipe.packed[name], strict=True))
    x = torch.randn(2, 64, requires_grad=True)
    model(x).sum().backward()
    assert x.grad is not None
    model.load_state_dict(model.state_dict())


class Sharing(nn.Module):
    """A model with a weight of others, that calls `pause` before it uses this."""

    def __init__(self, weight: nn.Parameter, pause: Callable[[], None]) -> None:
        super().__init__()
        self.own, self.shared = nn.Linear(64, 64), weight
        self.pause = torch.compiler.disable(pause)

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(x)
        self.pause()
        return nn.functional.linear(x, self.shared)


def test_models_that_share_a_parameter_are_calibrated_at_once_and_leave_no_gradient_on_it() -> None:
    """The second measures gradients when the first begins to, and goes on when that has ended."""
    weight, begun, ended = nn.Parameter(torch.randn(64, 64)), threading.Event(), threading.Event()

    def calibrate(model: nn.Module) -> None:
        micromix.calibrate(model, [torch.randn(4, 64)], MicroMixConfig(weight_rounding="nearest"), progress=False)

    def in_second() -> None:
        if torch.is_grad_enabled():
            begun.set()
            assert ended.wait(60)

    second = threading.Thread(target=calibrate, args=[Sharing(weight, in_second).eval()])

    def in_first() -> None:
        if torch.is_grad_enabled():
            second.start()
            assert begun.wait(60)

    calibrate(Sharing(weight, in_first).eval())
    assert not weight.requires_grad
    ended.set()
    second.join()
    assert weight.requires_grad
    assert weight.grad is None


@pytest.mark.parametrize("rounding", ["gptq", "nearest"])
def test_each_recipe_knows_the_weights_that_it_was_made_of(rounding: str) -> None:
    """The second is made of a weight that was changed after the first: it fits that, and no other."""
    model, config = nn.Sequential(nn.Linear(64, 32)).eval(), MicroMixConfig(policy="mxfp4", weight_rounding=rounding)
    recipes = micromix.calibrate_each(model, [torch.randn(4, 16, 64)], [config, config], progress=False)
    first = next(recipes)
    with torch.no_grad():
        model[0].weight.mul_(-2)
    second = next(recipes)
    known = [recipe.linears["0"].weight_checksums for recipe in (first, second)]
    assert [one is not None and one.fit(model[0].weight) for one in known] == [False, True]
    assert torch.equal(second.linears["0"].weight_sample, -2 * first.linears["0"].weight_sample)
    assert torch.equal(first.packed["0"].w4 ^ 0x88, second.packed["0"].w4)  # signs
    assert torch.equal(first.packed["0"].w_scale + 1, second.packed["0"].w_scale)


def test_conv1d_weights_are_calibrated_and_quantized() -> None:
    model = nn.Sequential(Conv1D(48, 64)).eval()
    recipe = micromix.calibrate(model, [torch.randn(2, 5, 64)])
    twin = fake_quantized(model, recipe)
    x = torch.randn(2, 9, 64)
    with torch.no_grad():
        assert close(compiled_with(model, recipe)(x), twin(x))
        assert close(micromix.quantize_(model, recipe)(x), twin(x))


def test_nan_in_calibration_names_layer_and_batch() -> None:
    net = make_net(layers=1)
    bad = torch.randn(2, 5, 64)
    bad[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"calibration batch 1: the input of layers.0.gate holds a NaN"):
        micromix.calibrate(net, [torch.randn(2, 5, 64), bad])


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Net is in training mode.*call model.eval\(\)"):
        micromix.calibrate(Net(), batches())
    with pytest.raises(BackendCompilerFailed, match="Net is in training mode"):
        torch.compile(Net(), backend="micromix")(torch.randn(2, 5, 64))


def test_a_model_without_linears_is_told_why() -> None:
    model = nn.Sequential(nn.Linear(64, 8)).eval()
    with pytest.raises(
        ValueError, match=r"Sequential has no linear layer to quantize \(0: its name matches skip='0'\)"
    ):
        micromix.calibrate(model, [torch.randn(2, 64)], MicroMixConfig(skip=("0",)))
    with pytest.raises(BackendCompilerFailed, match="weight: it is a convolution"):
        torch.compile(nn.Conv1d(1, 1, 1).eval(), backend="micromix")(torch.randn(1, 1, 4))


def test_no_batch_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration of Net reached no linear layer"):
        micromix.calibrate(make_net(layers=1), [])


@pytest.mark.parametrize("batch", [torch.randn(2, 5, 64), {"x": torch.randn(2, 5, 64)}])
def test_one_batch_instead_of_several_is_an_error(batch: object) -> None:
    with pytest.raises(TypeError, match=r"batches must be several tensors or mappings, put one \w+ into a list"):
        micromix.calibrate(make_net(layers=1), batch)  # type: ignore[arg-type]


def test_what_is_packed_is_not_packed_or_calibrated_again_and_takes_no_recipe() -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, batches())
    packed = micromix.quantize_(net, recipe)
    with pytest.raises(ValueError, match=r"Net is packed already: layers.0.gate is a MicroMixLinear"):
        micromix.quantize_(packed, recipe)
    with pytest.raises(ValueError, match="Net holds packed linears: calibrate the model that they were made from"):
        micromix.calibrate(packed, batches())
    for options, name in (({"recipe": recipe}, "recipe"), ({"strict": False, "policy": "mxfp4"}, "policy")):
        with pytest.raises(BackendCompilerFailed, match=f"on which the option {name} has no effect"):
            torch.compile(packed, backend="micromix", options=options)(torch.randn(2, 5, 64))


def test_a_batch_of_another_type_is_an_error() -> None:
    with pytest.raises(TypeError, match="a batch must be a tensor or a mapping of keyword arguments, got int"):
        micromix.calibrate(make_net(layers=1), [3])  # type: ignore[list-item]


def test_a_recipe_for_another_model_names_both() -> None:
    recipe = micromix.calibrate(make_net(layers=1), batches())
    x = torch.randn(2, 5, 64)
    with pytest.raises(BackendCompilerFailed, match=r"made for Net, and this model is Net: layers.0.gate has other"):
        compiled_with(make_net(layers=1), recipe)(x)
    wide = make_net(layers=1, hidden=128)
    with pytest.raises(ValueError, match=r"layers.0.gate is \(96, 64\) there and \(128, 64\) here"):
        micromix.quantize_(wide, recipe)
    other = nn.Sequential(nn.Linear(64, 64)).eval()
    with pytest.raises(BackendCompilerFailed, match=r"this model is Sequential: it has no layers\.0"):
        compiled_with(other, recipe)(x)

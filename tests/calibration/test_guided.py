"""Moments that gradients guide: against the formula, in recipes, and where there are none."""

from __future__ import annotations

import dataclasses
import logging
from typing import TYPE_CHECKING

import pytest
import torch
from support.models import Net, make_net
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.calibration.observer import ChannelObserver
from micromix_compile.config import MicroMixConfig
from micromix_compile.ops.pack import round_weights

if TYPE_CHECKING:
    from micromix_compile.numerics.layout import PackedWeight

GUIDED = MicroMixConfig(policy="mxfp4", activations="fp8", rotate="none")
PLAIN = dataclasses.replace(GUIDED, weight_rounding="gptq")


class Weighted(nn.Module):
    """A linear of whose tokens only those count that begin with a positive number, and one that counts nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(64, 96)
        self.unused = nn.Linear(64, 96)

    def forward(self, x: Tensor) -> Tensor:
        y = self.fc(x) + self.unused(2 * x).detach()
        return torch.where(x[..., :1] > 0, y, y.detach())


def differing(one: PackedWeight, other: PackedWeight) -> float:
    """Share of the bytes of MXFP4 weights."""
    return float((one.w4 != other.w4).float().mean())


@pytest.mark.usefixtures("fresh_compiler")
def test_weights_are_rounded_by_the_tokens_that_matter() -> None:
    model, x = Weighted().eval(), torch.randn(1, 64, 64)
    recipe = micromix.calibrate(model, [x], GUIDED, progress=False)
    assert recipe.config.weight_rounding == "guided"
    direction = torch.randn(1, 64, 96, generator=torch.Generator().manual_seed(GUIDED.seed))
    energy = direction.square().sum(-1)[0] * (x[0, :, 0] > 0)
    moments = {"fc": (x[0] * energy[:, None]).T @ x[0], "unused": torch.zeros(64, 64)}
    for name, moment in moments.items():
        weight, group = model.get_submodule(name).weight.detach(), recipe.linears[name].group
        want = round_weights({name: weight}, group, moment, recipe.config)[name]
        assert differing(recipe.packed[name], want) < 0.01  # sums in another order may turn a rounding
    plain = micromix.calibrate(model, [x], PLAIN, progress=False)
    assert differing(recipe.packed["fc"], plain.packed["fc"]) > 0.05


@pytest.mark.usefixtures("fresh_compiler")
def test_configs_of_one_calibration_are_rounded_each_by_its_own_moments() -> None:
    net, batches = make_net(layers=1), [torch.randn(2, 9, 64) for _ in range(3)]
    both = list(micromix.calibrate_each(net, batches, [PLAIN, GUIDED], progress=False))
    for config, recipe in zip((PLAIN, GUIDED), both, strict=True):
        alone = micromix.calibrate(net, batches, config, progress=False)
        assert recipe.config.weight_rounding == config.weight_rounding
        for name, packed in alone.packed.items():
            assert all(torch.equal(a, b) for a, b in zip(packed, recipe.packed[name], strict=True))
    assert both[0].packed["layers.0.up"].w4.ne(both[1].packed["layers.0.up"].w4).any()


class WithoutGradient(Net):
    """As a model whose forward pass stands under no_grad."""

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        with torch.no_grad():
            return super().forward(x, attention_mask)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("policy", ["mxfp4", "budget"])
def test_without_gradients_all_tokens_weigh_the_same(policy: str, caplog: pytest.LogCaptureFixture) -> None:
    net = WithoutGradient().eval()
    batches = [torch.randn(2, 9, 64) for _ in range(3)]
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        recipe = micromix.calibrate(net, batches, dataclasses.replace(GUIDED, policy=policy), progress=False)
    assert "has no usable gradient" in caplog.text
    assert recipe.config.weight_rounding == "gptq"
    assert micromix.assign(recipe, dataclasses.replace(GUIDED, policy=policy)).packed == recipe.packed
    plain = micromix.calibrate(net, batches, dataclasses.replace(PLAIN, policy=policy), progress=False)
    assert recipe.packed.keys() == plain.packed.keys()
    for name, packed in plain.packed.items():
        assert all(torch.equal(a, b) for a, b in zip(packed, recipe.packed[name], strict=True))
        assert recipe.linears[name].group.statistics.tokens == plain.linears[name].group.statistics.tokens


def test_gradients_that_float32_cannot_square_are_refused_by_name() -> None:
    observer = ChannelObserver("layers.0.up", 64, ())
    observer.update_guided(torch.ones(2, 64), torch.full((2,), 1e30).square())
    with pytest.raises(ValueError, match=r"outputs of layers\.0\.up are not finite.*weight_rounding='gptq'"):
        observer.moment_for("guided")

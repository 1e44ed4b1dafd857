"""Bars, and calibrations that are interrupted under them."""

from __future__ import annotations

import gc
import io
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.calibration.observer import ChannelObserver

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Terminal(io.StringIO):
    """Standard error that is one, or is not."""

    def __init__(self, *, is_one: bool) -> None:
        super().__init__()
        self._is_one = is_one

    def isatty(self) -> bool:
        return self._is_one


def stack() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 32)).eval()


@pytest.mark.parametrize("one_line", [False, True], ids=["calibrate", "one-line form"])
@pytest.mark.parametrize("is_one", [True, False], ids=["terminal", "file"])
def test_every_long_step_has_a_bar_with_labelled_times_on_a_terminal_only(
    is_one: bool, one_line: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    terminal = Terminal(is_one=is_one)
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    model, x = stack(), torch.randn(4, 64)
    if one_line:
        fast = torch.compile(model, backend="micromix", options={"calibration_batches": 2, "policy": "mxfp8"})
        with torch.no_grad():
            fast(x)
            fast(x)
    else:
        micromix.calibrate(model, [x, x])
    shown = terminal.getvalue()
    steps = ["micromix calibrates", "rounding weights"]
    if not one_line:
        steps = ["calibrating", "measuring sensitivity", "rounding weights"]
    assert [step in shown for step in steps] == [is_one] * len(steps)
    assert ("2/2" in shown and "elapsed," in shown and "left" in shown) == is_one


def test_a_bar_can_be_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(is_one=True)
    monkeypatch.setattr(sys, "stderr", terminal)
    micromix.calibrate(stack(), [torch.randn(4, 64)], progress=False)
    assert not terminal.getvalue()


class Interrupted(nn.Module):
    """A model whose linear has a name that no other test uses."""

    def __init__(self) -> None:
        super().__init__()
        self.interrupted, self.out = nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.interrupted(x).relu())


def live_observers() -> list[ChannelObserver]:
    gc.collect()
    found = [value for value in gc.get_objects() if type(value) is ChannelObserver]
    return [observer for observer in found if observer.name in ("interrupted", "out")]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_interrupted_calibration_lets_its_moments_go_and_can_be_begun_again(error: type[BaseException]) -> None:
    model, x, config = Interrupted().eval(), torch.randn(2, 9, 64), micromix.MicroMixConfig(weight_rounding="gptq")
    wanted = [parameter.requires_grad for parameter in model.parameters()]

    def batches() -> Iterator[Tensor]:
        yield x
        assert any(observer.moment is not None for observer in live_observers())
        raise error("enough")

    with pytest.raises(error, match="enough"):
        micromix.calibrate(model, batches(), config)
    assert not live_observers()
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    again = micromix.calibrate(model, [x], config)
    assert not live_observers()
    fresh = Interrupted().eval()
    fresh.load_state_dict(model.state_dict())
    expected = micromix.calibrate(fresh, [x], config)
    for fqn, linear in expected.linears.items():
        assert again.linears[fqn].split == linear.split
        assert torch.equal(again.linears[fqn].group.channel_perm, linear.group.channel_perm)
        assert all(map(torch.equal, again.packed[fqn], expected.packed[fqn]))


class InterruptedBackward(Interrupted):
    """Interrupted where sensitivity is measured."""

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            stop()
        return super().forward(x)


@torch.compiler.disable
def stop() -> None:
    raise KeyboardInterrupt("enough")


def test_an_interrupted_measurement_of_sensitivity_lets_go_too() -> None:
    model, x = InterruptedBackward().eval(), torch.randn(2, 9, 64)
    with pytest.raises(KeyboardInterrupt, match="enough"):
        micromix.calibrate(model, [x])
    assert not live_observers()
    assert not x.requires_grad
    assert all(parameter.requires_grad for parameter in model.parameters())

"""Parts of a Parameter that are linears of their own: calibrated, compiled, watched, kept in recipes, named."""

from __future__ import annotations

import collections
import dataclasses
import logging
import re
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig
from micromix_compile.passes.pre_grad.find_linears import BOTH_WAYS
from micromix_compile.recipe.parts import Part, gaps, split_name

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.versions
functional = nn.functional

QUICK = MicroMixConfig(policy="mxfp8-anchor", skip=())


class Joint(nn.Module):
    """Queries, keys and values of one Parameter, cut three ways, and columns of another."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv_weight = nn.Parameter(torch.randn(3 * 64, 64) / 8)
        self.bias = nn.Parameter(torch.randn(3 * 64))
        self.out_weight = nn.Parameter(torch.randn(64, 96) / 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = functional.linear(x, self.qkv_weight[:64], self.bias[:64])
        k, v = self.qkv_weight[64:].chunk(2)
        h = q + functional.linear(y, k, self.bias[64:128]) + y @ v.T
        return h @ self.out_weight[:, 32:]


class Apart(nn.Module):
    """The same of linears."""

    def __init__(self, joint: Joint) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
        self.out = nn.Linear(64, 64, bias=False)
        with torch.no_grad():
            for linear, weight in zip((self.q, self.k, self.v), joint.qkv_weight.split(64), strict=True):
                linear.weight.copy_(weight)
            self.q.bias.copy_(joint.bias[:64])
            self.k.bias.copy_(joint.bias[64:128])
            self.out.weight.copy_(joint.out_weight[:, 32:].T)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.out(self.q(x) + self.k(y) + self.v(y))


PARTS = {
    "qkv_weight[0:64]": "q", "qkv_weight[64:128]": "k", "qkv_weight[128:192]": "v", "out_weight[:, 32:96]": "out",
}  # fmt: skip


def batch() -> dict[str, Tensor]:
    return {"x": torch.randn(2, 9, 64), "y": torch.randn(2, 9, 64)}


def test_parts_of_a_weight_run_as_linears_of_their_own(tmp_path: Path) -> None:
    joint, inputs = Joint().eval(), batch()
    apart = Apart(joint).eval()
    recipe = micromix.calibrate(joint, [inputs], QUICK, progress=False)
    assert set(recipe.linears) == set(PARTS)
    assert recipe.refused == {"out_weight[:, 0:32]": "calibration did not reach it"}
    assert recipe.left_alone == (3 * 64 + 64 * 32, 4 * (3 * 64 + 64 * 32))
    assert recipe.parameters + recipe.left_alone[0] == sum(parameter.numel() for parameter in joint.parameters())
    assert recipe.linears["qkv_weight[64:128]"].group is recipe.linears["qkv_weight[128:192]"].group
    recipe.save(tmp_path / "recipe")
    same = micromix.calibrate(apart, [inputs], QUICK, progress=False)
    with torch.no_grad():
        other = torch.compile(apart, backend="micromix", options={"recipe": same})
        want = other(**inputs)
        for source in (recipe, tmp_path / "recipe"):
            fast = torch.compile(joint, backend="micromix", options={"recipe": source, "strict": True})
            assert torch.equal(fast(**inputs), want)
        assert 0 < (want - apart(**inputs)).norm() < 0.1 * want.norm()
        joint.qkv_weight[70:80] *= 2
        apart.k.weight[6:16] *= 2
        assert torch.equal(fast(**inputs), other(**inputs))
        assert not torch.equal(other(**inputs), want)
        for model in (joint, apart):
            model.load_state_dict({name: 2 * value for name, value in model.state_dict().items()}, assign=True)
        assert torch.equal(fast(**inputs), other(**inputs))


class Cut(nn.Module):
    """Some rows of a weight, and all of it."""

    def __init__(self) -> None:
        super().__init__()
        self.fc, self.rows = nn.Linear(64, 96), slice(0, 64)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, self.fc.weight[self.rows]).sum(-1) + self.fc(x).sum(-1)


def test_parts_that_overlap_are_packed_each_for_itself() -> None:
    net, x = Cut().eval(), torch.randn(7, 64)
    recipe = micromix.calibrate(net, [x], MicroMixConfig(policy="mxfp8"), progress=False)
    assert list(recipe.linears) == ["fc", "fc[0:64]"]
    assert len(recipe.groups) == 1
    assert recipe.left_alone == (96, 4 * 96)
    fast = torch.compile(net, backend="micromix", options={"recipe": recipe, "strict": True})
    with torch.no_grad():
        assert 0 < (fast(x) - net(x)).abs().max() < 1
    assert set(micromix.quantize_(net, recipe).micromix_refused) == {"fc[0:64]"}
    assert type(net.fc).__name__ == "MicroMixLinear"


def test_rows_and_columns_of_one_weight_are_not_both_linears() -> None:
    class Crossing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(64, 96))

        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x, self.weight[:32]).sum() + (x[:, :64] @ self.weight[:, 72:]).sum()

    recipe = micromix.calibrate(Crossing().eval(), [torch.randn(7, 96)], QUICK, progress=False)
    (name,) = recipe.linears
    assert name.endswith("[0:32]")
    assert set(recipe.refused.values()) == {BOTH_WAYS, "calibration did not reach it"}
    assert recipe.parameters + recipe.left_alone[0] == 64 * 96


def test_a_part_that_calibration_did_not_reach_is_named_or_an_error(caplog: pytest.LogCaptureFixture) -> None:
    net, x = Cut().eval(), torch.randn(7, 64)
    recipe = micromix.calibrate(net, [x], QUICK, progress=False)
    net.rows = slice(32, 64)
    reason = r"fc[32:64] has a recipe and runs unquantized in a part of the model: calibration did not reach this part"
    with torch.no_grad():
        torch.compile(net, backend="micromix", options={"recipe": recipe})(x)
        assert reason in caplog.text
        with pytest.raises(BackendCompilerFailed, match=re.escape(f"strict=True: {reason}")):
            torch.compile(net, backend="micromix", options={"recipe": recipe, "strict": True})(x)


def test_parts_of_another_models_weight_are_an_error() -> None:
    net, x = Joint().eval(), batch()
    recipe = micromix.calibrate(net, [x], QUICK, progress=False)
    with torch.no_grad():
        net.qkv_weight[130] += 1
        net.qkv_weight = nn.Parameter(net.qkv_weight.detach().flip(0))
    with pytest.raises(ValueError, match=r"qkv_weight\[0:64\] has other weights here"):
        micromix.quantize_(net, recipe)
    with pytest.raises(BackendCompilerFailed, match=r"qkv_weight\[0:64\] has other weights here"), torch.no_grad():
        torch.compile(net, backend="micromix", options={"recipe": recipe})(**x)


def test_a_model_with_parts_converts_itself_and_runs_inside_another(caplog: pytest.LogCaptureFixture) -> None:
    inputs, inner = batch(), Joint().eval()
    fast = torch.compile(inner, backend="micromix", options={"calibration_batches": 1, "policy": "mxfp8"})
    with torch.no_grad(), caplog.at_level(logging.WARNING, "micromix_compile"):
        fast(**inputs)
        assert "calibrated on 1 batches; Joint now runs quantized: 4 linears" in caplog.text
        assert "were not reached" not in caplog.text
        want, recipe = fast(**inputs), micromix.recipe_of(inner)

        class Outer(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = inner

            def forward(self, x: Tensor, y: Tensor) -> Tensor:
                return self.inner(x, y)

        outer = torch.compile(Outer().eval(), backend="micromix", options={"recipe": recipe, "strict": True})
        assert torch.equal(outer(**inputs), want)


def test_a_skipped_weight_s_parts_stay_and_a_part_alone_can_be_skipped() -> None:
    inputs, joint = batch(), Joint().eval()
    configs = [MicroMixConfig(policy="mxfp8", skip=skip) for skip in ((), ("qkv_weight",))]
    whole, recipe = micromix.calibrate_each(joint, [inputs], configs, progress=False)
    assert (set(whole.linears), list(recipe.linears)) == (set(PARTS), ["out_weight[:, 32:96]"])
    assert list(micromix.assign(whole, configs[1]).linears) == list(recipe.linears)
    options = {"recipe": whole, "skip": ["qkv_weight"], "strict": True}
    with torch.no_grad():
        fast = torch.compile(joint, backend="micromix", options=options)(**inputs)
        assert torch.equal(fast, torch.compile(joint, backend="micromix", options={"recipe": recipe})(**inputs))
    config = MicroMixConfig(policy="mxfp8", skip=("qkv_weight[[]0:64]",), strict=False)
    recipe = micromix.calibrate(joint, [inputs], config, progress=False)
    assert set(recipe.linears) == set(PARTS) - {"qkv_weight[0:64]"}
    assert recipe.refused["qkv_weight[0:64]"] == "its name matches skip='qkv_weight[[]0:64]'"


@given(st.data())
def test_what_lies_between_parts_and_the_parts_are_the_whole(data: st.DataObject) -> None:
    size, dim = data.draw(st.integers(1, 40)), data.draw(st.integers(0, 1))
    ends = st.tuples(st.integers(0, size), st.integers(0, size)).filter(lambda pair: pair[0] < pair[1])
    parts = [Part(dim, *pair) for pair in data.draw(st.lists(ends, min_size=1, max_size=5))]
    left = gaps(parts, size)
    covered = {place for part in parts for place in range(part.start, part.stop)}
    free = [place for part in left for place in range(part.start, part.stop)]
    assert free == sorted(set(range(size)) - covered)
    assert all(part.dim == dim and part.size for part in left)
    weight = torch.arange(size * size).reshape(size, size)
    for part in (*parts, *left):
        assert split_name(f"a.b{part}") == ("a.b", part)
        assert part.fits(weight)
        assert torch.equal(part.of(weight), eval(f"weight{part}"))
    assert not Part(dim, 0, size + 1).fits(weight)


@pytest.mark.parametrize("name", ["fc", "fc.0", "fc[0]", "fc[:, 0]", "[0:1]", "fc (computed)", "fc[0:1].weight"])
def test_other_names_name_no_part(name: str) -> None:
    assert split_name(name) == (name, None)


class FirstRows(nn.Module):
    """Some rows of a weight are multiplied by, the others never."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.proj = nn.Linear(64, 64), nn.Linear(64, 128, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(self.first(x), self.proj.weight[:96])


@pytest.mark.parametrize("skip", ["proj[96:128]", "proj"])
def test_rows_that_nothing_reads_can_be_left_alone_by_the_name_that_the_error_has(skip: str) -> None:
    model, x = FirstRows().eval(), torch.randn(4, 64)
    config = micromix.MicroMixConfig(weight_rounding="nearest", strict=True)
    with pytest.raises(ValueError, match=r"proj\[96:128\]: calibration did not reach it"):
        micromix.calibrate(model, [x], config, progress=False)
    recipe = micromix.calibrate(model, [x], dataclasses.replace(config, skip=(skip,)), progress=False)
    assert set(recipe.linears) == ({"first"} if skip == "proj" else {"first", "proj[0:96]"})


def test_parts_of_a_weight_that_the_recipe_does_not_know_are_named_or_an_error() -> None:
    model, x = FirstRows().eval(), torch.randn(4, 64)
    config = micromix.MicroMixConfig(weight_rounding="nearest")
    alone = nn.Sequential(collections.OrderedDict(first=model.first)).eval()
    recipe = micromix.calibrate(alone, [x], config, progress=False)
    strict = torch.compile(model, backend="micromix", options={"recipe": recipe, "strict": True})
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=r"proj\[0:96\]: the recipe of .* has no such"):
        strict(x)

"""Parts of a Parameter that are linears of their own: calibrated, compiled, watched, kept in recipes, named."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor, nn

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

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
    joint, given = Joint().eval(), batch()
    apart = Apart(joint).eval()
    recipe = micromix.calibrate(joint, [given], QUICK, progress=False)
    assert set(recipe.linears) == set(PARTS)
    assert recipe.refused == {"out_weight[:, 0:32]": "calibration did not reach it"}
    assert recipe.left_alone == (3 * 64 + 64 * 32, 4 * (3 * 64 + 64 * 32))
    assert recipe.model_parameters == sum(parameter.numel() for parameter in joint.parameters())
    assert recipe.linears["qkv_weight[64:128]"].group is recipe.linears["qkv_weight[128:192]"].group
    recipe.save(tmp_path / "recipe")
    same = micromix.calibrate(apart, [given], QUICK, progress=False)
    with torch.no_grad():
        want = torch.compile(apart, backend="micromix", options={"recipe": same})(**given)
        for source in (recipe, tmp_path / "recipe"):
            fast = torch.compile(joint, backend="micromix", options={"recipe": source, "strict": True})
            assert torch.equal(fast(**given), want)
        assert 0 < (want - apart(**given)).norm() < 0.1 * want.norm()
        joint.qkv_weight[70:80] *= 2
        apart.k.weight[6:16] *= 2
        changed = torch.compile(apart, backend="micromix", options={"recipe": same})(**given)
        assert torch.equal(fast(**given), changed)
        assert not torch.equal(changed, want)

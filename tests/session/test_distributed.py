"""Models that are spread over processes are refused by name. One process is enough to have them."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import micromix_compile as micromix
from micromix_compile.config import MicroMixConfig

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

pytestmark = pytest.mark.usefixtures("fresh_compiler")

NEAREST = MicroMixConfig(policy="mxfp6", weight_rounding="nearest", scale_search=False)


@pytest.fixture(scope="module")
def mesh(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DeviceMesh]:
    path: Path = tmp_path_factory.mktemp("store") / "store"
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def make_model() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64)).eval()


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})


def sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return fully_shard(model, mesh=mesh)


def data_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    return DistributedDataParallel(model).eval()


@pytest.mark.parametrize(
    ("spread", "reason"),
    [
        (tensor_parallel, r"its weight 0\.weight \(96, 64\) is a DTensor \(tensor parallel or FSDP2\)"),
        (sharded, "can't be quantized under FSDPModule"),
        (data_parallel, r"DistributedDataParallel can't be quantized under DistributedDataParallel"),
    ],
)
def test_spread_models_are_refused_by_name(
    spread: Callable[[nn.Module, DeviceMesh], nn.Module], reason: str, mesh: DeviceMesh
) -> None:
    x, plain = torch.randn(2, 64), make_model()
    recipe = micromix.calibrate(plain, [x], NEAREST)
    model = spread(copy.deepcopy(plain), mesh)
    with pytest.raises(ValueError, match=reason):
        micromix.calibrate(model, [x], NEAREST)
    for options in ({}, {"recipe": recipe}):
        with pytest.raises((BackendCompilerFailed, ValueError), match=reason):
            torch.compile(model, backend="micromix", options=options)(x)
    with pytest.raises(ValueError, match=reason):
        micromix.quantize_(model, recipe)


def test_a_compiled_model_inside_data_parallel_is_refused(mesh: DeviceMesh) -> None:
    compiled = torch.compile(make_model(), backend="micromix")
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match="under DistributedDataParallel"):
        data_parallel(compiled, mesh)(torch.randn(2, 64))  # type: ignore[arg-type]


def test_a_graph_that_data_parallel_splits_is_refused(mesh: DeviceMesh) -> None:
    """The model was compiled alone before; weights of two megabytes make buckets of their own."""
    model = nn.Sequential(nn.Linear(512, 1024), nn.Linear(1024, 512)).eval()
    compiled = torch.compile(model, backend="micromix")
    with torch.no_grad():
        compiled(torch.randn(2, 512))
        wrapped = DistributedDataParallel(compiled, bucket_cap_mb=1).eval()  # type: ignore[arg-type]
        with pytest.raises(BackendCompilerFailed, match="inputs are fake tensors, as DistributedDataParallel's"):
            wrapped(torch.randn(2, 5, 512))

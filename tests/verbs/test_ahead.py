"""Packed models in files: exported, as a package of AOTInductor, and what `aot_compile` makes of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.llama import calls_of
from support.models import EXACT_DTYPE, make_net
from support.targets import FOLDING, served_by
from torch import Tensor, nn
from torch.torch_version import TorchVersion

import micromix_compile as micromix
from micromix_compile.lowering.torch_private import packages
from micromix_compile.verbs.ahead import AheadGraph

pytestmark = pytest.mark.usefixtures("fresh_compiler")

TESTS = Path(__file__).parents[1]
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=pytest.mark.gpu)]
LINEARS = 2 * 3
"""Packed ones of `make_net`, whose head is skipped."""
X = torch.linspace(-3, 3, 5 * 64).reshape(5, 64)


def packed_net(dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> nn.Module:
    net = make_net(dtype).to(device)
    config = micromix.MicroMixConfig(weight_rounding="nearest", **options)
    return micromix.quantize_(net, micromix.calibrate(net, [X.to(device, dtype)], config, progress=False))


def ahead(net: nn.Module, x: Tensor, **options: Any) -> Any:
    """What aot_compile makes for a file. torch 2.11 has it behind a setting only."""
    dynamo: Any = torch._dynamo.config
    with torch.no_grad(), dynamo.patch(enable_aot_compile=True):
        return torch.compile(net, backend="micromix", fullgraph=True, options=options).forward.aot_compile(((x,), {}))


def run_in_a_fresh_process(folder: Path, *jobs: dict[str, Any]) -> tuple[list[Tensor], list[Any]]:
    """What the files compute, and what that process imported."""
    path = folder / "jobs"
    torch.save(jobs, path)
    paths = [str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-m", "support.run_packages", path], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return torch.load(f"{path}.out"), json.loads(done.stdout.splitlines()[-1])


@pytest.mark.versions
@pytest.mark.filterwarnings("ignore:No complete tensor found")  # torch's own, of tensors on a CPU
@pytest.mark.parametrize("device", DEVICES)
def test_a_packed_model_in_a_file_runs_in_a_fresh_process(tmp_path: Path, device: str) -> None:
    """A function of aot_compile has no weights: whoever calls it hands it the model."""
    net, x = packed_net(EXACT_DTYPE, device), X.to(device, EXACT_DTYPE)
    exported, function = str(tmp_path / "exported.pt2"), str(tmp_path / "function")
    ahead(net, x, exact=True).save_compiled_function(function)
    with torch.no_grad():
        torch.export.save(torch.export.export(net, (x,)), exported)
        expected = net(x)
    jobs = [
        {"kind": "exported", "file": exported, "inputs": (x,)},
        {"kind": "function", "file": function, "inputs": (x,), "model": net},
    ]
    outputs, (imported, has_transformers) = run_in_a_fresh_process(tmp_path, *jobs)
    assert torch.equal(outputs[0], expected)
    assert torch.equal(outputs[1], expected)
    assert {"verbs", "session", "passes"}.isdisjoint(imported)
    assert not has_transformers


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_a_function_for_a_gpu_runs_in_a_fresh_process(tmp_path: Path, mode: str) -> None:
    """In bfloat16 with FP8 activations, which sm_90 folds: it makes what its products read beside packed weights."""
    net, x = packed_net(torch.bfloat16, "cuda", activations="fp8"), X.cuda().bfloat16()
    function = str(tmp_path / "function")
    ahead(net, x, mode=mode).save_compiled_function(function)
    with torch.no_grad():
        expected = torch.compile(net, backend="micromix")(x)
    outputs, _ = run_in_a_fresh_process(tmp_path, {"kind": "function", "file": function, "inputs": (x,), "model": net})
    assert torch.equal(outputs[0], expected)


OLD = TorchVersion(torch.__version__) < packages.FIRST


@pytest.mark.versions
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of torch's copy of an exported program
def test_a_torch_whose_packages_change_dtypes_is_refused_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = packed_net()
    with torch.no_grad():
        exported = torch.export.export(net, (X,))
        if not OLD:
            monkeypatch.setattr(torch, "__version__", "2.11.0")
        with pytest.raises(Exception, match=r"packages of AOTInductor need torch 2\.12 or newer, this is 2\.11"):
            torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "model.pt2"))
    assert not list(tmp_path.iterdir())


@pytest.mark.deep  # Inductor's C++ for a package takes half a minute
@pytest.mark.skipif(OLD, reason="this torch is refused a package, which the test above holds")
@pytest.mark.filterwarnings("ignore:No complete tensor found")
@pytest.mark.filterwarnings("ignore:.*LeafSpec")  # of torch's copy of an exported program
@pytest.mark.parametrize("device", DEVICES)
def test_a_package_of_aotinductor_runs_in_a_fresh_process(tmp_path: Path, device: str) -> None:
    net, x = packed_net(torch.float32, device), X.to(device)
    package = str(tmp_path / "model.pt2")
    with torch.no_grad():
        exported = torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim("rows", min=2, max=64)},))
        torch._inductor.aoti_compile_and_package(exported, package_path=package)
        expected = [net(x), net(x[:3])]
    jobs = [{"kind": "package", "file": package, "inputs": (rows,)} for rows in (x, x[:3])]
    outputs, _ = run_in_a_fresh_process(tmp_path, *jobs)
    for actual, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(actual, wanted)


def test_code_for_a_file_runs_our_operations_and_makes_what_they_fold() -> None:
    """What Hopper's products read beside the packed weights is made where the file is loaded, once."""
    net, x = packed_net(torch.bfloat16, activations="fp8"), X.bfloat16()
    with served_by(FOLDING), torch.no_grad():
        function = ahead(net, x)
        graph = function._artifacts.compiled_fn
        again = AheadGraph.deserialize_compile_artifacts(AheadGraph.serialize_compile_artifacts(graph))
        function._artifacts.compiled_fn = again
        loaded = type(function)(function._artifacts)
        fast = torch.compile(net, backend="micromix")
        assert torch.equal(loaded(net, x), fast(x))
        calls = calls_of(lambda: loaded(net, x))
        assert calls == calls_of(lambda: fast(x))
    assert calls["micromix::folded_mm"]


def test_what_a_file_cannot_hold_is_refused() -> None:
    net = make_net()
    recipe = micromix.calibrate(net, [X], micromix.MicroMixConfig(weight_rounding="nearest"), progress=False)
    for options in ({}, {"recipe": recipe}):
        with pytest.raises(ValueError, match="aot_compile takes a model that quantize_ has packed, Net holds plain"):
            ahead(net, X, **options)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_default_backend"), reason="torch 2.11 has no set_default_backend")
def test_micromix_can_be_the_default_backend() -> None:
    net = packed_net()
    torch.compiler.set_default_backend("micromix")
    try:
        fast = torch.compile(net)
        with torch.no_grad():
            fast(X)
            calls = calls_of(lambda: fast(X))
    finally:
        torch.compiler.set_default_backend(None)
    assert calls["micromix::mixed_mx_mm"] == LINEARS

"""What vLLM finds of us, which versions of it can run packed checkpoints, and that nothing of it is imported before."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from support.vllm_jobs import environment

from micromix_compile.integrations.vllm import plugin


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.32.0", True), ("0.32.1rc1", True), ("0.33.0+cpu", True), ("1.0", True), ("0.31.9", False), ("0.9.2", False)],
)
def test_a_vllm_that_is_too_old_is_told_both_versions(version: str, fits: bool) -> None:
    wanted = None if fits else f"packed checkpoints need vLLM 0.32 or newer, this is {version}"
    assert plugin.why_not(version) == wanted


def test_vllm_finds_the_plugin_and_it_imports_nothing_of_vllm() -> None:
    project = tomllib.loads((Path(__file__).parents[3] / "pyproject.toml").read_text("utf-8"))["project"]
    module, _, name = project["entry-points"]["vllm.general_plugins"]["micromix"].partition(":")
    code = f"import sys, {module} as plugin; print(callable(plugin.{name}), 'vllm' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


OTHER_VERSION = """
import logging
from micromix_compile.integrations.vllm import plugin
logging.basicConfig(level=logging.WARNING)
plugin.installed_version = lambda: "{version}"
plugin.register()
from vllm.model_executor.layers.quantization import get_quantization_config
config = get_quantization_config("micromix")
try:
    config.from_config({{}})
except ValueError as error:
    print("refused:", error)
"""


@pytest.mark.usefixtures("vllm")
def test_other_versions_of_vllm_say_so_where_a_packed_checkpoint_is_loaded() -> None:
    said = {}
    for version in ("0.31.0", "0.99.0"):
        command = [sys.executable, "-c", OTHER_VERSION.format(version=version)]
        done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
        said[version] = done.stdout + done.stderr
    assert "refused: packed checkpoints need vLLM 0.32 or newer, this is 0.31.0" in said["0.31.0"]
    assert "packed checkpoints were tested with vLLM 0.32, this is 0.99.0" in said["0.99.0"]
    assert "refused: quantization_config.schema_version must be 1 or 2, got None" in said["0.99.0"]

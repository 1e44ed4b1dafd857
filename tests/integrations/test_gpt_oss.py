"""gpt-oss's experts, weights in MXFP4 that a layer keeps as one tensor, become packed ones of the same values."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.experts import model_of_experts
from support.llama import calls_of
from support.others import edit_config, logits, write_gpt_oss
from transformers import AutoModelForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import micromix_compile as micromix

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

EXPERTS = "model.layers.0.mlp.experts"
NAMES = ("gate_up_proj", "down_proj")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("gpt_oss") / "theirs"
    write_gpt_oss(directory)
    return directory


def dequantized(experts: micromix.MicroMixExperts, name: str) -> Tensor:
    """(E, K, N) float32, as gpt-oss keeps its weights."""
    packed, layout = experts.packed(name), experts.layouts[name]
    order = experts.get_buffer(f"{name}_order.channel_perm")
    each = [
        torch.ops.micromix.dequantize_weight(*one, order, order.numel(), layout.fp6, 0, torch.float32)
        for one in zip(*packed, strict=True)
    ]
    return torch.stack(each).mT


def test_weights_are_those_that_transformers_dequantizes(theirs: Path, tmp_path: Path) -> None:
    """Bit for bit, by its function and in the model that it loads; all else is what was stored."""
    text = micromix.convert(theirs, tmp_path / "packed", activations="fp8")
    assert text == "2 linears, 2 mxfp4 of experts; activations fp8, as was asked for"
    stored = load_file(theirs / "model.safetensors")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    reference = AutoModelForCausalLM.from_pretrained(theirs).get_submodule(EXPERTS)
    for name in NAMES:
        parts = [stored[f"{EXPERTS}.{name}_{part}"] for part in ("blocks", "scales")]
        found = dequantized(ours.get_submodule(EXPERTS), name)
        assert torch.equal(found, convert_moe_packed_tensors(*parts, dtype=torch.float32))
        assert torch.equal(found, reference.get_parameter(name).float())
    state = ours.state_dict()
    plain = {name: tensor for name, tensor in stored.items() if not name.endswith(("_blocks", "_scales"))}
    assert all(torch.equal(state[name], tensor) for name, tensor in plain.items())


@pytest.mark.parametrize(("named", "mode", "k8"), [("fp8", "fp8", 0), ("mxfp8", "same", 64)])
def test_experts_run_in_4_bits_whatever_activations_are_asked_for(theirs: Path, named: str, mode: str, k8: int) -> None:
    """The model is near the one that transformers runs."""
    model = micromix.load_converted(theirs, activations=named, dtype=torch.float32)
    experts = model.get_submodule(EXPERTS)
    layout = experts.layouts["gate_up_proj"]
    assert (layout.activations, layout.k8, experts.gate_up_proj_q4.shape) == (mode, k8, (4, 192, 32))
    expected = logits(AutoModelForCausalLM.from_pretrained(theirs, dtype=torch.float32))
    assert (logits(model) - expected).norm() < 0.05 * expected.norm()


def test_experts_compile_to_grouped_products(theirs: Path) -> None:
    mlp = micromix.load_converted(theirs, activations="fp8", dtype=torch.float32).model.layers[0].mlp
    compiled, x = torch.compile(mlp, backend="micromix"), torch.randn(1, 6, 64)
    with torch.no_grad():
        expected, found = mlp(x)[0], compiled(x)[0]
        calls = calls_of(lambda: compiled(x))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    assert calls["micromix::grouped_mx_mm"] == 2


def test_activations_must_be_named_for_the_checkpoint_says_nothing_of_them(theirs: Path, tmp_path: Path) -> None:
    message = rf"{EXPERTS}.gate_up_proj: the checkpoint says of its activations: no quantization \(weight-only\); .*fp8"
    with pytest.raises(ValueError, match=message):
        micromix.convert(theirs, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


def test_packed_experts_are_not_written_as_compressed_tensors(theirs: Path, tmp_path: Path) -> None:
    micromix.convert(theirs, tmp_path / "packed", activations="same")
    with pytest.raises(ValueError, match=rf"{EXPERTS}.\w+_proj: packed experts, .*, are not written"):
        micromix.convert(tmp_path / "packed", tmp_path / "back")


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "scales of NaN": (
        lambda t: t[f"{EXPERTS}.down_proj_scales"][1, 2, 0:1].fill_(255),
        "down_proj_scales must be 0 to 254, got 255",
    ),
    "no scales": (lambda t: t.pop(f"{EXPERTS}.down_proj_scales"), "there is no tensor .*down_proj_scales"),
    "no blocks": (lambda t: t.pop(f"{EXPERTS}.down_proj_blocks"), "tensor .*down_proj_scales .* belongs to nothing"),
    "another shape": (
        lambda t: t.update({f"{EXPERTS}.down_proj_blocks": t[f"{EXPERTS}.down_proj_blocks"].flatten(2)}),
        r"down_proj_blocks must be U8 \(4, 64, 3, 16\), got U8 \(4, 64, 48\)",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_do_not_fit_are_refused_by_name(
    theirs: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    tensors = load_file(theirs / "model.safetensors")
    damage(tensors)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_bytes((theirs / "config.json").read_bytes())
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=message) as error:
        micromix.convert(broken, tmp_path / "packed", activations="fp8")
    assert str(broken) in str(error.value)


def test_a_checkpoint_without_blocks_of_experts_holds_nothing_to_convert(tmp_path: Path) -> None:
    model_of_experts("gpt_oss").save_pretrained(tmp_path / "plain")
    edit_config(tmp_path / "plain", lambda config: config.update(quantization_config={"quant_method": "mxfp4"}))
    with pytest.raises(ValueError, match="names no linear of GptOssForCausalLM"):
        micromix.convert(tmp_path / "plain", tmp_path / "packed")

"""Packed checkpoints are whole or refused, and a loader that does not know them is stopped."""

from __future__ import annotations

import copy
import json
import logging
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from support.models import make_net
from transformers import AutoModelForCausalLM, LlamaConfig

import micromix_compile as micromix
from micromix_compile.integrations import checkpoint
from micromix_compile.numerics import packing

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor, nn

pytestmark = pytest.mark.versions

WEIGHTS = "model.safetensors"
UP, GATE = "model.layers.0.mlp.up_proj", "model.layers.0.mlp.gate_proj"
IDS = torch.arange(16).reshape(2, 8)


def packed_llama(**options: object) -> torch.nn.Module:
    """A packed Llama of one layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = LlamaConfig(**sizes, num_hidden_layers=1, vocab_size=64, attention_bias=True)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    wanted = micromix.MicroMixConfig(weight_rounding="nearest", **options)  # type: ignore[arg-type]
    return micromix.quantize_(model, micromix.calibrate(model, [IDS], wanted))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of one whose activations are split like its weights."""
    directory = tmp_path_factory.mktemp("packed")
    packed_llama(activations="same", rotate="none").save_pretrained(directory)
    return directory


@pytest.fixture
def packed(original: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(original, tmp_path / "copy"))


def logits(directory: Path, **options: object) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(directory, **options)
    with torch.no_grad():
        result: Tensor = model(IDS).logits
    return result


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def edit_config(directory: Path, edit: Callable[[dict[str, object]], object]) -> None:
    config = json.loads((directory / "config.json").read_text("utf-8"))
    edit(config)
    (directory / "config.json").write_text(json.dumps(config), "utf-8")


def swap(tensors: dict[str, Tensor], a: str, b: str) -> None:
    tensors[a], tensors[b] = tensors[b], tensors[a]


def flip(tensor: Tensor) -> None:
    tensor.view(torch.uint8).view(-1)[3] ^= 1


DAMAGES = {
    "a flipped bit of a packed weight": (lambda t: flip(t[f"{UP}.weight_q4"]), f"{UP}.weight_q4 was changed"),
    "a flipped bit of a scale": (lambda t: flip(t[f"{UP}.weight"]), f"{UP}.weight was changed"),
    "a flipped bit of a norm": (lambda t: flip(t["model.norm.weight"]), "model.norm.weight was changed"),
    "a flipped bit of an embedding": (lambda t: flip(t["model.embed_tokens.weight"]), "tokens.weight was changed"),
    "another order": (lambda t: t[f"{UP}.order.channel_perm"].copy_(torch.arange(64)), "channel_perm was changed"),
    "a missing tensor": (lambda t: t.pop(f"{UP}.weight_q8"), f"{UP}.weight_q8 is missing"),
    "a missing norm": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "another name": (lambda t: t.update({f"{UP}.q8": t.pop(f"{UP}.weight_q8")}), f"{UP}.q8 is not part of"),
    "swapped tensors": (lambda t: swap(t, f"{UP}.weight", f"{GATE}.weight"), f"{GATE}.weight was changed"),
    "one more tensor": (lambda t: t.update(extra=torch.zeros(1)), "extra is not part of"),
    "another dtype": (lambda t: t.update({"lm_head.weight": t["lm_head.weight"].float()}), "head.weight was changed"),
    "another shape": (lambda t: t.update({f"{UP}.weight": t[f"{UP}.weight"].view(-1)}), f"{UP}.weight was changed"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_a_checkpoint_that_is_not_whole_is_refused_by_the_tensor(
    packed: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(packed, damage)
    with pytest.raises(ValueError, match=message) as error:
        logits(packed)
    assert str(error.value).startswith(str(packed))
    assert "micromix_compile.seal(" in str(error.value)


def test_a_file_cut_short_is_refused(packed: Path) -> None:
    content = (packed / WEIGHTS).read_bytes()
    (packed / WEIGHTS).write_bytes(content[:-1])
    with pytest.raises(Exception, match=r"safetensors|MetadataIncompleteBuffer"):
        logits(packed)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        checkpoint.verify([packed / WEIGHTS])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.update(rms_norm_eps=1e-3), "field rms_norm_eps was changed"),
        (lambda c: c.update(hidden_act="gelu"), "field hidden_act was changed"),
        (lambda c: c.pop("rope_parameters"), "field rope_parameters is missing"),
        (lambda c: c.update(more=1), "field more is not part of"),
        (lambda c: c["quantization_config"]["config"].update(scale_rounding="even"), "field quantization_config was"),
        (lambda c: c["quantization_config"]["config"].update(fp6="e3m2"), "field quantization_config was"),
        (lambda c: c["quantization_config"]["linears"].pop(UP), "field quantization_config was"),
        (lambda c: c["quantization_config"].pop("digests"), "digests is missing"),
        (lambda c: c["quantization_config"].update(digests=[]), "digests must be a mapping"),
        (lambda c: c["quantization_config"]["digests"]["tensors"].pop(f"{UP}.weight"), f"{UP}.weight is not part of"),
    ],
)
def test_an_edited_config_is_refused_until_the_edit_is_accepted(
    packed: Path, edit: Callable[[dict[str, object]], object], message: str
) -> None:
    edit_config(packed, edit)
    with pytest.raises(ValueError, match=message) as error:
        logits(packed)
    assert str(error.value).startswith(str(packed))
    micromix.seal(packed)
    checkpoint.verify([packed / WEIGHTS])


def test_an_edit_that_is_sealed_takes_effect(packed: Path) -> None:
    before = logits(packed)
    edit_config(packed, lambda config: config.update(rms_norm_eps=10.0))
    micromix.seal(packed)
    assert not torch.equal(logits(packed), before)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t[f"{UP}.order.channel_perm"].fill_(0), "channel_perm must have each channel from 0 to 63 once"),
        (
            lambda t: t[f"{UP}.order.channel_perm"].copy_(t[f"{UP}.order.channel_perm"].flip(0)),
            "the order of its group",
        ),
        (lambda t: t.pop(f"{UP}.weight_q8"), f"the checkpoint has no {UP}.weight_q8"),
        (lambda t: t.pop(f"{UP}.weight"), f"the checkpoint has no {UP}.weight_scale"),
    ],
)
def test_what_was_sealed_must_still_be_a_packed_model(
    packed: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(packed, damage)
    micromix.seal(packed)
    with pytest.raises(ValueError, match=message):
        logits(packed)


def test_any_dtype_may_be_asked_for(original: Path) -> None:
    assert logits(original, dtype=torch.float32).dtype is torch.float32


@pytest.mark.parametrize("offloaded", ["lm_head", "model.layers.0"])
def test_a_model_spread_over_devices_computes_the_same(original: Path, tmp_path: Path, offloaded: str) -> None:
    places = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "model.layers.0", "lm_head"), "cpu")
    places[offloaded] = "disk"
    assert torch.equal(logits(original, device_map=places, offload_folder=tmp_path), logits(original))


def test_checkpoints_in_several_files_load_and_are_verified(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert torch.equal(logits(tmp_path), logits(original))
    index = tmp_path / "model.safetensors.index.json"
    said = index.read_bytes()
    for damaged, message in {
        said.replace(b"model-00002", b"\xff"): "is not JSON",
        said.replace(b'"model-00002', b'1, "x": "'): "weight_map must be a mapping from tensors to files",
        said.replace(b'"metadata"', b'"x"'): "metadata must be a mapping, got None",
    }.items():
        index.write_bytes(damaged)
        with pytest.raises(ValueError, match=message) as error:
            logits(tmp_path)
        assert str(error.value).startswith(str(index))
    index.write_bytes(said)
    tensors = load_file(shards[1])
    flip(next(iter(tensors.values())))
    save_file(tensors, shards[1], metadata={"format": "pt"})
    with pytest.raises(ValueError, match="was changed after the checkpoint was written") as error:
        logits(tmp_path)
    assert str(error.value).startswith(str(shards[1]))
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"no {shards[1].name} in .*: the checkpoint is not whole, copy"):
        logits(tmp_path)


def test_files_of_two_savings_in_one_directory_are_refused(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="remove the older one"):
        model.save_pretrained(tmp_path, max_shard_size="10KB")
    (tmp_path / WEIGHTS).unlink()
    micromix.seal(tmp_path)
    next(tmp_path.glob("*-of-*.safetensors")).unlink()
    with pytest.raises(FileNotFoundError, match="no model-0000"):
        micromix.seal(tmp_path)


@pytest.mark.parametrize("activations", ["fp8", "mxfp6"])
def test_activations_of_their_own_format_and_rotations_come_back(activations: str, tmp_path: Path) -> None:
    model = packed_llama(activations=activations, rotate="all")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layout = loaded.get_submodule(UP).layout
    assert (layout.activations, layout.rotated) == (activations, 64)
    assert loaded.config.quantization_config.config["activations"] == activations
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("rotated", "message"),
    [(33, "must be a multiple of 32, got 33"), (96, "rotated must be at most its 64 channels, got 96")],
)
def test_a_rotation_that_does_not_fit_is_refused(packed: Path, rotated: int, message: str) -> None:
    edit_config(packed, lambda c: c["quantization_config"]["linears"][UP].update(rotated=rotated))  # type: ignore[index, call-overload]
    micromix.seal(packed)
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(packed)


def as_older_versions_wrote_it(directory: Path) -> None:
    """Scales under another name, no digests, options for debugging in the config, no word of activations."""
    scales = list(json.loads((directory / "config.json").read_text())["quantization_config"]["linears"])
    edit_tensors(directory, lambda t: t.update({f"{n}.weight_scale": t.pop(f"{n}.weight") for n in scales}))

    def edit(config: dict[str, dict[str, dict[str, object]]]) -> None:
        del config["quantization_config"]["digests"]
        config["quantization_config"]["schema_version"] = 1  # type: ignore[assignment]
        config["quantization_config"]["config"].update(dump=["all"], dump_dir="somewhere")
        for name in ("activations", "rotate"):
            del config["quantization_config"]["config"][name]
        for linear in config["quantization_config"]["linears"].values():
            del linear["rotated"]  # type: ignore[attr-defined]

    edit_config(directory, edit)  # type: ignore[arg-type]


def test_checkpoints_of_older_versions_load_with_a_warning(
    original: Path, packed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    as_older_versions_wrote_it(packed)
    with caplog.at_level(logging.WARNING, "micromix_compile"):
        loaded = AutoModelForCausalLM.from_pretrained(packed)
    assert "written without digests by an older version" in caplog.text
    assert "dump" not in loaded.config.quantization_config.config
    with torch.no_grad():
        assert torch.equal(loaded(IDS).logits, logits(original))
    loaded.save_pretrained(packed / "anew")
    checkpoint.verify([packed / "anew" / WEIGHTS])
    edit_tensors(packed, lambda t: t.pop(f"{UP}.weight_q4"))
    with pytest.raises(ValueError, match=f"the checkpoint has no {UP}.weight_q4"):
        logits(packed)


def test_push_to_hub_while_saving_is_refused_before_anything_is_written(original: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(original)
    with pytest.raises(ValueError, match=r"call model\.push_to_hub"):
        model.save_pretrained(tmp_path / "new", push_to_hub=True)
    assert not (tmp_path / "new").exists()


def python(code: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


WITHOUT_US = """
import os, sys
os.environ["TORCH_DEVICE_BACKEND_AUTOLOAD"] = "0"
sys.modules["micromix_compile"] = None
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained(sys.argv[1])
"""


def test_transformers_without_our_quantizer_raises_instead_of_filling_linears_with_anything(original: Path) -> None:
    done = python(WITHOUT_US, original)
    assert done.returncode == 1
    assert "mismatch" in done.stderr


@pytest.mark.parametrize("order", ["import micromix_compile, transformers", "import transformers, micromix_compile"])
@pytest.mark.parametrize("early", ["", "transformers.PreTrainedModel;"])
def test_importing_the_package_is_enough_to_load(original: Path, order: str, early: str) -> None:
    first, second = (f"import {name};" for name in order.removeprefix("import ").split(", "))
    code = f"{first} {early if 'transformers' in first else ''} {second} import sys, transformers;"
    code += "m = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
    done = python(code + "print(type(m.model.layers[0].mlp.up_proj).__name__)", original)
    assert done.stdout.strip() == "MicroMixLinear", done.stderr


@pytest.mark.parametrize("first", [pytest.param("torch", marks=pytest.mark.deep), "transformers.modeling_utils"])
def test_an_installed_package_needs_no_import(original: Path, tmp_path: Path, first: str) -> None:
    """An installation of its own says what pyproject.toml does; the one here may be older."""
    table = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8"))
    (entry,) = table["project"]["entry-points"]["torch.backends"].values()
    folder = tmp_path / "another-0.dist-info"
    folder.mkdir()
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: another\nVersion: 0\n", "utf-8")
    (folder / "entry_points.txt").write_text(f"[torch.backends]\nmicromix = {entry}\n", "utf-8")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import {first};"
    code += "heavy = 'micromix_compile.session' in sys.modules;"
    code += "from transformers import AutoModelForCausalLM; m = AutoModelForCausalLM.from_pretrained(sys.argv[1]);"
    done = python(code + "print(heavy, type(m.model.layers[0].mlp.up_proj).__name__)", original)
    heavy, found = done.stdout.split()
    assert found == "MicroMixLinear", done.stderr
    assert first != "torch" or heavy == "False"


def test_safetensors_own_functions_save_and_load_a_packed_model(tmp_path: Path) -> None:
    net = make_net(layers=1)
    recipe = micromix.calibrate(net, [torch.randn(2, 6, 64)])
    first, second = (micromix.quantize_(copy.deepcopy(net), recipe) for _ in range(2))
    save_model(first, tmp_path / "net.safetensors")
    for tensor in second.buffers():
        tensor.zero_()
    assert load_model(second, tmp_path / "net.safetensors") == (set(), [])
    x = torch.randn(2, 6, 64)
    assert torch.equal(first(x), second(x))


def test_a_copy_and_an_older_state_dict_keep_the_outputs() -> None:
    net = make_net(layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 6, 64)]))
    x = torch.randn(2, 6, 64)
    assert torch.equal(copy.deepcopy(packed)(x), packed(x))
    state = {name: value.clone() for name, value in packed.state_dict().items()}
    assert state["layers.0.up.weight"].shape == (96, 2)
    older = {f"{n}_scale" if packed_scale(packed, n) else n: value for n, value in state.items()}
    other = copy.deepcopy(packed)
    for tensor in other.buffers():
        tensor.zero_()
    other.load_state_dict(older)
    assert torch.equal(other(x), packed(x))


def packed_scale(model: nn.Module, name: str) -> bool:
    module, _, last = name.rpartition(".")
    return last == "weight" and isinstance(model.get_submodule(module), micromix.MicroMixLinear)


def test_a_state_dict_holds_the_models_own_memory() -> None:
    net = make_net(layers=1)
    packed = micromix.quantize_(net, micromix.calibrate(net, [torch.randn(2, 6, 64)]))
    linear = packed.layers[0].up
    saved = packed.state_dict()["layers.0.up.weight"]
    assert saved.data_ptr() == linear.weight_scale.data_ptr()
    assert saved.untyped_storage().nbytes() == saved.numel() < linear.weight_scale.untyped_storage().nbytes()
    assert packing.with_own_storage(saved) is saved

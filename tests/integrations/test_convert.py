"""Checkpoints of compressed-tensors and ModelOpt as packed ones, and back: the same bytes, the same logits."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.others import IDS, MODELOPT, SCHEMES, UP, edit_config, llama, logits, write_quantized
from transformers import AutoModelForCausalLM

import micromix_compile as micromix
from micromix_compile.integrations.mx_bytes import THEIR_FORMATS

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import Tensor

WEIGHTS = "model.safetensors"
RUN = ("mxfp4", "mxfp4a8", "mxfp6", "mxfp8", "mixed")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of each of `SCHEMES`."""
    folder = tmp_path_factory.mktemp("theirs")
    for kind in SCHEMES:
        write_quantized(folder / kind, kind)
    return folder


@pytest.fixture
def theirs(originals: Path, tmp_path: Path) -> Path:
    """A copy of the mixed one, to damage."""
    return shutil.copytree(originals / "mixed", tmp_path / "theirs")


def edit_tensors(directory: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / WEIGHTS)
    edit(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def dequantized(model: torch.nn.Module) -> dict[str, Tensor]:
    packed = {n: m for n, m in model.named_modules() if isinstance(m, micromix.MicroMixLinear)}
    return {name: module.weight.detach().float() + 0 for name, module in packed.items()}


@pytest.mark.versions
@pytest.mark.parametrize("kind", RUN)
def test_a_converted_model_is_the_one_that_compressed_tensors_runs(originals: Path, kind: str, tmp_path: Path) -> None:
    """Bit for bit: all weights, and the logits in bfloat16, for which the activations are rounded alike."""
    text = micromix.convert(originals / kind, tmp_path / "packed")
    assert "activations as the checkpoint says" in text
    assert ("mxfp6 held as mxfp8" in text) == (kind == "mxfp6")
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    reference = AutoModelForCausalLM.from_pretrained(originals / kind)
    expected = logits(reference)  # the first call decompresses the weights
    assert torch.equal(logits(ours), expected)
    weights = dequantized(ours)
    assert len(weights) == 7
    for name, weight in weights.items():
        assert torch.equal(weight, reference.get_submodule(name).weight.float())
    up = ours.get_submodule(UP)
    assert up.layout.scale_rounding == ("rceil" if kind in ("mxfp4a8", "mxfp6", "mxfp8") else "even")
    assert (up.weight_q4.numel() > 0) == (kind in ("mxfp4", "mxfp4a8", "mixed")), "4 bits where all weights have 4"


def test_modelopts_weights_are_those_that_it_dequantizes(tmp_path: Path) -> None:
    assert "7 mxfp8; activations as the checkpoint says" in micromix.convert(MODELOPT, tmp_path / "packed")
    found = dequantized(AutoModelForCausalLM.from_pretrained(tmp_path / "packed", dtype=torch.float32))
    expected = load_file(MODELOPT / "dequantized.safetensors")
    assert {f"{name}.weight" for name in found} == set(expected)
    assert all(torch.equal(weight, expected[f"{name}.weight"]) for name, weight in found.items())
    assert (tmp_path / "packed" / "generation_config.json").is_file()
    assert not (tmp_path / "packed" / "hf_quant_config.json").exists()


def test_modelopts_older_file_says_the_same_as_its_config(tmp_path: Path) -> None:
    old = shutil.copytree(MODELOPT, tmp_path / "old")
    edit_config(old, lambda config: config.pop("quantization_config"))
    micromix.convert(old, tmp_path / "a")
    micromix.convert(MODELOPT, tmp_path / "b")
    assert (tmp_path / "a" / WEIGHTS).read_bytes() == (tmp_path / "b" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("kind", ["mxfp4", "mxfp4a8", "mxfp8", "mixed", "weight-only"])
def test_there_and_back_codes_and_scales_are_the_same_bytes(originals: Path, kind: str, tmp_path: Path) -> None:
    named = "fp8" if kind == "weight-only" else None
    micromix.convert(originals / kind, tmp_path / "packed", activations=named)
    assert "compressed-tensors" in micromix.convert(tmp_path / "packed", tmp_path / "back")
    before, after = load_file(originals / kind / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert set(before) == set(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8))
    again, original = (AutoModelForCausalLM.from_pretrained(one) for one in (tmp_path / "back", originals / kind))
    assert torch.equal(logits(again), logits(original))


def test_mxfp6_weights_that_stay_mxfp6_come_back_as_they_were(originals: Path, tmp_path: Path) -> None:
    micromix.convert(originals / "mxfp6", tmp_path / "packed", activations="fp8")
    micromix.convert(tmp_path / "packed", tmp_path / "back")
    before, after = load_file(originals / "mxfp6" / WEIGHTS), load_file(tmp_path / "back" / WEIGHTS)
    assert all(torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)) for name, tensor in before.items())


@pytest.mark.parametrize("kind", ["weight-only", "other activations"])
def test_activations_without_a_twin_are_refused_until_the_caller_names_some(
    originals: Path, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"q_proj: the checkpoint says of its activations: .*same, fp8, mxfp6, mxfp8"):
        micromix.convert(originals / kind, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()
    for named, mode, form in (("same", "same", "mxfp4"), ("fp8", "fp8", "mxfp4"), ("mxfp8", "same", "mxfp8")):
        model = micromix.load_converted(originals / kind, activations=named)
        module = model.get_submodule(UP)
        assert module.layout.activations == mode
        assert module.split == tuple(64 * (one == form) for one in THEIR_FORMATS)
        assert module.weight_q4.shape == (96, 32), "the weights stay in 4 bits"
        assert logits(model).isfinite().all()
    assert f"activations {named}, as was asked for" in micromix.convert(
        originals / kind, tmp_path / "packed", activations=named
    )


def test_a_model_loads_without_a_directory_that_stays_and_saves_as_a_packed_one(
    originals: Path, tmp_path: Path
) -> None:
    model = micromix.load_converted(originals / "mixed", dtype=torch.float32)
    assert model.name_or_path == str(originals / "mixed")
    assert model.dtype == torch.float32
    model.save_pretrained(tmp_path / "saved")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "saved")), logits(model))
    with pytest.raises(ValueError, match="is packed already"):
        micromix.load_converted(tmp_path / "saved")


@pytest.mark.versions
def test_several_files_become_several_files_and_tied_embeddings_stay_tied(tmp_path: Path) -> None:
    write_quantized(tmp_path / "theirs", "mixed", max_shard_size="8KB", tie_word_embeddings=True)
    assert len(list((tmp_path / "theirs").glob("model-*.safetensors"))) > 2
    micromix.convert(tmp_path / "theirs", tmp_path / "packed")
    micromix.convert(tmp_path / "packed", tmp_path / "back")
    for directory in ("packed", "back"):
        index = json.loads((tmp_path / directory / "model.safetensors.index.json").read_text("utf-8"))
        assert set(index["weight_map"].values()) == {p.name for p in (tmp_path / directory).glob("model-*.safetensors")}
    models = [AutoModelForCausalLM.from_pretrained(tmp_path / one) for one in ("packed", "theirs", "back")]
    assert models[0].lm_head.weight is models[0].model.embed_tokens.weight
    first, *others = [logits(model) for model in models]
    assert all(torch.equal(first, other) for other in others)


def test_converted_linears_compile(originals: Path) -> None:
    mlp = micromix.load_converted(originals / "mixed", dtype=torch.float32).model.layers[0].mlp
    x = torch.randn(4, 64)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(mlp, backend="micromix")(x), mlp(x), rtol=1e-3, atol=1e-5)


CONFIGS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "no quantization": (lambda c: c.pop("quantization_config"), "must be a mapping, got None: it is not quantized"),
    "another method": (
        lambda c: c["quantization_config"].update(quant_method="gptq"),
        r"quant_method is 'gptq'; read are compressed-tensors \(mxfp4-pack-quantized, .*modelopt \(MXFP8\), mxfp4",
    ),
    "gpt-oss's without experts": (
        lambda c: c.update(quantization_config={"quant_method": "mxfp4"}),
        "names no linear of LlamaForCausalLM",
    ),
    "a field that gpt-oss has not": (
        lambda c: c.update(quantization_config={"quant_method": "mxfp4", "bits": 4}),
        "quantization_config.bits is not a field that is read; read are quant_method, modules_to_not_convert",
    ),
    "another algorithm of modelopt": (
        lambda c: c.update(quantization_config={"quant_method": "modelopt", "quant_algo": "NVFP4", "ignore": []}),
        "quant_algo is 'NVFP4'; read is 'MXFP8'",
    ),
    "another format": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(format="nvfp4-pack-quantized"),
        r"config_groups\['group_0'\].format is 'nvfp4-pack-quantized'; read are 'mxfp4-pack-quantized'",
    ),
    "another group size": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(group_size=16),
        "weights.group_size is 16; read is 32",
    ),
    "asymmetric": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(symmetric=False),
        "weights.symmetric is False; read is True",
    ),
    "bits of another format": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["weights"].update(num_bits=6),
        "num_bits must be that of mxfp8-quantized, got 6",
    ),
    "quantized outputs": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(output_activations={"num_bits": 8}),
        "output_activations is {'num_bits': 8}; read is None",
    ),
    "narrower activations": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["input_activations"].update(num_bits=4),
        "mxfp4 activations of mxfp8 weights are not read",
    ),
    "a quantized cache": (
        lambda c: c["quantization_config"].update(kv_cache_scheme={"num_bits": 8}),
        "kv_cache_scheme is .*; read are None",
    ),
    "transforms": (
        lambda c: c["quantization_config"].update(transform_config={"config_groups": {"u": {}}}),
        "transform_config is",
    ),
    "a field of the future": (
        lambda c: c["quantization_config"].update(rotations=1),
        "quantization_config.rotations is not a field that is read; read are quant_method",
    ),
    "not compressed": (
        lambda c: c["quantization_config"].update(quantization_status="frozen"),
        "quantization_status is 'frozen'; read is 'compressed'",
    ),
    "a target that is no expression": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"].update(targets=["re:("]),
        r"targets holds 're:\(', no regular expression",
    ),
    "a linear that nothing targets": (
        lambda c: c["quantization_config"].update(ignore=["lm_head", UP]),
        rf"tensor {UP}.weight_packed U8 \(96, 32\) belongs to nothing in LlamaForCausalLM",
    ),
    "a linear that is not quantized": (
        lambda c: c["quantization_config"].update(
            ignore=[],
            config_groups={**c["quantization_config"]["config_groups"]}
            | {"more": {**c["quantization_config"]["config_groups"]["group_0"], "targets": ["lm_head"]}},
        ),
        r"tensor lm_head.weight must be F8_E4M3 \(64, 64\), got BF16",
    ),
    "an embedding": (
        lambda c: c["quantization_config"]["config_groups"]["group_0"]["targets"].append("Embedding"),
        "model.embed_tokens is quantized, and cannot become a packed linear: it is a torch.nn.modules.sparse.Embedding",
    ),
    "no linear": (
        lambda c: [g.update(targets=["nowhere"]) for g in c["quantization_config"]["config_groups"].values()],
        "names no linear of LlamaForCausalLM",
    ),
    "uneven channels": (
        lambda c: c.update(intermediate_size=80),
        "down_proj.in_features must be a multiple of 32, got",
    ),
    "other sizes": (lambda c: c.update(vocab_size=65), r"must be F64 or .* \(65, 64\), got BF16 \(64, 64\)"),
    "more layers": (lambda c: c.update(num_hidden_layers=2), "there is no tensor model.layers.1"),
    "far more layers": (lambda c: c.update(num_hidden_layers=2**40), "num_hidden_layers is .*, and there are"),
    "an unknown model": (lambda c: c.update(model_type="lama"), "transformers makes no causal language model of it"),
}


@pytest.mark.parametrize(("edit", "message"), CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_is_not_read_is_refused_by_its_field(
    theirs: Path, tmp_path: Path, edit: Callable[[dict[str, Any]], object], message: str
) -> None:
    edit_config(theirs, edit)
    with pytest.raises(ValueError, match=message) as error:
        micromix.convert(theirs, tmp_path / "packed")
    assert str(theirs) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


DAMAGES: dict[str, tuple[Callable[[dict[str, Tensor]], object], str]] = {
    "a missing tensor": (lambda t: t.pop(f"{UP}.weight_scale"), rf"there is no tensor {UP}.weight_scale \(96, 2\)"),
    "a missing norm": (lambda t: t.pop("model.norm.weight"), "there is no tensor model.norm.weight"),
    "one more tensor": (
        lambda t: t.update({f"{UP}.weight_zero_point": torch.zeros(1)}),
        "weight_zero_point F32 .* belongs to nothing",
    ),
    "experts": (
        lambda t: t.update({"model.layers.0.mlp.experts.0.up_proj.weight_packed": torch.zeros(1)}),
        "weights of experts, one Parameter of the model, are not packed",
    ),
    "another shape": (
        lambda t: t.update({f"{UP}.weight_packed": t[f"{UP}.weight_packed"].reshape(48, 64)}),
        rf"{UP}.weight_packed must be U8 \(96, 32\), got U8 \(48, 64\)",
    ),
    "another dtype": (
        lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale"].float()}),
        "weight_scale must be U8 .* got F32",
    ),
    "NaN among the codes": (
        lambda t: t["model.layers.0.self_attn.q_proj.weight"].view(torch.uint8)[3, 5:6].fill_(0x7F),
        "q_proj.weight holds NaN",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_tensors_that_do_not_fit_are_refused_by_name(
    theirs: Path, tmp_path: Path, damage: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(theirs, damage)
    with pytest.raises(ValueError, match=message) as error:
        micromix.convert(theirs, tmp_path / "packed")
    assert str(theirs) in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"], "nothing half-written"


def test_files_that_are_missing_cut_short_or_of_another_index_are_refused(tmp_path: Path) -> None:
    write_quantized(tmp_path / "theirs", "mxfp4", max_shard_size="8KB")
    shard = sorted((tmp_path / "theirs").glob("model-*.safetensors"))[1]
    content = shard.read_bytes()
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=f"no {shard.name}"):
        micromix.convert(tmp_path / "theirs", tmp_path / "packed")
    shard.write_bytes(content[:-1])
    with pytest.raises(ValueError, match=f"{shard.name}: not a whole safetensors file"):
        micromix.convert(tmp_path / "theirs", tmp_path / "packed")
    shard.write_bytes(content)
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    said = json.loads(index.read_text("utf-8"))
    said["weight_map"].pop(f"{UP}.weight_scale")
    index.write_text(json.dumps(said), "utf-8")
    with pytest.raises(ValueError, match=rf"tensor {UP}.weight_scale must be in model-.*, got None"):
        micromix.convert(tmp_path / "theirs", tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "budget", "target_bits": 5.0}, "split must be of one format, got"),
        ({"policy": "mxfp4", "rotate": "all", "uniform_order": "model"}, "of its channels are rotated"),
        ({"policy": "mxfp8", "uniform_order": "sheltered", "rotate": "none"}, "must be in the model's order"),
        ({"policy": "mxfp6", "fp6": "e3m2", "uniform_order": "model", "rotate": "none"}, "MXFP6 is e2m3, and"),
        ({"policy": "mxfp6", "weights": "mxfp4", "uniform_order": "model", "activations": "same"}, "is mxfp4 and its"),
    ],
)
def test_packed_models_that_compressed_tensors_has_no_name_for_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    model = llama()
    config = micromix.MicroMixConfig(**{"weight_rounding": "nearest", "scale_search": False, **options})
    micromix.quantize_(model, micromix.calibrate(model, [IDS], config)).save_pretrained(tmp_path / "packed")
    with pytest.raises(ValueError, match=message) as error:
        micromix.convert(tmp_path / "packed", tmp_path / "theirs")
    assert str(tmp_path / "packed") in str(error.value)
    assert not (tmp_path / "theirs").exists()


@pytest.mark.parametrize("policy", ["mxfp4", "mxfp6", "mxfp8"])
def test_a_model_that_was_packed_here_runs_in_compressed_tensors(tmp_path: Path, policy: str) -> None:
    """Its activations are rounded alike where both choose scales alike."""
    model = llama()
    config = micromix.MicroMixConfig(
        policy=policy,
        uniform_order="model",
        rotate="none",
        activations="same",
        scale_rounding="rceil" if policy == "mxfp8" else "even",
    )
    micromix.quantize_(model, micromix.calibrate(model, [IDS], config)).save_pretrained(tmp_path / "packed")
    micromix.convert(tmp_path / "packed", tmp_path / "theirs")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")), logits(model))


def test_wrong_activations_are_refused_before_anything_is_read(originals: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="activations must be one of same, fp8, mxfp6, mxfp8, got 'int8'"):
        micromix.convert(originals / "mxfp4", tmp_path / "packed", activations="int8")
    micromix.convert(originals / "mxfp4", tmp_path / "packed")
    with pytest.raises(ValueError, match="activations must not be given for a packed checkpoint"):
        micromix.convert(tmp_path / "packed", tmp_path / "back", activations="fp8")


def test_only_a_checkpoint_that_is_not_the_source_is_replaced(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shutil.copytree(originals / "mxfp8", tmp_path / "parent" / "source")
    for destination in (source, source.parent):
        with pytest.raises(ValueError, match=f"destination must not be source or hold it, got {destination} for"):
            micromix.convert(source, destination)
    other, file, target = tmp_path / "other", tmp_path / "file", tmp_path / "packed"
    editor, checkout = tmp_path / "editor", tmp_path / "checkout"
    for folder in (other, target, editor, checkout / ".git"):
        folder.mkdir(parents=True)
    (other / "precious.txt").touch()
    file.touch()
    (editor / "config.json").write_text('{"editor": 1}', "utf-8")
    shutil.copytree(source, checkout, dirs_exist_ok=True)
    places = [(other, "holds no packed checkpoint"), (file, "is not a directory"), (checkout, "is a git checkout")]
    for destination, fact in (*places, (editor, "holds no packed checkpoint")):
        with pytest.raises(ValueError, match=f"an empty directory, and {destination} {fact}"):
            micromix.convert(source, destination)
    micromix.convert(source, target)
    micromix.convert(source, target)
    (target / "notes.txt").touch()
    with pytest.raises(ValueError, match=f"holds notes.txt, which is no part of one and not that of {source}"):
        micromix.convert(source, target)
    monkeypatch.chdir(target)
    with pytest.raises(ValueError, match="holds the current directory or a home"):
        micromix.convert(source, ".")
    assert (other / "precious.txt").is_file()

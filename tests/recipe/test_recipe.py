"""The recipe file: what is saved comes back, what was changed is named."""

import dataclasses
import json
import os
import stat
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.recipe_files import Fields, Tensors, forge, make_recipe

import micromix_compile as micromix
from micromix_compile.calibration.assignment import assign
from micromix_compile.config import MicroMixConfig
from micromix_compile.files import write_atomically
from micromix_compile.numerics.layout import PackedWeight, order_dtype
from micromix_compile.recipe import types
from micromix_compile.recipe.types import ChannelCosts, Recipe


def assert_same(a: Recipe, b: Recipe) -> None:
    assert (a.config, a.model_id, list(a.linears), a.refused) == (b.config, b.model_id, list(b.linears), b.refused)
    for fqn in a.linears:
        x, y = a.linears[fqn], b.linears[fqn]
        assert (x.in_features, x.out_features, x.split) == (y.in_features, y.out_features, y.split)
        assert x.group.rotated == y.group.rotated
        assert torch.equal(x.group.channel_perm, y.group.channel_perm)
        assert torch.equal(x.weight_sample, y.weight_sample)
        assert x.weight_checksums == y.weight_checksums
        assert torch.equal(x.group.statistics.abs_mean, y.group.statistics.abs_mean)
        assert x.group.statistics.below == y.group.statistics.below


def test_a_recipe_survives_its_file(tmp_path: Path) -> None:
    recipe = make_recipe()
    recipe.save(tmp_path / "r.safetensors")
    loaded = Recipe.load(tmp_path / "r.safetensors")
    assert_same(recipe, loaded)
    assert loaded.linears["layers.0.q"].group is loaded.linears["layers.0.k"].group


@pytest.mark.parametrize(("channels", "dtype"), [(32, torch.int16), (32768, torch.int16), (32800, torch.int32)])
def test_an_order_is_used_in_the_smallest_dtype_that_holds_it(channels: int, dtype: torch.dtype) -> None:
    group = make_recipe().linears["layers.0.q"].group
    group = dataclasses.replace(group, channel_perm=torch.arange(channels, dtype=torch.int32))
    order = group.order_on(torch.device("cpu"))
    assert order.dtype == order_dtype(channels) == dtype
    assert torch.equal(order.int(), group.channel_perm)


def test_its_bits_count_elements_scales_padding_and_orders() -> None:
    recipe = make_recipe()
    assert recipe.element_bits == (4 + 6 + 8) / 3
    row = 32 // 2 + 32 * 6 // 8 + 32 + 96 // 32
    assert recipe.stored_bytes == (64 + 32) * row + 4 * 96
    assert recipe.stored_bits == 8 * recipe.stored_bytes / (90 * 96)
    all_fp4 = dataclasses.replace(recipe, config=MicroMixConfig(weights="mxfp4"))
    assert all_fp4.stored_bytes == 96 * (96 // 2 + 3) + 4 * 96


def test_assigning_again_under_another_policy_keeps_statistics() -> None:
    recipe = assign(make_recipe(), MicroMixConfig(policy="mxfp8"))
    assert {linear.split for linear in recipe.linears.values()} == {(0, 0, 96)}
    assert recipe.linears["layers.0.q"].group is recipe.linears["layers.0.k"].group


def test_a_file_cut_in_half_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    make_recipe().save(path)
    content = path.read_bytes()
    for keep in (0, 5, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:keep])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            Recipe.load(path)


def rewrite(path: Path, field: str, value: str | torch.Tensor | None) -> None:
    with safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata())
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    if isinstance(value, torch.Tensor):
        tensors[field] = value
    elif value is None:
        metadata.pop(field, None)
        tensors.pop(field, None)
    else:
        metadata[field] = value
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("format", '"other"', "format must be 'micromix-recipe', got 'other'"),
        ("schema_version", "99", "schema_version must be 2, got 99"),
        ("model_id", '"Other"', "model_id was changed"),
        ("config", "{}", "config was changed"),
        ("groups", "[]", "groups was changed"),
        ("linears", "[]", "linears was changed"),
        ("linears", None, "linears is missing"),
        ("digests", None, "digests is missing"),
        ("extra", "1", "extra is not part of the recipe"),
        ("model_id", "{", "metadata is not JSON"),
        ("layers.0.q.channel_perm", torch.zeros(96, dtype=torch.int32), "layers.0.q.channel_perm was changed"),
        ("layers.0.q.abs_mean", None, "layers.0.q.abs_mean is missing"),
    ],
)
def test_an_edited_field_is_named(tmp_path: Path, field: str, value: str | torch.Tensor | None, message: str) -> None:
    path = tmp_path / "r.safetensors"
    make_recipe().save(path)
    rewrite(path, field, value)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert str(path) in str(error.value)


def test_a_bad_split_is_named_even_with_a_right_digest(tmp_path: Path) -> None:
    recipe = make_recipe()
    group = dataclasses.replace(recipe.linears["layers.0.q"].group, split=(32, 32, 64))
    linears = {fqn: dataclasses.replace(linear, group=group) for fqn, linear in recipe.linears.items()}
    dataclasses.replace(recipe, linears=linears).save(tmp_path / "r.safetensors")
    with pytest.raises(ValueError, match=r"groups.layers.0.q.split must be three multiples of 32 with sum 96"):
        Recipe.load(tmp_path / "r.safetensors")


@pytest.mark.parametrize(
    ("part", "value"),
    [("w4", torch.zeros(64, 8, dtype=torch.uint8)), ("w_scale", torch.zeros(64, 3)), ("w6", None)],
)
def test_a_rounded_weight_of_another_shape_is_named(tmp_path: Path, part: str, value: torch.Tensor | None) -> None:
    recipe = make_recipe()
    packed = PackedWeight(
        *(torch.zeros(shape, dtype=torch.uint8) for shape in ((64, 16), (3, 64, 8), (64, 32), (64, 3)))
    )
    path = tmp_path / "r.safetensors"
    dataclasses.replace(recipe, packed={"layers.0.q": packed}).save(path)
    loaded = Recipe.load(path).packed
    assert list(loaded) == ["layers.0.q"]
    assert all(torch.equal(a, b) for a, b in zip(loaded["layers.0.q"], packed, strict=True))
    if value is None:
        rewrite(path, f"layers.0.q.{part}", None)
        with pytest.raises(ValueError, match=f"layers.0.q.{part} is missing"):
            Recipe.load(path)
        return
    dataclasses.replace(recipe, packed={"layers.0.q": packed._replace(**{part: value})}).save(path)
    with pytest.raises(ValueError, match=rf"layers.0.q.{part} must be uint8 \(64, "):
        Recipe.load(path)


def test_costs_survive_the_file(tmp_path: Path) -> None:
    recipe = make_recipe()
    costs = ChannelCosts(activations=torch.rand(4, 90), weights=torch.rand(4, 90), measured=True)
    group = recipe.linears["layers.0.q"].group
    group = dataclasses.replace(group, statistics=dataclasses.replace(group.statistics, costs=costs))
    linears = {fqn: dataclasses.replace(linear, group=group) for fqn, linear in recipe.linears.items()}
    dataclasses.replace(recipe, linears=linears).save(tmp_path / "r.safetensors")
    loaded = Recipe.load(tmp_path / "r.safetensors").linears["layers.0.q"].group.statistics.costs
    assert loaded is not None
    assert loaded.measured
    assert torch.equal(loaded.activations, costs.activations)
    assert torch.equal(loaded.weights, costs.weights)


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no recipe at"):
        Recipe.load(tmp_path / "none.safetensors")


def test_a_failed_save_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.safetensors"
    make_recipe().save(path)
    before = path.read_bytes()

    def full_disk(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "replace", full_disk)
    with pytest.raises(OSError, match="no space left"):
        make_recipe().save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.safetensors"]


def test_the_metadata_is_readable_json(tmp_path: Path) -> None:
    make_recipe().save(tmp_path / "r.safetensors")
    with safe_open(tmp_path / "r.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["config"])["policy"] == "mxfp8-anchor"
    assert json.loads(metadata["groups"])[0]["split"] == [32, 32, 32]


def test_public_names_are_there() -> None:
    assert micromix.Recipe is types.Recipe
    assert set(micromix.__all__) <= set(dir(micromix))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        micromix.nothing  # noqa: B018


def put(*place: str | int, value: Any) -> Callable[[Fields, Tensors], object]:
    """An edit that sets one value inside the fields."""

    def edit(fields: Fields, _: Tensors) -> None:
        inside: Any = fields
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value

    return edit


def tensor(name: str, value: torch.Tensor) -> Callable[[Fields, Tensors], object]:
    """An edit that sets one tensor."""
    return lambda _, tensors: tensors.update({name: value})


Q = "layers.0.q"
SAME_CHANNEL_TWICE = torch.cat((torch.full((6,), -1), torch.zeros(90))).int()
NO_PADDING = torch.arange(96, dtype=torch.int32)
FORGERIES = {
    "deep": (put("refused", value=json.loads("[" * 400 + "]" * 400)), "refused must be a mapping"),
    "model_id": (put("model_id", value=7), "model_id must be a string, got 7"),
    "refused": (put("refused", value={"lm_head": 1}), "refused.'lm_head'. must be a string, got 1"),
    "groups": (put("groups", value={}), "groups must be a list, got {}"),
    "group": (put("groups", 0, value=[]), r"groups\[0\] must be a mapping"),
    "group field": (put("groups", 0, "more", value=1), r"groups\[0\].'more'. is not a field"),
    "group name": (put("groups", 0, "name", value=""), "must be a string that is not empty, got ''"),
    "tokens": (put("groups", 0, "tokens", value=-1), r"groups\[0\].'tokens'. must be an integer of 1 or more, got -1"),
    "elements": (put("groups", 0, "elements", value=899), "elements must be 10 tokens of 90, got 899"),
    "below": (put("groups", 0, "below", 0, value=[1, False]), r"below'.\[0\] must have 3 items"),
    "below ratio": (put("groups", 0, "below", 0, 0, value=float("nan")), "must be a finite number, got nan"),
    "below count": (put("groups", 0, "below", 0, 2, value=901), "no count above 900 elements"),
    "split": (put("groups", 0, "split", value=[96, 0.0, 0]), r"split'.\[1\] must be an integer of 0 or more, got 0.0"),
    "no such group": (put("linears", 0, "group", value="x"), "linears.layers.0.q.group must name a group, got 'x'"),
    "no linears": (put("linears", value=[]), "layers.0.k.weight_sample belongs to no linear"),
    "in_features": (put("linears", 0, "in_features", value=96), "in_features must be its group's 90, got 96"),
    "out_features": (put("linears", 0, "out_features", value=True), "must be an integer of 1 or more, got True"),
    "twice": (put("linears", 1, "fqn", value=Q), "linears has layers.0.q twice"),
    "checksums": (put("linears", 0, "weight_checksums", "values", "float32", value=2**63), "a signed integer of 64"),
    "made_in": (put("linears", 0, "weight_checksums", "made_in", value="int8"), "must be float32, bfloat16 or float16"),
    "checksum": (put("linears", 0, "weight_checksums", "values", value={"float32": 1}), r"'bfloat16'. is missing"),
    "config": (put("config", value=[]), "config must be a mapping, got .."),
    "option": (put("config", "lam", value="1"), "config: lam must be a number, got '1'"),
    "more fields": (put("extra", value=1), "extra belongs to no linear"),
    "more tensors": (tensor("extra", torch.zeros(1)), "extra belongs to no linear"),
    "order": (tensor(f"{Q}.channel_perm", SAME_CHANNEL_TWICE), "channel_perm must have each channel from 0 to 89 once"),
    "no padding": (tensor(f"{Q}.channel_perm", NO_PADDING), "elements must be 10 tokens of 96, got 900"),
    "order dtype": (tensor(f"{Q}.channel_perm", torch.zeros(96)), "channel_perm must be int32"),
    "order shape": (tensor(f"{Q}.channel_perm", NO_PADDING[None]), r"must be int32 \(-1,\), got .* \(1, 96\)"),
    "statistics": (tensor(f"{Q}.abs_mean", torch.full((90,), float("nan"))), "abs_mean must have no negative .* NaN"),
    "statistics shape": (tensor(f"{Q}.abs_max", torch.zeros(91)), r"abs_max must be float32 \(90,\), got .* \(91,\)"),
    "sample": (tensor(f"{Q}.weight_sample", torch.zeros(33)), r"weight_sample must be float32 \(32,\)"),
    "float8": (tensor(f"{Q}.abs_mean", torch.zeros(90).to(torch.float8_e4m3fn)), "must be one of I32, F32, U8"),
}  # fmt: skip


@pytest.mark.parametrize(("edit", "message"), FORGERIES.values(), ids=FORGERIES)
def test_a_forged_recipe_is_refused_by_what_is_wrong_with_it(
    tmp_path: Path, edit: Callable[[Fields, Tensors], object], message: str
) -> None:
    path = tmp_path / "r.safetensors"
    make_recipe().save(path)
    forge(path, edit)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
    ("field", "text", "message"),
    [
        ("linears", "[" * 100_000, "linears: metadata is nested too deeply"),
        ("model_id", "9" * 5000, "model_id: metadata is not JSON"),
        ("digests", '{"format": 7}', "digests.'format'. must be a string, got 7"),
        ("digests", "[]", "digests must be a mapping"),
    ],
)
def test_metadata_that_python_cannot_take_is_named(tmp_path: Path, field: str, text: str, message: str) -> None:
    path = tmp_path / "r.safetensors"
    make_recipe().save(path)
    rewrite(path, field, text)
    with pytest.raises(ValueError, match=message) as error:
        Recipe.load(path)
    assert str(error.value).startswith(f"{path}: ")


def test_options_for_debugging_are_neither_written_nor_read(tmp_path: Path) -> None:
    path = tmp_path / "r.safetensors"
    recipe = make_recipe()
    dumping = dataclasses.replace(recipe.config, dump=("all",), dump_dir="somewhere")
    dataclasses.replace(recipe, config=dumping).save(path)
    with safe_open(path, framework="pt") as file:
        assert not {"dump", "dump_dir"} & set(json.loads(file.metadata()["config"]))
    assert Recipe.load(path).config == recipe.config
    forge(path, put("config", value=dumping.to_dict()))  # as older versions wrote it
    assert Recipe.load(path).config == recipe.config


def test_saving_never_touches_the_umask_of_other_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: int) -> int:
        raise AssertionError("the umask belongs to the process")

    monkeypatch.setattr(os, "umask", refuse)
    make_recipe().save(tmp_path / "r")
    monkeypatch.undo()
    (tmp_path / "plain").touch()
    assert (tmp_path / "r").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received: list[bytes] = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_bytes()))
    reader.start()
    write_atomically(pipe, b"content")
    reader.join()
    assert received == [b"content"]
    assert stat.S_ISFIFO(pipe.stat().st_mode)

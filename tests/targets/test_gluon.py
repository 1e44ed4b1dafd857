"""Launches of the persistent kernel without a GPU: what the driver would be passed, and what is kept."""

from __future__ import annotations

import ctypes
import struct
from dataclasses import replace
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from support.folded import OnePlan, folded_rows, random_weight
from support.grouped import folded_experts

from micromix_compile.targets import cuda_driver, gluon, gluon_grouped, gluon_launch, hopper
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, FoldedTiles
from micromix_compile.targets.gluon_kernels import boxes_of, parameters_of, refusal
from micromix_compile.targets.gluon_launch import Loaded
from micromix_compile.targets.gluon_tiles import GluonKernel, GluonTile, Plan, gluon_sm_90
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import FoldedWeight

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.numerics.folding import FoldedActivation
    from micromix_compile.targets.gluon import Planner

TILE = gluon_sm_90(132).tiles[1]
SPLIT = (96, 64, 32)
FUNCTION, STREAM = 0x1234, 0x5678


class Driver:
    """Notes what it is asked. A descriptor that it encodes says what of."""

    def __init__(self) -> None:
        self.encoded: list[tuple[int, ...]] = []
        self.launches: list[tuple[Any, dict[str, Any]]] = []
        self.kernel: GluonKernel | None = None

    def cuTensorMapEncodeTiled(  # noqa: N802 - the driver's name
        self, memory: Any, kind: int, rank: int, address: int, shape: Any, strides: Any, box: Any, steps: Any,
        interleave: int, swizzle: int, promotion: int, fill: int,
    ) -> int:  # fmt: skip
        assert ctypes.addressof(memory) % 64 == 0
        assert (rank, list(steps), interleave, promotion, fill) == (2, [1, 1], 0, 2, 0)
        self.encoded.append((address, kind, *shape, *strides, *box, swizzle))
        memory[:8] = struct.pack("Q", len(self.encoded))
        return 0

    def cuLaunchKernelEx(self, config: Any, function: int, pointers: Any, extra: None) -> int:  # noqa: N802
        assert (function, extra) == (FUNCTION, None)
        assert self.kernel is not None
        self.launches.append((tuple(config.grid), self._arguments(pointers)))
        assert config.stream == STREAM
        assert (tuple(config.block), config.shared_bytes) == ((256, 1, 1), 1000)
        assert (config.attribute_count, config.attributes[0].id, config.attributes[0].value) == (1, 6, 1)
        return 0

    def _arguments(self, pointers: Any) -> dict[str, Any]:
        """By name, of memory that the launch may read: a descriptor as what was encoded."""
        assert self.kernel is not None
        found: dict[str, Any] = {}
        place = 0
        for name, kind in parameters_of(self.kernel).items():
            size = 8 if kind != "i32" else 4
            (value,) = struct.unpack("Q" if size == 8 else "i", ctypes.string_at(pointers[place], size))
            place += 1
            if kind.startswith("tensordesc"):
                value = self.encoded[value - 1]
                for unread, count in zip(pointers[place : place + 4], (4, 4, 8, 8), strict=True):
                    assert ctypes.string_at(unread, count) == bytes(count)
                place += 4
            found[name] = value
        assert [ctypes.string_at(one, 8) for one in pointers[place:]] == [bytes(8)] * 2
        return found


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()
    monkeypatch.setattr(gluon, "_groups", {})
    monkeypatch.setattr(gluon_launch, "_maps", {})
    monkeypatch.setattr(cuda_driver, "driver", lambda: made)
    monkeypatch.setattr(cuda_driver, "_thread", SimpleNamespace(has_context=True))
    monkeypatch.setattr(gluon, "load", lambda kernel, device: Loaded(FUNCTION, 256, 1000))
    monkeypatch.setattr(gluon, "raw_stream", lambda device: STREAM)
    monkeypatch.setattr(gluon, "current_device", lambda: -1)  # what get_device() of a CPU's tensor says
    return made


def multiply(
    driver: Driver, x: FoldedActivation, weights: Sequence[FoldedWeight], plan: Plan, fp6: str = "e3m2"
) -> dict[str, Any]:
    """What the launch was passed, and what its outputs were."""
    driver.kernel = GluonKernel.of(plan.tile, weights, fp6)
    outs = gluon.multiply(x, weights, fp6, torch.bfloat16, OnePlan(plan))
    assert outs is not None
    assert all(out.dtype == torch.bfloat16 and out.is_contiguous() for out in outs)
    grid, arguments = driver.launches[-1]
    assert grid == (plan.programs, 1, 1)
    assert [arguments[f"out_{i}"] for i in range(len(outs))] == [out.data_ptr() for out in outs]
    return arguments


def test_a_launch_is_passed_all_weights_and_where_their_tiles_begin(driver: Driver) -> None:
    x = folded_rows(70, SPLIT, "e3m2")
    weights = [random_weight(n, SPLIT, "e3m2", bias=True) for n in (136, 64, 8)]
    got = multiply(driver, x, weights, Plan(TILE, 8, 0))
    width = x.q.shape[1]
    assert got["x"] == (x.q.data_ptr(), 0, width, 70, width, 128, 128, 3)
    for i, (one, n) in enumerate(zip(weights, (136, 64, 8), strict=True)):
        assert got[f"w4_{i}"] == (one.w4.data_ptr(), 3, 12, n, 48, 32, 64, 3)
        assert got[f"w6_{i}"] == (one.w6.data_ptr(), 3, 4, 3 * n, 16, 8, 64, 1)
        assert got[f"w8_{i}"] == (one.w8.data_ptr(), 3, 8, n, 32, 32, 64, 3)
        assert got[f"w_factor_{i}"] == (one.factor.data_ptr(), 3, n, 3, 4 * n, 64, 2, 0)
        assert got[f"w_row_scale_{i}"] == one.row_scale.data_ptr()
        assert one.bias is not None
        assert got[f"bias_{i}"] == one.bias.data_ptr()
        assert got[f"N{i}"] == n
    assert (got["x_row_scale"], got["locks"]) == (x.row_scale.data_ptr(), x.locks.data_ptr())
    numbers = ("M", "tiles0", "tiles1", "column_tiles", "whole", "blocks4", "blocks6", "blocks8")
    assert [got[name] for name in numbers] == [70, 3, 4, 5, 0, 3, 2, 1]


def test_descriptors_of_weights_are_made_once_and_of_activations_where_they_lie_elsewhere(driver: Driver) -> None:
    x, weights = folded_rows(70, SPLIT, "e3m2"), [random_weight(136, SPLIT, "e3m2")]
    plan = Plan(TILE, 6, 6)
    first = multiply(driver, x, weights, plan)
    assert len(driver.encoded) == 5
    again = multiply(driver, x, [FoldedWeight(*weights[0])], plan)
    assert {**again, "out_0": 0, "partial": 0} == {**first, "out_0": 0, "partial": 0}
    assert len(driver.encoded) == 5
    moved = x._replace(q=x.q.clone())
    assert multiply(driver, moved, weights, plan)["x"][0] == moved.q.data_ptr()
    assert len(driver.encoded) == 6
    fewer = x._replace(q=x.q[:65], row_scale=x.row_scale[:65])
    got = multiply(driver, fewer, weights, plan)
    assert (got["x"][3], got["M"]) == (65, 65)
    assert multiply(driver, x, [weights[0]._replace(w8=weights[0].w8.clone())], plan)["w8_0"] != first["w8_0"]


def test_a_segment_without_channels_has_a_descriptor_that_is_valid(driver: Driver) -> None:
    x, weight = folded_rows(65, (0, 0, 64), "e2m3"), random_weight(16, (0, 0, 64), "e2m3")
    got = multiply(driver, x, [weight], Plan(TILE, 1, 1), "e2m3")
    assert got["w4_0"][0] == got["w6_0"][0] == weight.factor.data_ptr()
    assert [got[name] for name in ("blocks4", "blocks6", "blocks8")] == [0, 0, 2]


def test_memory_where_tma_does_not_take_it_is_refused(driver: Driver) -> None:
    x, weight = folded_rows(65, SPLIT, "e3m2"), random_weight(16, SPLIT, "e3m2")
    room = torch.empty(weight.w8.numel() + 8, dtype=torch.uint8)
    odd = room[8:].view_as(weight.w8).copy_(weight.w8)
    planner = OnePlan(Plan(TILE, 1, 1))
    for _ in range(2):
        assert gluon.multiply(x, [weight._replace(w8=odd)], "e3m2", torch.bfloat16, planner) is None
    scales = torch.empty(66)[1:].copy_(x.row_scale)
    assert gluon.multiply(x._replace(row_scale=scales), [weight], "e3m2", torch.bfloat16, planner) is None
    assert driver.launches == []


def test_sums_of_parts_have_room_of_their_own_where_tiles_are_shared(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight = folded_rows(65, SPLIT, "e3m2"), random_weight(64, SPLIT, "e3m2")
    sizes: list[int] = []
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda t, *a, **k: sizes.append(a[0]) or new_empty(t, *a, **k))
    multiply(driver, x, [weight], Plan(TILE, 1, 1))
    multiply(driver, x, [weight], Plan(TILE, 3, 0))
    assert [size for size in sizes if isinstance(size, int)] == [3 * 128 * 64]
    too_many = Plan(GluonTile(64, 64, 2, 2, 32, 64, 24), 2000, 0)
    with pytest.raises(AssertionError, match="no GPU runs 2000 programs"):
        multiply(driver, x, [weight], too_many)


def test_what_is_kept_does_not_grow_without_end(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (gluon, gluon_launch):
        monkeypatch.setattr(module, "MOST_KEPT", 3)
    monkeypatch.setattr(gluon, "MOST_SHAPES", 2)
    weights = [random_weight(16, SPLIT, "e3m2")]
    for _ in range(9):
        multiply(driver, folded_rows(65, SPLIT, "e3m2"), weights, Plan(TILE, 1, 1))
        multiply(driver, folded_rows(65, SPLIT, "e3m2"), [random_weight(16, SPLIT, "e3m2")], Plan(TILE, 1, 1))
        assert len(gluon_launch._maps) <= 3
        assert len(gluon._groups) <= 3
    for rows in range(65, 72):
        multiply(driver, folded_rows(rows, SPLIT, "e3m2"), weights, Plan(TILE, 1, 1))
        assert all(len(group.by_shape) <= 2 for group in gluon._groups.values())


def test_a_failure_says_what_the_driver_says(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    def say(code: int, text: Any) -> None:
        text._obj.value = b"invalid argument"

    monkeypatch.setattr(driver, "cuLaunchKernelEx", lambda *_: 1)
    monkeypatch.setattr(driver, "cuGetErrorString", say, raising=False)
    with pytest.raises(RuntimeError, match=r"launching a product: the CUDA driver says invalid argument \(1\)"):
        multiply(driver, folded_rows(65, SPLIT, "e3m2"), [random_weight(16, SPLIT, "e3m2")], Plan(TILE, 1, 1))


@pytest.mark.parametrize("has_one", [False, True])
def test_a_thread_without_a_context_enters_the_device_s_once(monkeypatch: pytest.MonkeyPatch, has_one: bool) -> None:
    calls: list[tuple[str, int]] = []

    def get_current(context: Any) -> int:
        context._obj.value = 5 if has_one else None
        return calls.append(("current", 0)) or 0

    def get_device(handle: Any, ordinal: int) -> int:
        handle._obj.value = 30 + ordinal
        return calls.append(("device", ordinal)) or 0

    def retain(context: Any, handle: Any) -> int:
        context._obj.value = 7
        return calls.append(("retain", handle.value)) or 0

    fake = SimpleNamespace(
        cuCtxGetCurrent=get_current, cuDeviceGet=get_device, cuDevicePrimaryCtxRetain=retain,
        cuCtxSetCurrent=lambda context: calls.append(("enter", context.value)) or 0,
    )  # fmt: skip
    monkeypatch.setattr(cuda_driver, "driver", lambda: fake)
    monkeypatch.setattr(cuda_driver, "_thread", SimpleNamespace())
    for _ in range(2):
        cuda_driver.ensure_context(1)
    entering = [] if has_one else [("device", 1), ("retain", 31), ("enter", 7)]
    assert calls == [("current", 0), *entering]


def test_the_operation_asks_for_the_kernel_first_and_goes_on_where_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU that is made up: nothing runs."""
    tiles = replace(FOLDED_SM_90, gluon=gluon_sm_90(132))
    x, weights = folded_rows(300, SPLIT, "e3m2"), [random_weight(64, SPLIT, "e3m2")]
    answers: list[Any] = ["products", None]
    asked: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(gluon, "multiply", lambda *given: asked.append(given[2:]) or answers[len(asked) - 1])
    monkeypatch.setattr(TritonFolded, "_expand_and_multiply", lambda *_: "expanded")
    kernels = TritonFolded(tiles)
    assert kernels.multiply(x, weights, "e3m2", torch.bfloat16) == "products"
    monkeypatch.setattr(FoldedTiles, "uses_library", lambda *_: True)
    assert kernels.multiply(x, weights, "e3m2", torch.bfloat16) == "expanded"
    assert asked == [("e3m2", torch.bfloat16, tiles.gluon)] * 2


def test_kept_weights_are_multiplied_by_the_library_before_the_kernel_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = TritonFolded(replace(FOLDED_SM_90, gluon=gluon_sm_90(132)))
    weights = [random_weight(64, SPLIT, "e3m2", bias=True), random_weight(32, SPLIT, "e3m2", bias=True)]
    kept = [torch.full((len(one.row_scale), 192), 7, dtype=torch.uint8) for one in weights]
    given: list[Any] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(gluon, "multiply", lambda *_: "packed")
    monkeypatch.setattr(gluon, "multiply_again", lambda *_: "packed again")
    monkeypatch.setattr(hopper, "library_mm", lambda *one: given.append(one) or len(given))
    for rows, products, repeated in ((256, "packed", "packed again"), (257, [1, 2], None)):
        x = folded_rows(rows, SPLIT, "e3m2")
        assert kernels.multiply(x, weights, "e3m2", torch.bfloat16, expanded=kept) == products
        found = kernels.multiply_again(x, gluon.parts_of(weights), "e3m2", torch.bfloat16, has_expanded=True)
        assert found == repeated
    for (x, expanded, _), weight, w in zip(given, weights, kept, strict=True):
        assert len(x.q) == 257
        assert (expanded.w is w, expanded.row_scale is weight.row_scale, expanded.bias is weight.bias) == (True,) * 3


def again(x: FoldedActivation, weights: Sequence[FoldedWeight], planner: Planner, **changes: Any) -> bool:
    """Whether the launch is ready."""
    asked = {"fp6": "e3m2", "out_dtype": torch.bfloat16, "planner": planner} | changes
    return gluon.multiply_again(x, gluon.parts_of(weights), **asked) is not None


def test_what_was_multiplied_once_is_multiplied_again_without_a_question(driver: Driver) -> None:
    x, weights = folded_rows(70, SPLIT, "e3m2"), [random_weight(n, SPLIT, "e3m2", bias=True) for n in (136, 64)]
    planner = OnePlan(Plan(TILE, 6, 6))
    driver.kernel = GluonKernel.of(TILE, weights, "e3m2")
    assert not again(x, weights, planner)
    assert gluon.multiply(x, weights, "e3m2", torch.bfloat16, planner) is not None
    assert again(x, weights, planner)
    moved = x._replace(q=x.q.clone())
    assert again(moved, weights, planner)
    first, *_, last = ({k: v for k, v in passed.items() if not k.startswith("out")} for _, passed in driver.launches)
    assert {**last, "x": 0} == {**first, "x": 0}
    assert last["x"] == (moved.q.data_ptr(), *first["x"][1:])
    assert len(driver.launches) == 3


def test_only_the_same_is_multiplied_again(driver: Driver) -> None:
    """Whatever else has its place in memory is checked anew."""
    x, weights = folded_rows(70, SPLIT, "e3m2"), [random_weight(136, SPLIT, "e3m2", bias=True)]
    planner, (weight,) = OnePlan(Plan(TILE, 6, 6)), weights
    driver.kernel = GluonKernel.of(TILE, weights, "e3m2")
    gluon.multiply(x, weights, "e3m2", torch.bfloat16, planner)
    for name, part in weight._asdict().items():
        for other in (part.clone(), part[:1], part[:1].expand(part.shape)):
            assert not again(x, [weight._replace(**{name: other})], planner), name
    assert weight.bias is not None
    assert not again(x, [weight._replace(bias=weight.bias.view(torch.float16))], planner)
    assert not again(x, [weight, weight], planner)
    assert not again(x, [weight._replace(bias=None)], planner)
    assert not again(x._replace(q=x.q[:69]), weights, planner)
    assert not again(x._replace(row_scale=x.row_scale[:69]), weights, planner)
    assert not again(x._replace(q=x.q[:1].expand(x.q.shape)), weights, planner)
    assert not again(x._replace(row_scale=x.row_scale[:1].expand(70)), weights, planner)
    assert not again(x._replace(row_scale=torch.empty(71)[1:]), weights, planner)
    for change in ({"fp6": "e2m3"}, {"out_dtype": torch.float32}):
        assert not again(x, weights, planner, **change)
    assert not again(x, weights, gluon_sm_90(132))
    assert again(x, weights, planner)


def test_arguments_lie_apart() -> None:
    """Each of its own memory, descriptors at multiples of 64."""
    weights = [random_weight(n, SPLIT, "e2m3", bias=True) for n in (8, 8, 8)]
    kernel = GluonKernel.of(TILE, weights, "e2m3")
    values = {name: bytes([i % 250 + 1]) * (128 if i % 3 else 8) for i, name in enumerate(parameters_of(kernel))}
    per_call = ("x_row_scale", "partial", "locks", "out_0", "out_1", "out_2"), ("M", "whole")
    room = gluon_launch.room_for(kernel, values, *per_call)
    place = 0
    for name, kind in parameters_of(kernel).items():
        is_map = kind.startswith("tensordesc")
        if name not in ("x", *per_call[0], *per_call[1]):
            assert ctypes.string_at(room.pointers[place], len(values[name])) == values[name]
        assert not is_map or room.pointers[place] % 64 == 0
        place += 5 if is_map else 1
    assert place + 2 == len(room.pointers)
    assert set(boxes_of(kernel)) == {"x", "w4", "w6", "w8", "w_factor"}


def test_a_launch_with_experts_is_passed_weights_below_each_other(
    driver: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows are gathered first, in a launch that Triton's interpreter runs here."""
    monkeypatch.setattr(gluon_grouped, "_launches", {})
    monkeypatch.setattr(gluon_grouped, "load", lambda kernel, device: Loaded(FUNCTION, 256, 1000))
    monkeypatch.setattr(gluon_grouped, "raw_stream", lambda device: STREAM)
    monkeypatch.setattr(gluon_grouped, "current_device", lambda: -1)
    x, one = folded_rows(9, SPLIT, "e3m2"), folded_experts(3, 136, SPLIT, "e3m2", bias=True)
    w = one._replace(bias=None if one.bias is None else one.bias.bfloat16())
    rows, offs = torch.tensor([8, 0, 0, 5], dtype=torch.int32), torch.tensor([1, 1, 3], dtype=torch.int32)
    driver.kernel = GluonKernel.of(TILE, [w], "e3m2", experts=True)
    for _ in range(2):
        out = gluon_grouped.multiply(x.q, x.row_scale, rows, offs, w, "e3m2", TILE, 7)
    assert out is not None
    assert (out.shape, out.dtype) == ((4, 136), torch.bfloat16)
    grid, got = driver.launches[-1]
    assert grid == (7, 1, 1)
    assert len(driver.encoded) <= 6  # the weights' once
    width = x.q.shape[1]
    assert got["x"][1:] == (0, width, 4, width, 128, 128, 3)
    assert got["w4"] == (w.w4.data_ptr(), 3, 12, 3 * 136, 48, 32, 64, 3)
    assert got["w6"] == (w.w6.data_ptr(), 3, 4, 9 * 136, 16, 8, 64, 1)
    assert got["w8"] == (w.w8.data_ptr(), 3, 8, 3 * 136, 32, 32, 64, 3)
    assert got["w_factor"] == (w.factor.data_ptr(), 3, 136, 9, 4 * 136, 64, 2, 0)
    assert w.bias is not None
    pointers = {"out": out, "offs": offs, "w_row_scale": w.row_scale, "bias": w.bias}
    assert {name: got[name] for name in pointers} == {name: part.data_ptr() for name, part in pointers.items()}
    numbers = ("R", "N", "E", "column_tiles", "words", "blocks4", "blocks6", "blocks8")
    assert [got[name] for name in numbers] == [4, 136, 3, 3, 3, 3, 2, 1]


@pytest.mark.parametrize(
    ("version", "interprets", "reason"),
    [
        ("3.6.0", False, None), ("3.8.1", False, None), ("3.5.1", False, "3.6 to 3.8, this is 3.5.1"),
        ("3.9.0", False, "3.6 to 3.8, this is 3.9.0"), ("3.7.0", True, "interpreter"),
    ],
)  # fmt: skip
def test_which_tritons_compile_it(
    monkeypatch: pytest.MonkeyPatch, version: str, interprets: bool, reason: str | None
) -> None:
    import triton

    monkeypatch.setattr(triton, "__version__", version)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", interprets)
    refusal.cache_clear()
    found = refusal()
    refusal.cache_clear()
    assert (found is None) == (reason is None)
    assert reason is None or reason in (found or "")

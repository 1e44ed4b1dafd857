"""Who computes: what a device runs, one row a kind of device. The one answer for ops, passes, lowerings and reports.

A new chip is a row, its tiles and its templates. Rows of others come by `register_target`:

    remove = register_target(Row(serves=lambda device: device.type == "npu", target=lambda device: Target(name="...")))
"""

from __future__ import annotations

import importlib.util
import logging
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Final

import torch

from micromix_compile.numerics.rounding import PLAIN_STEPS, BlockSteps
from micromix_compile.targets import cpu, gluon_kernels
from micromix_compile.targets.exact import TritonExact
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, PROCESSORS
from micromix_compile.targets.gluon_tiles import gluon_sm_90
from micromix_compile.targets.grouped import TritonGrouped
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90
from micromix_compile.targets.hopper import TritonFolded
from micromix_compile.targets.kernels import (
    PLAIN_CACHE,
    PLAIN_EXACT,
    PLAIN_FOLDED,
    PLAIN_GROUPED,
    CacheKernels,
    ExactKernels,
    FoldedKernels,
    GroupedKernels,
)
from micromix_compile.targets.kv_cache import TRITON_CACHE
from micromix_compile.targets.rounding import TRITON_STEPS
from micromix_compile.targets.tiles import BF16, SM_90, SM_100, SM_120, MixedTiles

if TYPE_CHECKING:
    from collections.abc import Callable

logger = logging.getLogger(__name__)

EVERYWHERE: Final = frozenset({"fuse_rms_norm"})
WITH_TRITON: Final = EVERYWHERE | {"fuse_silu_mul", "sum_experts"}
FOLDED: Final = WITH_TRITON | {"fold_products", "fuse_residual"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """What serves the ops on one device, and all that differs by it.

    name: for people. emulated: why the work runs as plain PyTorch tensor operations, or None if it doesn't. exact,
    folded: who computes the operations of `ops.exact` and of `ops.folded`, and with which tiles. grouped, cache: who
    computes those of `ops.grouped` and of `ops.kv_cache`. steps: who rounds a block of weights. passes: which it has of
    the graph passes that not every device has, pre-grad and post-grad, by name. activations: what calibration there
    rounds activations to if nobody says (`layout.ACTIVATIONS`): 8 bits, but "same" where MXFP4 is multiplied faster
    than FP8. Rows that differ by whether products must be exact differ by passes only: operations ask by their device.
    """

    name: str
    emulated: str | None = None
    exact: ExactKernels = PLAIN_EXACT
    folded: FoldedKernels = PLAIN_FOLDED
    grouped: GroupedKernels = PLAIN_GROUPED
    cache: CacheKernels = PLAIN_CACHE
    steps: BlockSteps = PLAIN_STEPS
    passes: frozenset[str] = EVERYWHERE
    activations: str = "fp8"

    @property
    def takes(self) -> str:
        """What its products take: "mx", operands with block scales, or "folded" ones where those can be folded."""
        return "folded" if self.wants("fold_products") else "mx"

    def wants(self, name: str) -> bool:
        """Whether it has the pass of that name."""
        return name in self.passes


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """What is known of a device when its target is asked for.

    type: torch's. model: for people. capability: an NVIDIA GPU's, (0, 0) for anything else. processors: of a GPU.
    exact: whether products must be exact.
    """

    type: str
    model: str
    capability: tuple[int, int] = (0, 0)
    processors: int = PROCESSORS
    exact: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A kind of device. serves: whether one is of it. target: what then runs."""

    serves: Callable[[Device], bool]
    target: Callable[[Device], Target]


def target_of(device: torch.device, *, exact: bool = False) -> Target:
    """What runs on `device`. On a CPU this builds and loads the compiled kernels if they aren't yet."""
    index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
    return _target(device.type, index, exact)


def target_for(device: Device) -> Target:
    """What runs on a device that need not be here: of the first row that serves it."""
    return next(row for row in _rows if row.serves(device)).target(device)


def register_target(row: Row) -> Callable[[], None]:
    """Ask `row` before all others from now on. Returns what takes it back.

    For a CPU's exact operations it comes too late once the compiled kernels have been loaded, by the first operation or
    question about a CPU: torch calls those itself from then on.
    """

    def remove() -> None:
        if row in _rows:
            _rows.remove(row)
        _target.cache_clear()

    _rows.insert(0, row)
    _target.cache_clear()
    return remove


@cache
def _target(kind: str, index: int | None, exact: bool) -> Target:
    return target_for(_describe(kind, index, exact))


def _describe(kind: str, index: int | None, exact: bool) -> Device:
    if kind != "cuda":
        return Device(type=kind, model=kind, exact=exact)
    is_nvidia = torch.version.hip is None  # on another vendor's GPU the same numbers mean other things
    return Device(
        type=kind,
        model=torch.cuda.get_device_name(index),
        capability=torch.cuda.get_device_capability(index) if is_nvidia else (0, 0),
        processors=torch.cuda.get_device_properties(index).multi_processor_count,
        exact=exact,
    )


def _gpu(tiles: MixedTiles) -> Callable[[Device], Target]:
    """A GPU that runs the mixed matmul so."""

    def target(device: Device) -> Target:
        return Target(
            name=f"{device.model} ({tiles.name}: {tiles.mma})",
            exact=TritonExact(tiles),
            grouped=TritonGrouped(tiles),
            cache=TRITON_CACHE,
            steps=TRITON_STEPS,
            passes=WITH_TRITON,
            activations="same" if tiles.mode == "scaled" else "fp8",
        )

    return target


def _hopper(device: Device) -> Target:
    """sm_90, exact."""
    reason = gluon_kernels.refusal()
    if reason is not None:
        logger.info("%s: products that the persistent kernels take run as others do: %s", device.model, reason)
    gluon = gluon_sm_90(device.processors) if reason is None else None
    tiles = replace(FOLDED_SM_90, processors=device.processors, gluon=gluon)
    many = GROUPED_SM_90.many if reason is None else ()
    grouped = TritonGrouped(SM_90, replace(GROUPED_SM_90, processors=device.processors, many=many))
    return replace(_gpu(SM_90)(device), folded=TritonFolded(tiles), grouped=grouped)


def _hopper_folded(device: Device) -> Target:
    """sm_90, where bfloat16 models run on FP8 MMA."""
    mma = f"FP8 MMA of folded operands for bfloat16 models, {SM_90.mma} for others"
    return replace(_hopper(device), name=f"{device.model} ({SM_90.name}: {mma})", passes=FOLDED)


def _without_triton(device: Device) -> Target:
    return Target(name=device.model, emulated="Triton is not installed")


def _too_old(device: Device) -> Target:
    compute = ".".join(map(str, device.capability))
    reason = f"compute capability {compute} has no bfloat16 MMA, 8.0 is the least"
    return Target(name=device.model, emulated=reason)


def _cpu(_: Device) -> Target:
    if not cpu.load():
        return Target(name="cpu (plain PyTorch)", emulated=cpu.status().reason)
    return Target(
        name=f"cpu ({cpu.status().isa})", exact=cpu.COMPILED_EXACT, grouped=cpu.COMPILED_GROUPED,
        cache=cpu.COMPILED_CACHE,
    )  # fmt: skip


def _unknown(device: Device) -> Target:
    return Target(name=device.model, emulated="there are kernels for CPUs and for CUDA devices")


def _is_gpu(*majors: int) -> Callable[[Device], bool]:
    return lambda device: device.type == "cuda" and device.capability[0] in majors


_rows: list[Row] = [
    Row(serves=lambda d: d.type == "cuda" and importlib.util.find_spec("triton") is None, target=_without_triton),
    Row(serves=lambda d: _is_gpu(9)(d) and not d.exact, target=_hopper_folded),
    Row(serves=_is_gpu(9), target=_hopper),
    Row(serves=_is_gpu(10), target=_gpu(SM_100)),
    # Triton 3.6 emulates tl.dot_scaled on 12.1, for it takes block-scaled MMA for 12.0's alone.
    Row(serves=lambda d: _is_gpu(12)(d) and d.capability != (12, 1), target=_gpu(SM_120)),
    Row(serves=lambda d: d.type == "cuda" and (0, 0) < d.capability < (8, 0), target=_too_old),
    Row(serves=lambda d: d.type == "cuda", target=_gpu(BF16)),
    Row(serves=lambda d: d.type == "cpu", target=_cpu),
    Row(serves=lambda d: True, target=_unknown),
]
"""The first that serves a device is asked."""

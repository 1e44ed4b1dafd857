"""The persistent kernel compiled for sm_90, which isn't here: instructions, room, and both ways it could go wrong.

With any Triton that has it: `PYTHONPATH=<Triton 3.6> pytest tests/targets/test_gluon_offline.py`.
"""

from __future__ import annotations

import pickle
from dataclasses import asdict
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock
from support.covering import cover, params, runs_deep

from micromix_compile.numerics.formats import FP6_FORMATS
from micromix_compile.targets import cuda_driver, gluon_offline
from micromix_compile.targets.folded_tiles import FOLDED_SM_90, PROCESSORS
from micromix_compile.targets.gluon_kernels import boxes_of, parameters_of
from micromix_compile.targets.gluon_tiles import GluonKernel, gluon_sm_90
from micromix_compile.targets.grouped_tiles import GROUPED_SM_90
from micromix_compile.targets.groups import MAX_GROUP

if TYPE_CHECKING:
    from collections.abc import Sequence

    from micromix_compile.targets.gluon_offline import GluonCompiled

RESERVED = 1024  # bytes of shared memory that the system takes of each program

KERNELS = [
    GluonKernel(tile=tile, FP6=fp6, GROUPS=groups, HAS_BIAS=bias)
    for tile in gluon_sm_90(PROCESSORS).tiles
    for fp6 in FP6_FORMATS
    for groups, bias in ((1, False), (2, False), (MAX_GROUP, False), (MAX_GROUP, True))
]
KERNELS += [
    GluonKernel(tile=tile, FP6=fp6, GROUPS=1, HAS_BIAS=bias, EXPERTS=True)
    for tile in dict.fromkeys(tile for _, tile in GROUPED_SM_90.many)
    for fp6 in FP6_FORMATS
    for bias in (False, True)
]


def name(kernel: GluonKernel) -> str:
    """Such as `256x128-e2m3-3-bias`."""
    tile = f"{kernel.tile.BLOCK_M}x{kernel.tile.BLOCK_N}"
    return f"{tile}-{kernel.FP6}-{kernel.GROUPS}{'-bias' * kernel.HAS_BIAS}{'-experts' * kernel.EXPERTS}"


def properties(kernel: GluonKernel) -> tuple[object, ...]:
    """Of every run's: each tile with the most that it has, each format once."""
    has_most = kernel.HAS_BIAS and (kernel.GROUPS == MAX_GROUP or kernel.EXPERTS)
    return ((kernel.tile, kernel.EXPERTS), ("FP6", kernel.FP6)) if has_most else ()


QUICK = cover(KERNELS, properties)


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> dict[str, GluonCompiled]:
    """Everything this file looks at, compiled once."""
    kernels: Sequence[GluonKernel] = KERNELS if runs_deep(request) else QUICK
    path = tmp_path_factory.getbasetemp() / "gluon_offline"
    with FileLock(f"{path}.lock"):
        if not path.exists():
            path.write_bytes(pickle.dumps(gluon_offline.compile_all(kernels)))
        results: list[GluonCompiled] = pickle.loads(path.read_bytes())
    return {name(kernel): result for kernel, result in zip(kernels, results, strict=True)}


each_kernel = pytest.mark.parametrize("kernel", params(KERNELS, QUICK), ids=name)


@each_kernel
def test_each_consumer_multiplies_four_times_a_step_from_registers(
    compiled: dict[str, GluonCompiled], kernel: GluonKernel
) -> None:
    """Two steps a slot of MXFP4, one of the others; an instruction is 32 channels deep."""
    result = compiled[name(kernel)]
    loops = (("wgmma e4m3", 8), ("wgmma e4m3", 4), ("wgmma e4m3", 4))
    assert result.compiled.mma_blocks == loops * kernel.tile.consumers
    assert result.matrix_instructions == 16 * kernel.tile.consumers
    assert result.compiled.mma_ended == (True,) * 3 * kernel.tile.consumers
    assert not result.compiled.serialized
    assert not result.compiled.trap
    assert not result.compiled.flushing


@each_kernel
def test_nothing_is_written_where_wgmma_or_the_copy_engine_still_work(
    compiled: dict[str, GluonCompiled], kernel: GluonKernel
) -> None:
    assert compiled[name(kernel)].overwritten == ()
    assert compiled[name(kernel)].unfenced == ()


@each_kernel
def test_loops_of_steps_neither_spill_nor_count_in_vector_registers(
    compiled: dict[str, GluonCompiled], kernel: GluonKernel
) -> None:
    """Outside of them a few words are spilled: what a piece of work begins with. With three weights of five descriptors
    each the loops counted stages in vector registers: 67 to 71 us for 2 x 14336 x 4096 at 256 rows instead of 60."""
    result = compiled[name(kernel)]
    assert result.spills_in_loops == ()
    assert result.vector_counting == ()
    assert result.compiled.spilled_bytes <= 256


@each_kernel
def test_as_many_programs_as_are_counted_on_fit_a_processor(
    compiled: dict[str, GluonCompiled], kernel: GluonKernel
) -> None:
    result, tile = compiled[name(kernel)], kernel.tile
    shared = FOLDED_SM_90.shared_memory + RESERVED  # of a processor: a program may use all but what is reserved
    assert (result.compiled.shared_bytes + RESERVED) * tile.PER_SM <= shared
    assert result.compiled.registers <= tile.max_registers
    assert result.threads * tile.max_registers * tile.PER_SM <= 65536
    assert result.threads == 128 * (tile.consumers + 1)


@each_kernel
def test_nothing_is_read_or_written_before_the_wait_for_the_kernels_before(
    compiled: dict[str, GluonCompiled], kernel: GluonKernel
) -> None:
    assert compiled[name(kernel)].compiled.before_wait == ()


@each_kernel
def test_the_launcher_passes_what_triton_s_would(compiled: dict[str, GluonCompiled], kernel: GluonKernel) -> None:
    """A descriptor is followed by shape and strides, which nobody reads, all arguments by two scratch pointers."""
    result, types = compiled[name(kernel)], parameters_of(kernel)
    sizes: list[int] = []
    unread: set[int] = set()
    for kind in types.values():
        if kind.startswith("tensordesc"):
            unread |= set(range(len(sizes) + 1, len(sizes) + 5))
            sizes += [cuda_driver.MAP_BYTES, 4, 4, 8, 8]
        else:
            sizes.append(8 if kind.startswith("*") else 4)
    assert result.parameters == (*sizes, 8, 8)
    assert not unread & set(result.read)
    assert not {len(sizes), len(sizes) + 1} & set(result.read)
    boxes, of_triton = boxes_of(kernel), {0: 0, 3: 3, 8: 10}
    described = [one for one, kind in types.items() if kind.startswith("tensordesc")]
    wanted = [boxes[one if one in boxes else one.rpartition("_")[0]] for one in described]
    assert result.boxes == tuple(
        (box.rows, box.columns, cuda_driver.SWIZZLES[box.swizzle], of_triton[cuda_driver.DATA_TYPES[box.dtype]])
        for box in wanted
    )


def test_kernels_survive_json() -> None:
    assert [GluonKernel(**{**asdict(k), "tile": type(k.tile)(**asdict(k)["tile"])}) for k in KERNELS] == KERNELS

"""Every tile of the mixed matmul, compiled for GPUs that aren't here: which matrix instructions, how many, what room.

The quantize kernels too, of which only the room is of interest.

The counts are derived from the tiles. A kernel that Triton silently computes in bfloat16, that spills, or that it gave
up on, fails here and not on somebody's GPU. Every run compiles some cases: each tile once, and each kind of weights and
scales on each GPU. A `deep` run compiles all.
"""

from __future__ import annotations

import os
import pickle
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol, TypeVar

import pytest
import torch
from filelock import FileLock
from support.covering import cover, params, runs_deep
from support.digests import assert_recorded

from micromix_compile.numerics.layout import RowLayout, activation_shapes, activation_split
from micromix_compile.numerics.reference import QuantizedActivation
from micromix_compile.targets import offline, ptx, quantizers
from micromix_compile.targets.described import products_of
from micromix_compile.targets.offline import Kernel, NotSupported, kernel_of
from micromix_compile.targets.ptx import Compiled
from micromix_compile.targets.target import Device, target_for
from micromix_compile.targets.tiles import MIXED_TILES, MixedTiles, Tile

if TYPE_CHECKING:
    from collections.abc import Mapping

Name = TypeVar("Name")

SPILL_LIMIT = 0  # bytes a thread
MANY = quantizers.FEW_ROWS + 1
QUANTIZER_ROWS = (1, 16, quantizers.FEW_ROWS // 2, quantizers.FEW_ROWS, MANY)
ROUNDINGS = [(rows, "fit") for rows in QUANTIZER_ROWS] + [(MANY, "rceil")]
CAPABILITIES = (80, 89, 90, 100, 103, 120, 121)

# Extents of one matrix instruction along K, by kind.
DEPTH = {"mxf4": 64, "mxf4nvf4": 64, "mxf8f6f4": 32, "bf16": 16}


@dataclass(frozen=True)
class Case:
    """A tile on a target. w_fp4: all weights MXFP4. swizzled: weight scales are, and activation scales if they can.

    activations: as quantizers take them; all but "same" have one product.
    """

    capability: int
    family: str
    tile: Tile
    fp6: str = "e2m3"
    w_fp4: bool = False
    swizzled: bool = False
    bias: bool = True
    activations: str = "same"

    def __str__(self) -> str:
        """A test's name, such as `sm_100a-16x128x128-4w4s-swap-e2m3`."""
        t = self.tile
        parts = [offline.target_name(self.capability), f"{t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}"]
        parts += [f"{t.num_warps}w{t.num_stages}s", "swap" * t.SWAP, "w_fp4" if self.w_fp4 else self.fp6]
        parts += ["swizzled" * self.swizzled, "" if self.bias else "no_bias"]
        parts += ["" if self.activations == "same" else self.activations]
        return "-".join(part for part in parts if part)

    @property
    def kernel(self) -> Kernel:
        return offline.mixed_mx_mm(
            self.capability,
            self.tile,
            MIXED_TILES[self.family],
            w_fp4=self.w_fp4,
            fp6=self.fp6,
            x_swizzled=self.swizzled and self.tile.BLOCK_M % 128 == 0 and self.activations == "same",
            w_swizzled=self.swizzled,
            bias=self.bias,
            activations=self.activations,
        )


def variants(case: Case) -> list[Case]:
    """What one tile serves: FP6 of both kinds, MXFP4 weights, and on sm_100 swizzled scales; less for spare tiles."""
    default = case.tile in defaults(MIXED_TILES[case.family])
    if case.capability == 103:  # sm_100's kernels for another chip
        return [case] * default
    cases = [case, replace(case, w_fp4=True)]
    if case.capability == 100:
        cases += [replace(case, swizzled=True)] + [replace(case, swizzled=True, w_fp4=True)] * default
    if case.capability in (80, 90, 100, 120):
        cases += [replace(case, fp6="e3m2")] * default
    return cases + [replace(case, bias=False)] * (default and case.capability == 100)


@dataclass(frozen=True)
class QuantizeCase:
    """The reorder-quantize kernel on a target, for rows of some channels, behind a producer."""

    capability: int
    channels: int
    producer: str
    rows: int
    scale_rounding: str
    activations: str = "same"
    rotated: int = 0

    def __str__(self) -> str:
        """A test's name."""
        kind = f"{self.producer}-{self.channels}-{self.rows}-{self.scale_rounding}"
        kind += f"-{self.activations}" * (self.activations != "same") + "-rotated" * bool(self.rotated)
        return f"{offline.target_name(self.capability)}-{kind}"

    @property
    def kernel(self) -> Kernel:
        """The launch that `quantizers` would make for rows of bfloat16, at a split like 75/20/5."""
        k6, k8 = self.channels // 5 // 32 * 32, self.channels // 20 // 32 * 32
        x = torch.empty(self.rows, self.channels, dtype=torch.bfloat16, device="meta")
        layout = RowLayout(self.channels - k6 - k8, k6, k8, "e2m3", self.scale_rounding, self.activations, self.rotated)
        shapes = activation_shapes(self.rows, activation_split(layout.split, self.activations))
        outputs = QuantizedActivation(*(torch.empty(shape, dtype=torch.uint8, device="meta") for shape in shapes))
        other = {"none": None, "rms_norm": x[0], "silu_mul": x}[self.producer]
        permutation = torch.empty(self.channels, dtype=torch.int16, device="meta")
        call = quantizers.reorder_quantize_call(self.producer, x, other, 1e-5, permutation, outputs, layout)
        return kernel_of(call, self.capability)


def tiles_of(capability: int) -> MixedTiles:
    """Those of the target that a GPU gets, exact."""
    target = target_for(Device(type="cuda", model="a GPU", capability=divmod(capability, 10), exact=True))
    assert target.exact.tiles is not None
    return target.exact.tiles


def defaults(family: MixedTiles) -> list[Tile]:
    return [tiles[0] for _, tiles in family.tiles]


def table() -> list[Case]:
    """Every tile of the family that each target gets, in all variants."""
    cases = []
    for capability in CAPABILITIES:
        family = tiles_of(capability)
        tiles = dict.fromkeys(tile for _, tiles in family.tiles for tile in tiles)
        cases += [case for tile in tiles for case in variants(Case(capability, family.name, tile))]
    return cases


# Tiles that must not be used, each for the reason that its name gives.
BAD = {
    "two warps": Case(100, "sm_100", Tile(16, 128, 64, 2, 3, SWAP=True)),
    "64 rows on the left": Case(100, "sm_100", Tile(64, 16, 64, 4, 3)),
    "four warps for 128 x 128": Case(120, "sm_120", Tile(128, 128, 128, 4, 2)),
    "block scales on sm_121": Case(121, "sm_120", MIXED_TILES["sm_120"].tiles_for(256)[0]),
    "block scales on sm_110": Case(110, "sm_100", MIXED_TILES["sm_100"].tiles_for(256)[0]),
}
SAME = table()
WIDE = [replace(case, activations="fp8") for case in SAME if case.fp6 == "e2m3" and case.bias and not case.w_fp4]
TABLE = SAME + WIDE
QUANTIZE_SAME = [
    QuantizeCase(capability, channels, producer, rows, rounding)
    for capability in (90, 100, 120)
    for channels, producer in (
        *((4096, "none"), (4096, "rms_norm"), (14336, "none"), (14336, "rms_norm"), (14336, "silu_mul")),
        *((28672, "none"), (28672, "rms_norm"), (28672, "silu_mul")),
    )
    for rows, rounding in ROUNDINGS
]
# Other formats than the weights', and rotation, for which the rows' length and number make no difference but in size.
QUANTIZE_OTHERS = [
    replace(case, activations=activations, rotated=rotated)
    for case in QUANTIZE_SAME
    if case.rows in (QUANTIZER_ROWS[2], MANY) and case.scale_rounding == "fit" and case.channels < 28672
    for activations, rotated in (("same", 1024), ("fp8", 0), ("fp8", 1024), ("mxfp6", 0), ("mxfp6", 1024))
]
QUANTIZE = QUANTIZE_SAME + QUANTIZE_OTHERS
# With Triton 3.6. Parts of half the size spill nothing, but take a seventh to a quarter longer on an H100: 64 rows of
# 14336 behind an RMSNorm 7.1 us instead of 6.3, behind SiLU times up 8.0 instead of 6.3.
QUANTIZER_SPILLS = {
    "sm_90a-rms_norm-14336-64-fit": 8,
    "sm_120a-rms_norm-14336-64-fit": 8,
    "sm_90a-silu_mul-14336-64-fit": 4,
}
QUICK = cover(
    SAME,
    lambda case: (
        *((case.family, case.tile), (case.capability, "w_fp4", case.w_fp4, case.swizzled)),
        *((case.capability, case.fp6), (case.capability, "bias", case.bias)),
    ),
)
QUICK += cover(WIDE, lambda case: ((case.family, case.tile), (case.capability, case.swizzled)))
QUICK_QUANTIZE = cover(
    QUANTIZE_SAME,
    lambda case: (
        *((case.capability, case.producer, case.channels), (case.capability, case.rows, case.scale_rounding)),
        *((case.producer, case.rows, case.scale_rounding), (case.channels, case.rows, case.scale_rounding)),
    ),
)
QUICK_QUANTIZE += cover(
    QUANTIZE_OTHERS,
    lambda case: (
        *((case.capability, case.activations, case.rotated), (case.producer, case.activations, case.rotated)),
        *((case.producer, case.channels), (case.capability, case.channels, case.rows)),
    ),
)
UNWIDENED = replace(MIXED_TILES["sm_120"], widen_fp4=False)
OTHERS = {
    **{name: case.kernel for name, case in BAD.items()},
    "unwidened": offline.mixed_mx_mm(120, UNWIDENED.tiles_for(256)[0], UNWIDENED, w_fp4=True),
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Results:
    """Everything this file looks at: by case, the bad ones by name."""
    cases = (*TABLE, *QUANTIZE) if runs_deep(request) else (*QUICK, *QUICK_QUANTIZE)
    kernels: dict[Case | QuantizeCase | str, Kernel] = {case: case.kernel for case in cases}
    return compile_once(kernels | OTHERS, tmp_path_factory, "offline_compile")


def compile_once(
    kernels: Mapping[Name, Kernel], tmp_path_factory: pytest.TempPathFactory, file_name: str
) -> dict[Name, Compiled | NotSupported]:
    """What each kernel compiles to; equal ones are compiled once, and all by one of the processes that run tests."""
    folder = tmp_path_factory.getbasetemp()
    path = (folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder) / file_name
    with FileLock(f"{path}.lock"):
        if not path.exists():
            distinct = list({repr(kernel): kernel for kernel in kernels.values()}.values())
            results = offline.compile_all(distinct)
            path.write_bytes(
                pickle.dumps({repr(kernel): result for kernel, result in zip(distinct, results, strict=True)})
            )
        found: dict[str, Compiled | NotSupported] = pickle.loads(path.read_bytes())
    return {name: found[repr(kernel)] for name, kernel in kernels.items()}


@pytest.fixture
def result(compiled: Results, case: Case | QuantizeCase | str) -> Compiled:
    found = compiled[case]
    if isinstance(found, NotSupported):
        pytest.skip(found.reason)
    return found


class Results(Protocol):
    """What a case, or the name of a bad one, compiled to."""

    def __getitem__(self, key: Case | QuantizeCase | str, /) -> Compiled | NotSupported: ...


def each_case(function: object) -> object:
    return pytest.mark.parametrize("case", params(TABLE, QUICK), ids=str)(function)


def expected_step(case: Case) -> dict[str, tuple[int, int]]:
    """Kind -> (instructions of one step along K, segments that use the kind).

    The left operand of tcgen05.mma has 128 rows and of wgmma, which four warps share, 64; their right operand has up
    to 256. mma.sync is 16 x 8, and every warp has its own.
    """
    tile, family = case.tile, MIXED_TILES[case.family]
    left, right = (tile.BLOCK_N, tile.BLOCK_M) if tile.SWAP else (tile.BLOCK_M, tile.BLOCK_N)
    if case.family == "sm_100":
        per_k, kinds = (left // 128) * -(-right // 256), {"tcgen05.mma mxf4": 1, "tcgen05.mma mxf8f6f4": 2}
    elif family.mode == "scaled":
        per_k = left * right // (16 * 8) // tile.num_warps
        kinds = {"mma.sync mxf4nvf4": 1, "mma.sync mxf8f6f4": 2}
    elif case.capability == 90:
        per_k, kinds = (left // 64) * -(-right // 256) * 4 // tile.num_warps, {"wgmma bf16": 3}
    else:
        per_k, kinds = left * right // (16 * 8) // tile.num_warps, {"mma.sync bf16": 3}
    if case.activations != "same":  # no segment has MXFP4 on both sides
        kinds = {list(kinds)[-1]: 3}
    return {kind: (per_k * (tile.BLOCK_K // DEPTH[kind.split()[1]]), uses) for kind, uses in kinds.items()}


@each_case
def test_each_step_issues_the_matrix_instructions_that_the_tile_needs(case: Case, result: Compiled) -> None:
    """No other kind, so no bfloat16 beside block scales. A segment's first step may stand before its loop."""
    expected = expected_step(case)
    assert result.mma.keys() == expected.keys()
    for kind, (count, segments) in expected.items():
        assert count > 0
        steps = [found for name, found in result.mma_blocks if name == kind]
        assert set(steps) == {count}
        assert segments <= len(steps) <= 2 * segments


@each_case
def test_the_instructions_are_those_that_the_device_is_said_to_run(case: Case, result: Compiled) -> None:
    target = target_for(Device(type="cuda", model="a GPU", capability=divmod(case.capability, 10), exact=True))
    weights = "mxfp4" if case.w_fp4 else "same"
    (product,) = products_of(target, offline.SPLIT, weights=weights, activations=case.activations)
    assert set(" and ".join(product.kinds.values()).split(" and ")) == result.mma.keys()


@each_case
def test_nothing_is_emulated_where_the_family_says_scaled(case: Case, result: Compiled) -> None:
    assert result.emulated == (MIXED_TILES[case.family].mode != "scaled")


@each_case
def test_registers_do_not_spill(case: Case, result: Compiled) -> None:
    assert result.spilled_bytes <= SPILL_LIMIT
    assert 0 < result.registers <= 255


@each_case
def test_shared_and_tensor_memory_fit(case: Case, result: Compiled) -> None:
    """tcgen05 accumulates in tensor memory, nothing else has any."""
    assert 0 < result.shared_bytes <= MIXED_TILES[case.family].shared_memory
    assert result.tensor_columns <= ptx.TENSOR_MEMORY_COLUMNS
    assert (result.tensor_columns > 0) == (case.family == "sm_100")


@each_case
def test_the_code_is_for_the_target_and_neither_traps_nor_flushes_subnormals(case: Case, result: Compiled) -> None:
    assert result.target == offline.target_name(case.capability)
    assert all(result.mma_ended)
    assert bool(result.mma_ended) == (case.family == "sm_90")
    assert not result.trap
    assert not result.flushing


@pytest.mark.parametrize("case", params(QUANTIZE, QUICK_QUANTIZE), ids=str)
def test_quantize_kernels_neither_spill_nor_trap_nor_flush_subnormals(case: QuantizeCase, result: Compiled) -> None:
    """Only the norm's reciprocal square root may flush: its argument is at least eps."""
    assert result.target == offline.target_name(case.capability)
    usual = replace(case, activations="same", rotated=0)
    assert result.spilled_bytes <= QUANTIZER_SPILLS.get(str(usual), SPILL_LIMIT)
    assert not result.trap
    assert not result.half_defined
    assert not result.mma_blocks
    assert result.shared_bytes <= min(family.shared_memory for family in MIXED_TILES.values())
    assert set(result.flushing) <= ({"rsqrt.approx.ftz.f32"} if case.producer == "rms_norm" else set())


@pytest.mark.parametrize("case", params([*TABLE, *QUANTIZE, *OTHERS], [*QUICK, *QUICK_QUANTIZE, *OTHERS]), ids=str)
def test_the_ptx_is_what_is_recorded(
    case: Case | QuantizeCase | str, result: Compiled, request: pytest.FixtureRequest
) -> None:
    assert_recorded("ptx", str(case), result.ptx_digest, may_lack=runs_deep(request))


def test_every_tile_of_every_family_is_compiled_for_some_target() -> None:
    tiles = {(name, tile) for name, family in MIXED_TILES.items() for _, tiles in family.tiles for tile in tiles}
    assert {(case.family, case.tile) for case in QUICK} == tiles
    assert {case.capability for case in QUICK} == set(CAPABILITIES)


@pytest.mark.parametrize("name", ["two warps", "64 rows on the left"])
def test_a_tile_that_triton_silently_emulates_is_seen(compiled: Results, name: str) -> None:
    found = compiled[name]
    assert isinstance(found, Compiled)
    assert found.emulated
    assert not any(ptx.is_block_scaled(kind) for kind in found.mma)


def test_mxfp8_by_mxfp4_on_sm_120_is_seen_to_be_emulated_beside_block_scaled_instructions(
    compiled: Results,
) -> None:
    """Why the family widens MXFP4 weights. Once this fails, a newer Triton may not need it."""
    found = compiled["unwidened"]
    assert isinstance(found, Compiled)
    assert found.emulated
    assert found.mma.keys() == {"mma.sync mxf4nvf4", "mma.sync bf16"}


def test_spills_are_seen(compiled: Results) -> None:
    """Why 128 x 128 has eight warps on sm_120."""
    found = compiled["four warps for 128 x 128"]
    assert isinstance(found, Compiled)
    assert found.spilled_bytes > 100


@pytest.mark.parametrize("name", ["block scales on sm_121", "block scales on sm_110"])
def test_other_blackwell_chips_have_block_scaled_instructions(compiled: Results, name: str) -> None:
    """Where they don't, no row must choose scaled tiles, or nothing compiles there at all."""
    found = compiled[name]
    if isinstance(found, NotSupported):
        pytest.xfail(f"not supported: {found.reason}")
    if found.emulated:
        assert tiles_of(BAD[name].capability).mode != "scaled"
        pytest.xfail(f"not supported by the installed triton: it emulates tl.dot_scaled on {found.target}")
    assert found.mma.keys() == expected_step(BAD[name]).keys()

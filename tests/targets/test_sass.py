"""What is found in disassembled kernels: made-up pieces of code, each with one mistake."""

from __future__ import annotations

import pytest

from micromix_compile.targets.sass import Listing

MMA = "QGMMA.64x128x32.F32.E4M3.E4M3 R24, R88, gdesc[UR16], R24, gsb0"
ENDED = "WARPGROUP.DEPBAR.LE gsb0, 0x0"


def listing(*lines: str) -> Listing:
    """nvdisasm's form: labels end in a colon."""
    text = [line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
            for i, line in enumerate(lines)]  # fmt: skip
    return Listing.of("\n".join(text))


@pytest.mark.parametrize(
    ("writer", "is_wrong"),
    [
        ("IMAD.MOV.U32 R90, RZ, RZ, R1", True), ("LDS.128 R88, [R1]", True), ("LDSM.16.M88.4 R85, [R1]", True),
        ("@!P0 PRMT R91, R1, R2, R3", True), ("LDS.64 R87, [R1]", True), ("IMAD.MOV.U32 R92, RZ, RZ, R1", False),
        ("STS.128 [R88], R88", False), ("LDS.64 R86, [R1]", False), ("UIADD3 UR88, UR1, UR2", False),
        ("SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR19], RZ", False),
    ],
)  # fmt: skip
def test_what_writes_to_registers_of_a_wgmma_in_flight_is_found(writer: str, is_wrong: bool) -> None:
    assert listing(MMA, writer, ENDED).overwritten() == [(MMA, writer)] * is_wrong
    assert listing(MMA, ENDED, writer).overwritten() == []


def test_branches_are_followed_until_all_have_ended() -> None:
    writer = "MOV R88, R1"
    code = (MMA, "@P0 BRA `(.L_x_1)", ENDED, "EXIT", ".L_x_1:", writer, "EXIT")
    assert listing(*code).overwritten() == [(MMA, writer)]
    assert listing(MMA, "BRA `(.L_x_1)", writer, ".L_x_1:", ENDED, writer).overwritten() == []
    assert listing(MMA, MMA, ENDED).matrix_instructions() == 2
    assert listing("QGMMA.64x128x32.F32.E4M3.E4M3 R24, gdesc[UR16], R24").matrix_instructions() == 0


def loop(*lines: str) -> Listing:
    return listing(".L_x_0:", *lines, MMA, ENDED, "@P1 BRA `(.L_x_0)", "EXIT")


def test_a_stage_is_given_back_behind_a_fence() -> None:
    arrive, fence = "@!P0 SYNCS.ARRIVE.TRANS64.A1T0 RZ, [UR19+0x34f30], RZ", "FENCE.VIEW.ASYNC.S"
    for read in ("LDS R1, [R2]", "LDSM.16.M88.4 R16, [R16+UR13]"):
        assert loop(read, fence, arrive).unfenced() == []
        assert loop(read, arrive).unfenced() == [arrive]
        assert loop(fence, read, arrive, fence).unfenced() == [arrive]
    assert loop(arrive).unfenced() == []


def test_what_loops_keep_in_local_memory_and_count_in_vector_registers_is_found() -> None:
    assert loop("LDL R1, [R1+0x4]", "STL [R1], R2").spills_in_loops() == ["LDL R1, [R1+0x4]", "STL [R1], R2"]
    assert loop("R2UR UR4, R1").vector_counting() == ["R2UR UR4, R1"]
    outside = listing("STL [R1], R2", "R2UR UR4, R1", ".L_x_0:", MMA, ENDED, "@P1 BRA `(.L_x_0)", "EXIT")
    assert outside.spills_in_loops() == outside.vector_counting() == []


def test_only_the_innermost_loops_count_and_no_waiting_behind_the_end() -> None:
    code = listing(
        ".L_x_0:", "STL [R1], R2", ".L_x_1:", "UTMALDG.2D [UR8], [UR4]", "@P0 BRA `(.L_x_1)", "@P1 BRA `(.L_x_0)",
        ".L_x_2:", MMA, ENDED, "@P0 BRA `(.L_x_2)", "EXIT", "@P1 BRA `(.L_x_2)",
    )  # fmt: skip
    assert [len(one) for one in code.loops_of_steps()] == [2, 3]

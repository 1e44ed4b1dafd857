"""What `targets.ptx` reads in compiled kernels, on texts that are known; what `targets.offline` refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import TypeVar

import pytest
from test_offline_compile import TABLE

from micromix_compile.targets import offline, ptx
from micromix_compile.targets.ptx import Compiled

Name = TypeVar("Name")


@pytest.mark.parametrize(
    ("instruction", "kind"),
    [
        ("tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X", "tcgen05.mma mxf4"),
        ("tcgen05.mma.cta_group::1.kind::mxf8f6f4.block_scale.block32", "tcgen05.mma mxf8f6f4"),
        ("tcgen05.mma.cta_group::1.kind::f16", "tcgen05.mma f16"),
        (
            "mma.sync.aligned.m16n8k64.row.col.kind::mxf4nvf4.block_scale.scale_vec::2X.f32.e2m1.e2m1.f32.ue8m0",
            "mma.sync mxf4nvf4",
        ),
        ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "mma.sync bf16"),
        ("wgmma.mma_async.sync.aligned.m64n256k16.f32.bf16.bf16", "wgmma bf16"),
        ("wgmma.fence.sync.aligned;", None),
        ("tcgen05.cp.cta_group::1.32x128b.warpx4", None),
        ("mov.b32", None),
    ],
)
def test_matrix_instructions_are_told_apart_by_kind(instruction: str, kind: str | None) -> None:
    assert ptx.mma_kind(instruction) == kind
    assert kind is None or ptx.is_block_scaled(kind) == (".block_scale" in instruction)


def test_a_bare_trap_and_what_ptxas_says_are_seen() -> None:
    """A trap is what Triton makes of some kernels that are too large, without an error."""
    text = ".version 8.8\n.target sm_100a\n.visible .entry f()\n{\n\ttrap;\n\tmul.ftz.f32 %f1, %f1, %f1;\n}\n"
    binary = SimpleNamespace(asm={"ptx": text}, metadata=SimpleNamespace(shared=0, tmem_size=None))
    log = "ptxas info : Used 8 registers\n16 bytes spill stores, 8 bytes spill loads\n"
    found = ptx.inspect_binary(binary, log)
    assert found == Compiled(
        target="sm_100a",
        mma_blocks=(),
        registers=8,
        spilled_bytes=16,
        shared_bytes=0,
        tensor_columns=0,
        serialized=False,
        trap=True,
        flushing=("mul.ftz.f32",),
        before_wait=None,
        mma_ended=(),
        half_defined=(),
        ptx_digest=ptx.ptx_digest(text),
    )
    log += "ptxas info : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to it\n"
    assert ptx.inspect_binary(binary, log) == replace(found, serialized=True)
    assert found.emulated


def test_memory_instructions_before_the_wait_are_seen_but_for_prefetches_and_arguments() -> None:
    head = "\tld.param.b64 %rd1, [f_param_0];\n\tprefetch.global.L2 [%rd1];\n"
    early = "\tld.global.b32 %r1, [%rd1];\n\tcp.async.ca.shared.global [%r2], [%rd1], 16;\n"
    wait = "\tgriddepcontrol.wait;\n"
    assert ptx._before_wait(head + early) is None
    assert ptx._before_wait(head + wait + early) == ()
    assert ptx._before_wait(head + early + wait) == ("cp.async.ca.shared.global", "ld.global.b32")


def test_matrix_instructions_that_read_registers_are_waited_for_before_the_next_step() -> None:
    from_registers = "\twgmma.mma_async.sync.aligned.m64n16k32.f32.e4m3.e4m3 {%r1,%r2}, {%r3,%r4}, %rd1, %p1, 1, 1;\n"
    from_memory = from_registers.replace("{%r3,%r4}", "%rd2")
    some, all_ = (f"\twgmma.wait_group.sync.aligned {n};\n" for n in (3, 0))
    back = "\t@%p3 bra \t$L__BB0_1;\n"
    assert list(ptx._mma_ended(from_registers + back)) == [False]
    assert list(ptx._mma_ended(from_registers + some + back)) == [False]
    assert list(ptx._mma_ended(from_registers + all_ + from_registers + "$L__BB0_2:\n" + all_)) == [False]
    assert list(ptx._mma_ended(from_registers + some + all_ + back + from_registers)) == [True, False]
    assert list(ptx._mma_ended(from_memory + back)) == []


def test_packed_conversions_that_are_joined_with_nothing_are_seen() -> None:
    """ptxas 12.8 made bytes of its stack pointer, 0xFFFC60, of those that it joined so."""
    convert = "\tcvt.rn.satfinite.e4m3x2.f32  %rs1, %r2, %r3;\n"
    join = "\tmov.b32 \t%r4, {%rs1, %rs5};\n"
    assert list(ptx._half_defined(convert + join)) == ["%rs1"]
    for other in (
        "\tshr.u16 \t%rs5, %rs6, 8;\n",
        "\t@%p1 ld.shared.b16 \t%rs5, [%r1];\n",
        "\tmov.b32 \t{%rs7, %rs5}, %r6;\n",
    ):
        assert list(ptx._half_defined(convert + other + join)) == []
    assert list(ptx._half_defined(join)) == []


def test_instructions_are_counted_between_labels_and_branches() -> None:
    wgmma = "\twgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f1}, %rd1;\n"
    text = f"$L__BB0_1:\n{wgmma}{wgmma}$L__tmp1:\n{wgmma}\t@%p3 bra \t$L__BB0_1;\n{wgmma}"
    assert list(ptx._mma_blocks(text)) == [("wgmma bf16", 3), ("wgmma bf16", 1)]
    predicated = "\t@%p14 tcgen05.mma.cta_group::1.kind::mxf4.block_scale.scale_vec::2X [ %r664 + 0 ], %rd1;\n"
    assert Counter(ptx._mma_blocks(predicated)) == {("tcgen05.mma mxf4", 1): 1}


def test_a_digest_of_ptx_knows_instructions_but_not_where_their_source_stands() -> None:
    def text(path: str, line: int, module: str, label: int, value: int) -> str:
        return (
            f".visible .entry f()  // {path}\n{{\n\t.loc\t1 {line} 0  // {path}:{line}\n$L__func_begin0:\n"
            f"$L__tmp{label}:\n\tadd.s32 %r1, %r2, {value};\n\tcall micromix_compile_$_{module}_$_g__i32;\n\n}}\n"
            f'\t.file\t1 "{path}"\n\t.section\t.debug_info\n\t{{\n.b8 {line}  // {path}\n\t}}\n'
            f"\t.section\t.debug_macinfo\t{{\t}}\n"
        )

    digest = ptx.ptx_digest(text("/here/f.py", 1, "templates_$_fold", 2, 3))
    assert digest == ptx.ptx_digest(text("/there/f.py", 7, "fold", 8, 3))
    assert digest != ptx.ptx_digest(text("/here/f.py", 1, "templates_$_fold", 2, 4))
    assert re.fullmatch("[0-9a-f]{16}", digest)


def test_the_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would run the kernel's Python, not compile it."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"):
        offline.compile_kernel(TABLE[0].kernel)


def test_a_kernel_described_wrongly_is_refused_by_name() -> None:
    """The message comes from another process."""
    kernel = replace(TABLE[0].kernel, tensors={"x4": "*u8"})
    with pytest.raises(RuntimeError, match="mixed_mx_mm_kernel takes"):
        offline.compile_all([kernel], workers=1)


def test_importing_the_module_imports_no_triton_and_the_package_does_not_import_it() -> None:
    code = (
        "import sys, micromix_compile; print('micromix_compile.targets.offline' in sys.modules); "
        "import micromix_compile.targets.offline; print('triton' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["False", "False"], done.stderr

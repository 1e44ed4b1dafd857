"""What a kernel may do ahead of its inputs (sm_90 on): start while the kernel before it runs, ask L2 for bytes.

A kernel launched with Triton's option `launch_pdl` (programmatic dependent launch) starts when all programs of the one
before it have ended, or allowed it earlier, and does not wait for the GPU to make their results visible: it does that
itself. Until then it may read and write nothing that another kernel writes, or reads: where the one before it allows it
to start first thing, kernels before that one may still run. As each program of such a kernel waits, one that has ended
says that all before it have.

Such a kernel has a constant `LAUNCH_PDL`, by which launchers know, and without which it does none of this: Inductor's
analysis of what a kernel writes gives up at such instructions.
"""

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def wait_for_inputs():
    """Wait until all that earlier kernels wrote is there. Of no effect in a kernel that is launched as usual."""
    if not _INTERPRETED:
        tl.extra.cuda.gdc_wait()


@triton.jit
def let_next_start():
    """Let the next kernel start as soon as all programs of this one have come here or ended."""
    if not _INTERPRETED:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def prefetch(pointers, mask):
    """Ask L2 for what lies at pointers, of any shape, where mask is true; it reads nothing and may come first."""
    if not _INTERPRETED:
        tl.inline_asm_elementwise(
            "{ .reg .pred inside; setp.ne.s32 inside, $2, 0; @inside prefetch.global.L2 [$1]; mov.b32 $0, 0; }",
            "=r,l,r", [pointers.to(tl.int64), mask.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        )  # fmt: skip

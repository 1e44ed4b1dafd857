"""Sums of parts of a tile, left in memory by programs for the one that has the tile's end.

They lie there as threads hold them, four neighbours a thread and the threads side by side: reads and writes are of
whole lines.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from micromix_compile.templates.gluon.language import barrier
from micromix_compile.templates.gluon.shares import first_program_of


@gluon.jit
def _as_held(acc):
    """(64, M) of WGMMA's results -> (64 * M,), four neighbours of which are one thread's. No register moves."""
    M: gl.constexpr = acc.shape[1]
    parts = gl.reshape(acc, [4, 2, 8, M // 8, 4, 2])  # a row's warp, half and lane; a column's block, lane and register
    return gl.reshape(gl.permute(parts, [3, 0, 2, 4, 1, 5]), [64 * M])


@gluon.jit
def _as_result(held, layout: gl.constexpr):
    """Back."""
    M: gl.constexpr = held.shape[0] // 64
    parts = gl.permute(gl.reshape(held, [M // 8, 4, 8, 4, 2, 2]), [1, 4, 2, 0, 3, 5])
    return gl.convert_layout(gl.reshape(parts, [64, M]), layout, assert_trivial=True)


@gluon.jit
def _place_of(program, C: gl.constexpr, ME: gl.constexpr):
    """Of a program's and consumer's part among all: it leaves one at most."""
    return program * (C.BLOCK_N // 64) + ME


@gluon.jit
def leave_part(acc, partial, locks, C: gl.constexpr, ME: gl.constexpr):
    """Write a part's sum, then say so by the lock, which is zero until then."""
    held = _as_held(acc)
    layout: gl.constexpr = held.type.layout
    place = _place_of(gl.program_id(0), C, ME)
    gl.store(partial + place * (64 * C.BLOCK_M) + gl.arange(0, 64 * C.BLOCK_M, layout), held)
    barrier()  # all threads' sums are written before the one that says so
    gl.atomic_add(locks + place, 1, sem="release")


@gluon.jit
def add_parts(acc, partial, locks, tile, tiles, whole, steps, C: gl.constexpr, ME: gl.constexpr):
    """acc with the sums of a tile's other parts, always in the same order. Locks are zero again afterwards."""
    layout: gl.constexpr = acc.type.layout
    held = _as_held(acc)
    line: gl.constexpr = held.type.layout
    for program in range(first_program_of(tile, tiles, whole, steps), gl.program_id(0)):
        place = _place_of(program, C, ME)
        while gl.atomic_add(locks + place, 0, sem="acquire") == 0:
            pass
        gl.store(locks + place, 0)
        cells = partial + place * (64 * C.BLOCK_M) + gl.arange(0, 64 * C.BLOCK_M, line)
        held += gl.load(cells, cache_modifier=".cg")
    return _as_result(held, layout)

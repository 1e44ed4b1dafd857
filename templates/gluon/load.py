"""The two partitions that load: a warp each, TMA into rings of stages in shared memory.

x: tiles of (BLOCK_M, 128) E4M3, a step each. Weights: packed words and factors, a slot each: 256 channels of MXFP4, or
128 of MXFP6 or MXFP8, which are 128, 96 or 128 bytes of a row. `full` and `empty` are barriers, one a stage.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from micromix_compile.templates.gluon.shares import (
    desc_of_group,
    of_group,
    piece_of,
    pieces_of,
    place_of,
    slot_of,
    step_of,
)
from micromix_compile.templates.gluon.unpack import PLANE

K_STEP = gl.constexpr(128)
"""Channels of a step."""


@gluon.jit
def column_of(step, slots4, slots6, blocks4, blocks6):
    """Where a step begins in a row of x. A segment's last may reach into the next one, for weights that are zeros."""
    beyond = step - 2 * slots4
    behind6 = (blocks4 + (blocks6 + 1) // 2 * 2) * 32 + (beyond - slots6) * K_STEP
    inside6 = blocks4 * 32 + beyond * K_STEP
    return gl.where(beyond < 0, step * K_STEP, gl.where(beyond < slots6, inside6, behind6))


@gluon.jit
def load_x(args, C: gl.constexpr):
    """All steps of all pieces, one after the other."""
    x_desc, rings, share, sizes = args
    x_ring, p_ring, f_ring, bars = rings
    x_full, x_empty, p_full, p_empty, turns = bars
    row_tiles, column_tiles, tiles0, tiles1, whole, slots4, slots6, slots8, blocks4, blocks6 = sizes
    steps = 2 * slots4 + slots6 + slots8
    it = 0
    for piece in range(pieces_of(share, steps)):
        tile, first, last = piece_of(share, piece, whole, steps)
        row, column = place_of(tile, row_tiles, column_tiles, C.GROUP_M)
        for step in range(step_of(slot_of(first, slots4), slots4), step_of(slot_of(last, slots4), slots4)):
            stage = it % C.X_STAGES
            mbarrier.wait(x_empty.index(stage), (it // C.X_STAGES & 1) ^ 1)
            mbarrier.expect(x_full.index(stage), x_desc.block_type.nbytes)
            where = [row * C.BLOCK_M, column_of(step, slots4, slots6, blocks4, blocks6)]
            tma.async_copy_global_to_shared(x_desc, where, x_full.index(stage), x_ring.index(stage))
            it += 1


@gluon.jit
def load_slot(descs, corner, slot, slots4, slots6, blocks4, packed, factors, landed, C: gl.constexpr):
    """A slot of a tile's weights and factors.

    corner: (row of w4 and w8, row of w6's first plane, rows from a plane to the next, row of factors, column of them)
    that the tile begins with.
    """
    w4_desc, w6_desc, w8_desc, f_desc = descs
    n, n6, plane_rows, above, column = corner
    LINE: gl.constexpr = C.BLOCK_N * 4
    word = above + gl.where(slot < slots4, 2 * slot, (blocks4 + 3) // 4 + slot - slots4)
    if slot < slots4:
        mbarrier.expect(landed, (32 + 2) * LINE)
        tma.async_copy_global_to_shared(w4_desc, [n, slot * 32], landed, packed)
    elif slot < slots4 + slots6:
        mbarrier.expect(landed, (24 + 2) * LINE)
        planes = packed._reinterpret(gl.int32, [4, C.BLOCK_N, 8], PLANE)
        for plane in gl.static_range(3):
            where = [n6 + plane * plane_rows, (slot - slots4) * 8]
            tma.async_copy_global_to_shared(w6_desc, where, landed, planes.index(plane))
    else:
        mbarrier.expect(landed, (32 + 2) * LINE)
        tma.async_copy_global_to_shared(w8_desc, [n, (slot - slots4 - slots6) * 32], landed, packed)
    tma.async_copy_global_to_shared(f_desc, [word, column], landed, factors)


@gluon.jit
def load_w(args, C: gl.constexpr):
    """All slots of all pieces."""
    groups, rings, share, sizes = args
    w4, w6, w8, f, N = groups
    x_ring, p_ring, f_ring, bars = rings
    x_full, x_empty, p_full, p_empty, turns = bars
    row_tiles, column_tiles, tiles0, tiles1, whole, slots4, slots6, slots8, blocks4, blocks6 = sizes
    steps = 2 * slots4 + slots6 + slots8
    at = 0
    for piece in range(pieces_of(share, steps)):
        tile, first, last = piece_of(share, piece, whole, steps)
        row, column = place_of(tile, row_tiles, column_tiles, C.GROUP_M)
        w4_desc = desc_of_group(column, tiles0, tiles1, w4[0], w4[1], w4[2], C.GROUPS)
        w6_desc = desc_of_group(column, tiles0, tiles1, w6[0], w6[1], w6[2], C.GROUPS)
        w8_desc = desc_of_group(column, tiles0, tiles1, w8[0], w8[1], w8[2], C.GROUPS)
        f_desc = desc_of_group(column, tiles0, tiles1, f[0], f[1], f[2], C.GROUPS)
        rows = of_group(column, tiles0, tiles1, N[0], N[1], N[2], C.GROUPS)
        descs = (w4_desc, w6_desc, w8_desc, f_desc)
        n = (column - of_group(column, tiles0, tiles1, 0, tiles0, tiles1, C.GROUPS)) * C.BLOCK_N
        for slot in range(slot_of(first, slots4), slot_of(last, slots4)):
            stage = at % C.P_STAGES
            mbarrier.wait(p_empty.index(stage), (at // C.P_STAGES & 1) ^ 1)
            packed, factors = p_ring.index(stage), f_ring.index(stage)
            load_slot(
                descs, (n, n, rows, 0, n), slot, slots4, slots6, blocks4, packed, factors, p_full.index(stage), C
            )  # fmt: skip
            at += 1

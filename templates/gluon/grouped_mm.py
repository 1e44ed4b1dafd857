"""Products of folded activations with the packed weights of experts (sm_90), for experts of many rows: persistent.

Roles, rings, loads and arithmetic are those of `folded_mm`. What differs is which rows and which weight a tile has.
Rows lie expert after expert, gathered (`templates.triton.gather_rows`), weights below each other. How many rows an
expert has is known on the device only: each role walks through the experts' ends and takes every so manieth tile.

Rows behind the last expert's are multiplied with the last expert's weight, and what comes of it is not taken: that
they are there is rare, and a loop that some tiles leave out would keep numbers of stages in vector registers. Their
scales are zeros.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from micromix_compile.templates.gluon.folded_mm import add_slots, make_rings, store_tile
from micromix_compile.templates.gluon.language import uniform, wait_for_inputs
from micromix_compile.templates.gluon.load import column_of, load_slot


@gluon.jit
def _end_of(offs, expert, R, E):
    """Where the rows of an expert end; those of none, which come as expert E, at R."""
    end = gl.load(offs + gl.minimum(expert, E - 1))
    return uniform(gl.where(expert < E, gl.minimum(end, R), R))


@gluon.jit
def _first(offs, R, E):
    """Where a role begins: (expert, tiles before it, where its rows begin and end)."""
    return 0, 0, 0, _end_of(offs, 0, R, E)


@gluon.jit
def _walk(place, tile, offs, R, E, column_tiles, C: gl.constexpr):
    """(expert, tiles before it, where its rows begin and end) of a tile, from those of one before it.

    Tiles of an expert that multiply the same weights follow each other, so that L2 has these. expert: E + 1 for tiles
    that aren't there.
    """
    expert, before, start, end = place
    behind = before + gl.cdiv(end - start, C.BLOCK_M) * column_tiles
    while (expert <= E) & (tile >= behind):
        expert += 1
        before = behind
        start = end
        end = gl.maximum(_end_of(offs, expert, R, E), start)
        behind = before + gl.cdiv(end - start, C.BLOCK_M) * column_tiles
    return expert, before, start, end


@gluon.jit
def _corner(place, tile, C: gl.constexpr):
    """(first row, column of tiles) of a tile."""
    expert, before, start, end = place
    height = gl.cdiv(end - start, C.BLOCK_M)
    return start + (tile - before) % height * C.BLOCK_M, (tile - before) // height


@gluon.jit
def _load_x(args, C: gl.constexpr):
    """All steps of all tiles, one after the other."""
    x_desc, rings, routing, slots = args
    x_ring, p_ring, f_ring, bars = rings
    x_full, x_empty, p_full, p_empty, turns = bars
    offs, R, E, column_tiles = routing
    slots4, slots6, slots8, blocks4, blocks6 = slots
    it = 0
    tile = gl.program_id(0)
    place = _walk(_first(offs, R, E), tile, offs, R, E, column_tiles, C)
    while place[0] <= E:
        row, column = _corner(place, tile, C)
        for step in range(2 * slots4 + slots6 + slots8):
            stage = it % C.X_STAGES
            mbarrier.wait(x_empty.index(stage), (it // C.X_STAGES & 1) ^ 1)
            mbarrier.expect(x_full.index(stage), x_desc.block_type.nbytes)
            where = [row, column_of(step, slots4, slots6, blocks4, blocks6)]
            tma.async_copy_global_to_shared(x_desc, where, x_full.index(stage), x_ring.index(stage))
            it += 1
        tile += gl.num_programs(0)
        place = _walk(place, tile, offs, R, E, column_tiles, C)


@gluon.jit
def _load_w(args, C: gl.constexpr):
    """All slots of all tiles. words: rows of factors that an expert has."""
    descs, rings, routing, slots, N, words = args
    x_ring, p_ring, f_ring, bars = rings
    x_full, x_empty, p_full, p_empty, turns = bars
    offs, R, E, column_tiles = routing
    slots4, slots6, slots8, blocks4, blocks6 = slots
    at = 0
    tile = gl.program_id(0)
    place = _walk(_first(offs, R, E), tile, offs, R, E, column_tiles, C)
    while place[0] <= E:
        row, column = _corner(place, tile, C)
        expert = gl.minimum(place[0], E - 1)
        n = column * C.BLOCK_N
        corner = (expert * N + n, expert * 3 * N + n, N, expert * words, n)
        for slot in range(slots4 + slots6 + slots8):
            stage = at % C.P_STAGES
            mbarrier.wait(p_empty.index(stage), (at // C.P_STAGES & 1) ^ 1)
            packed, factors = p_ring.index(stage), f_ring.index(stage)
            load_slot(descs, corner, slot, slots4, slots6, blocks4, packed, factors, p_full.index(stage), C)
            at += 1
        tile += gl.num_programs(0)
        place = _walk(place, tile, offs, R, E, column_tiles, C)


@gluon.jit
def _multiply(args, C: gl.constexpr, ME: gl.constexpr):
    """A consumer: 64 weights of every tile."""
    rings, out_ring, x_row_scale, result, routing, slots = args
    out, w_row_scale, bias, N = result
    offs, R, E, column_tiles = routing
    slots4, slots6, slots8, blocks4, blocks6 = slots
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_M, 32])
    at = 0
    it = 0
    tile = gl.program_id(0)
    place = _walk(_first(offs, R, E), tile, offs, R, E, column_tiles, C)
    while place[0] <= E:
        row, column = _corner(place, tile, C)
        has_expert = place[0] < E
        above = gl.minimum(place[0], E - 1).to(gl.int64) * N
        n_first = column * C.BLOCK_N + 64 * ME
        n = n_first + gl.arange(0, 64, gl.SliceLayout(1, layout))
        inside = (n < N) & has_expert
        scale = gl.load(w_row_scale + above + n, mask=inside, other=0.0)
        offset = scale
        if C.HAS_BIAS:
            offset = gl.load(bias + above + n, mask=inside, other=0.0).to(gl.float32)
        acc = gl.zeros([64, C.BLOCK_M], gl.float32, layout)
        acc, at, it = add_slots(acc, rings, 0, slots4 + slots6 + slots8, at, it, slots4, slots6, C, ME)
        acc = gl.where(has_expert, acc, 0.0)
        store_tile(acc, out, out_ring, x_row_scale, scale, offset, row, n_first, place[3], N, C, ME)
        tile += gl.num_programs(0)
        place = _walk(place, tile, offs, R, E, column_tiles, C)


@gluon.jit
def grouped_mm_rows_kernel(
    x,  # descriptors, a box each, of: (R, `folding.fold_width`) E4M3, rows in the order of the output's
    w4,  # (E * N, K4 / 8) int32, `packing`'s bytes
    w6,  # (E * 3 * N, K6 / 16) int32
    w8,  # (E * N, K8 / 4) int32
    w_factor,  # (E * words, N) int32, of `folding.weight_factor`
    out,  # (R, N) bfloat16
    x_row_scale,  # (R,) float32
    offs,  # (E,) int32: where each expert's rows end
    w_row_scale,  # (E, N) float32
    bias,  # (E, N), or None
    R, N, E,
    column_tiles,  # in a row of tiles
    words,  # of factors that a row has
    blocks4, blocks6, blocks8,
    C: gl.constexpr,  # `language.Constants` of a `targets.gluon_tiles.GluonKernel`
):  # fmt: skip
    """out = (x @ w.T) * x_row_scale * w_row_scale + bias with each row's expert's weight, rounded once.

    Rows that no expert has become zeros.
    """
    CONSUMERS: gl.constexpr = C.BLOCK_N // 64
    rings = make_rings(x, w8, w_factor, C)
    out_ring = gl.allocate_shared_memory(
        gl.bfloat16, [CONSUMERS * 2, C.CHUNK, 64], gl.NVMMASharedLayout(128, 16, rank=2)
    )  # fmt: skip
    fence_async_shared()
    wait_for_inputs()

    slots = (gl.cdiv(blocks4, 8), gl.cdiv(blocks6, 4), gl.cdiv(blocks8, 4), blocks4, blocks6)
    routing = (offs, R, E, column_tiles)
    args = (rings, out_ring, x_row_scale, (out, w_row_scale, bias, N), routing, slots)
    for_w = ((w4, w6, w8, w_factor), rings, routing, slots, N, words)
    for_x = (x, rings, routing, slots)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_multiply, (args, C, gl.constexpr(0))), (_load_w, (for_w, C)), (_load_x, (for_x, C))],
            [1, 1],
            [C.LOADER, C.LOADER],
        )
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (_multiply, (args, C, gl.constexpr(0))), (_multiply, (args, C, gl.constexpr(1))),
                (_load_w, (for_w, C)), (_load_x, (for_x, C)),
            ],
            [4, 1, 1],
            [C.CONSUMER, C.LOADER, C.LOADER],
        )  # fmt: skip

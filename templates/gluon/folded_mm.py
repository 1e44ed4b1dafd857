"""Product of folded activations and packed weights (sm_90) for 64 to 1,024 rows: persistent, a role a warp group.

Two warps load (`load`). BLOCK_N / 64 consumers of four warps multiply 64 weights each: they unpack a step's to the
registers from which WGMMA takes its left operand (`unpack`), start its instructions, and wait for their end. While one
unpacks, another's instructions keep the tensor cores busy. Nothing that is unpacked is ever in memory.

Up to three weights that read one activation are one launch: a tile belongs to one of them. Tiles that don't fill a
round of programs are shared (`shares`, `partial_sums`).

Nothing with a branch may stand between `warpgroup_mma` and its wait, and `mbarrier.wait` has one: ptxas keeps other
values out of the registers that the instructions still read only as far as the end of a basic block.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from micromix_compile.templates.gluon.language import barrier, wait_for_inputs
from micromix_compile.templates.gluon.load import load_w, load_x
from micromix_compile.templates.gluon.partial_sums import add_parts, leave_part
from micromix_compile.templates.gluon.shares import (
    of_group,
    piece_of,
    pieces_of,
    place_of,
    share_of,
    slot_of,
)
from micromix_compile.templates.gluon.unpack import fold_fp4, fold_fp6, fold_fp8, load_fp4


@gluon.jit
def _add_step(acc, words, x_ring, bars, it, C: gl.constexpr, ME: gl.constexpr):
    """acc + words @ x.T of a step. words: (64, 32), four E4M3 each.

    Two consumers take turns where TURNS: else their instructions mingle, and then both unpack while the tensor cores
    are idle. Triton knows no cast from words to bytes: four references to a word take its bytes' places.
    """
    x_full, x_empty, p_full, p_empty, turns = bars
    stage = it % C.X_STAGES
    operand: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 4)
    mbarrier.wait(x_full.index(stage), it // C.X_STAGES & 1)
    twice = gl.join(words, words)
    four = gl.reshape(gl.join(twice, twice), [64, 128])
    left = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r,r,r,r", [four], dtype=gl.uint8, is_pure=True, pack=4)
    left = gl.convert_layout(left, operand, assert_trivial=True).to(gl.float8e4nv, bitcast=True)
    if C.TURNS:
        mbarrier.wait(turns.index(ME), (it & 1) ^ (1 - ME))
    acc = warpgroup_mma(left, x_ring.index(stage).permute([1, 0]), acc, is_async=True)
    if C.TURNS:
        mbarrier.arrive(turns.index(1 - ME), count=1)
    acc = warpgroup_mma_wait(num_outstanding=0, deps=(acc,))
    mbarrier.arrive(x_empty.index(stage), count=1)
    return acc


@gluon.jit
def add_slots(acc, rings, first, last, at, it, slots4, slots6, C: gl.constexpr, ME: gl.constexpr):
    """acc and all slots from `first` to `last`. at, it: slots and steps so far."""
    x_ring, p_ring, f_ring, bars = rings
    for _ in range(first, gl.minimum(last, slots4)):
        one, two, rows1, rows2 = load_fp4(p_ring, f_ring, bars, at, C, ME)
        acc = _add_step(acc, fold_fp4(one, rows1), x_ring, bars, it, C, ME)
        acc = _add_step(acc, fold_fp4(two, rows2), x_ring, bars, it + 1, C, ME)
        at += 1
        it += 2
    for _ in range(gl.maximum(first, slots4), gl.minimum(last, slots4 + slots6)):
        acc = _add_step(acc, fold_fp6(p_ring, f_ring, bars, at, C, ME), x_ring, bars, it, C, ME)
        at += 1
        it += 1
    for _ in range(gl.maximum(first, slots4 + slots6), last):
        acc = _add_step(acc, fold_fp8(p_ring, f_ring, bars, at, C, ME), x_ring, bars, it, C, ME)
        at += 1
        it += 1
    return acc, at, it


@gluon.jit
def store_rows(acc, out, ring, m, n, M, N, C: gl.constexpr, ME: gl.constexpr, INDEX: gl.constexpr):
    """acc (64, ...) transposed and stored from out[m, n] on, CHUNK rows at a time, as far as it lies inside.

    Through shared memory, for whole lines. Not by TMA: another three descriptors would cost a host's time at each call,
    and the loops the uniform registers (with 16 of them ptxas counts stages in others).
    """
    ROWS: gl.constexpr = acc.shape[1]
    if ROWS > C.CHUNK:
        upper, lower = gl.split(gl.permute(gl.reshape(acc, [64, 2, ROWS // 2]), [0, 2, 1]))
        store_rows(upper, out, ring, m, n, M, N, C, ME, INDEX * 2)
        store_rows(lower, out, ring, m + ROWS // 2, n, M, N, C, ME, INDEX * 2 + 1)
    else:
        layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
        buffer = ring.index(ME * 2 + INDEX % 2)  # of two: threads that still read are at most one chunk behind
        buffer.permute([1, 0]).store(acc.to(gl.bfloat16))
        barrier()
        row = m + gl.arange(0, C.CHUNK, gl.SliceLayout(1, layout))[:, None]
        column = n + gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
        lines = N // 8  # whole ones: the refusal of all else is `targets.gluon_tiles`'s
        inside = (row < M) & (column // 8 < lines)
        gl.store(out + row.to(gl.int64) * (lines * 8) + column, buffer.load(layout), mask=inside)


@gluon.jit
def store_tile(acc, out, out_ring, x_row_scale, scale, offset, m, n, M, N, C: gl.constexpr, ME: gl.constexpr):
    """acc * scales + bias, rounded once. scale, offset: of its 64 weights.

    Scales of x are read two at a time: the one behind an odd number of rows lies in the same 8 bytes, aligned memory of
    one allocation, and what comes of it is not stored.
    """
    row = m + gl.arange(0, C.BLOCK_M, gl.SliceLayout(0, acc.type.layout))
    if m + C.BLOCK_M <= M:
        x_scale = gl.load(x_row_scale + row)
    else:
        x_scale = gl.load(x_row_scale + row, mask=row // 2 * 2 < M, other=0.0)
    result = acc * scale[:, None] * x_scale[None, :]
    if C.HAS_BIAS:
        result += offset[:, None]
    barrier()  # nobody reads the last tile's any more
    store_rows(result, out, out_ring, m, n, M, N, C, ME, 0)


@gluon.jit
def _multiply(args, C: gl.constexpr, ME: gl.constexpr):
    """A consumer: 64 weights of every piece."""
    rings, out_ring, x_row_scale, groups, shared, share, sizes, M = args
    outs, w_row_scales, biases, N = groups
    partial, locks = shared
    row_tiles, column_tiles, tiles0, tiles1, whole, slots4, slots6, slots8, blocks4, blocks6 = sizes
    steps = 2 * slots4 + slots6 + slots8
    tiles = row_tiles * column_tiles
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_M, 32])
    at = 0
    it = 0
    for piece in range(pieces_of(share, steps)):
        tile, first, last = piece_of(share, piece, whole, steps)
        row, column = place_of(tile, row_tiles, column_tiles, C.GROUP_M)
        before = of_group(column, tiles0, tiles1, 0, tiles0, tiles1, C.GROUPS)
        n_first = (column - before) * C.BLOCK_N + 64 * ME
        n = n_first + gl.arange(0, 64, gl.SliceLayout(1, layout))
        columns = of_group(column, tiles0, tiles1, N[0], N[1], N[2], C.GROUPS)
        inside = n < columns
        w_row_scale = of_group(column, tiles0, tiles1, w_row_scales[0], w_row_scales[1], w_row_scales[2], C.GROUPS)
        scale = gl.load(w_row_scale + n, mask=inside, other=0.0)
        offset = scale
        if C.HAS_BIAS:
            bias = of_group(column, tiles0, tiles1, biases[0], biases[1], biases[2], C.GROUPS)
            offset = gl.load(bias + n, mask=inside, other=0.0).to(gl.float32)
        acc = gl.zeros([64, C.BLOCK_M], gl.float32, layout)
        acc, at, it = add_slots(
            acc, rings, slot_of(first, slots4), slot_of(last, slots4), at, it, slots4, slots6, C, ME
        )  # fmt: skip
        if last < steps:
            leave_part(acc, partial, locks, C, ME)
        else:
            if first > 0:
                acc = add_parts(acc, partial, locks, tile, tiles, whole, steps, C, ME)
            out = of_group(column, tiles0, tiles1, outs[0], outs[1], outs[2], C.GROUPS)
            store_tile(
                acc, out, out_ring, x_row_scale, scale, offset, row * C.BLOCK_M, n_first, M, columns, C, ME
            )  # fmt: skip


@gluon.jit
def _barriers(STAGES: gl.constexpr, COUNT: gl.constexpr):
    """A barrier a stage, each of COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def make_rings(x_desc, w8_desc, f_desc, C: gl.constexpr):
    """Shared memory and its barriers. The barriers of `turns` are two, or none."""
    CONSUMERS: gl.constexpr = C.BLOCK_N // 64
    x_ring = gl.allocate_shared_memory(gl.float8e4nv, [C.X_STAGES, C.BLOCK_M, 128], x_desc.layout)
    p_ring = gl.allocate_shared_memory(gl.int32, [C.P_STAGES, C.BLOCK_N, 32], w8_desc.layout)
    f_ring = gl.allocate_shared_memory(gl.int32, [C.P_STAGES, 2, C.BLOCK_N], f_desc.layout)
    x_full = _barriers(C.X_STAGES, 1)
    x_empty = _barriers(C.X_STAGES, CONSUMERS)
    p_full = _barriers(C.P_STAGES, 1)
    p_empty = _barriers(C.P_STAGES, CONSUMERS)
    turns = x_full
    if C.TURNS:
        turns = _barriers(2, 1)
    return x_ring, p_ring, f_ring, (x_full, x_empty, p_full, p_empty, turns)


@gluon.jit
def folded_mm_rows_kernel(
    x,  # descriptors, a box each, of: (M, `folding.fold_width`) E4M3
    w4_0, w4_1, w4_2,  # (N, K4 / 8) int32, `packing`'s bytes
    w6_0, w6_1, w6_2,  # (3 * N, K6 / 16) int32
    w8_0, w8_1, w8_2,  # (N, K8 / 4) int32
    w_factor_0, w_factor_1, w_factor_2,  # (words, N) int32, of `folding.weight_factor`
    out_0, out_1, out_2,  # pointers: (M, N) bfloat16
    x_row_scale,  # (M,) float32
    w_row_scale_0, w_row_scale_1, w_row_scale_2,  # (N,) float32
    bias_0, bias_1, bias_2,  # (N,), or None
    partial,  # (programs, BLOCK_N, BLOCK_M) float32, unused if all tiles are whole
    locks,  # as many int32 zeros as programs have consumers; zeros again afterwards
    M, N0, N1, N2, tiles0, tiles1, column_tiles,  # columns of tiles of the first weight, of the first two, of all
    whole,  # tiles that are one program's, see `shares`
    blocks4, blocks6, blocks8,
    C: gl.constexpr,  # `language.Constants` of a `targets.gluon_tiles.GluonKernel`
):  # fmt: skip
    """Each out = (x @ w.T) * x_row_scale * w_row_scale + bias, rounded once."""
    CONSUMERS: gl.constexpr = C.BLOCK_N // 64
    rings = make_rings(x, w8_0, w_factor_0, C)
    out_ring = gl.allocate_shared_memory(
        gl.bfloat16, [CONSUMERS * 2, C.CHUNK, 64], gl.NVMMASharedLayout(128, 16, rank=2)
    )  # fmt: skip
    fence_async_shared()
    wait_for_inputs()

    row_tiles = gl.cdiv(M, C.BLOCK_M)
    slots4, slots6, slots8 = gl.cdiv(blocks4, 8), gl.cdiv(blocks6, 4), gl.cdiv(blocks8, 4)
    share = share_of(row_tiles * column_tiles, whole, 2 * slots4 + slots6 + slots8)
    sizes = (row_tiles, column_tiles, tiles0, tiles1, whole, slots4, slots6, slots8, blocks4, blocks6)
    N = (N0, N1, N2)
    factors = (w_factor_0, w_factor_1, w_factor_2)
    weights = ((w4_0, w4_1, w4_2), (w6_0, w6_1, w6_2), (w8_0, w8_1, w8_2), factors, N)
    w_row_scales = (w_row_scale_0, w_row_scale_1, w_row_scale_2)
    results = ((out_0, out_1, out_2), w_row_scales, (bias_0, bias_1, bias_2), N)
    args = (rings, out_ring, x_row_scale, results, (partial, locks), share, sizes, M)
    for_w = (weights, rings, share, sizes)
    for_x = (x, rings, share, sizes)
    if CONSUMERS == 1:
        gl.warp_specialize(
            [(_multiply, (args, C, gl.constexpr(0))), (load_w, (for_w, C)), (load_x, (for_x, C))],
            [1, 1],
            [C.LOADER, C.LOADER],
        )
    else:
        gl.static_assert(CONSUMERS == 2)
        gl.warp_specialize(
            [
                (_multiply, (args, C, gl.constexpr(0))), (_multiply, (args, C, gl.constexpr(1))),
                (load_w, (for_w, C)), (load_x, (for_x, C)),
            ],
            [4, 1, 1],
            [C.CONSUMER, C.LOADER, C.LOADER],
        )  # fmt: skip

"""Packed weights in shared memory -> words of folded E4M3 in the registers that WGMMA takes its left operand from.

`numerics.folding` says what folded means, and in which order channels lie: such that a packed word unpacks to words
that the same thread wants. A consumer has 64 weights, a row each, of a tile's BLOCK_N; ME says which.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier

from micromix_compile.templates.triton import fold

# As the one of `fold`, but with the table, whose two words the threads' words of a block share, from outside. $2: 8
# codes; $3, $4: 8 magnitudes, a byte each, with the block's exponent added to all but zero.
E2M1_PTX = gl.constexpr(
    fold.one_line("""{
    .reg .b32 code, upper, sign;
    and.b32 code, $2, 0x77777777;
    shr.u32 upper, $2, 16;
    prmt.b32 sign, 0x80808080, 0x80808080, $2;
    shl.b32 sign, sign, 7;
    prmt.b32 $0, $3, $4, code;
    lop3.b32 $0, sign, 0x80808080, $0, 0xEA;
    shr.u32 code, code, 16;
    prmt.b32 sign, 0x80808080, 0x80808080, upper;
    shl.b32 sign, sign, 7;
    prmt.b32 $1, $3, $4, code;
    lop3.b32 $1, sign, 0x80808080, $1, 0xEA;
}""")
)
E2M3_PTX = gl.constexpr(fold.E2M3_PTX)
E3M2_PTX = gl.constexpr(fold.E3M2_PTX)
E4M3_PTX = gl.constexpr(fold.E4M3_PTX)

# Words of 64 weights in the threads that want what they unpack to: in each, of rows 8 apart, every fourth word.
LANES = [[0, 1], [0, 2], [1, 0], [2, 0], [4, 0]]
WARPS = [[16, 0], [32, 0]]
WORDS8 = gl.constexpr(gl.DistributedLinearLayout([[8, 0], [0, 4]], LANES, WARPS, [], [64, 8]))
WORDS16 = gl.constexpr(gl.DistributedLinearLayout([[8, 0], [0, 4], [0, 8]], LANES, WARPS, [], [64, 16]))
WORDS32 = gl.constexpr(gl.DistributedLinearLayout([[8, 0], [0, 4], [0, 8], [0, 16]], LANES, WARPS, [], [64, 32]))
PLANE = gl.constexpr(gl.NVMMASharedLayout(32, 32, rank=2))
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def _rows_of(f_ring, stage, STEP: gl.constexpr, layout: gl.constexpr, C: gl.constexpr, ME: gl.constexpr):
    """(64,) int32: the factors of four blocks of each row. STEP: of a slot of MXFP4, 0 or 1."""
    rows = f_ring.index(stage)._reinterpret(gl.int32, [2 * C.BLOCK_N], LINE).slice(STEP * C.BLOCK_N + 64 * ME, 64)
    return rows.load(gl.SliceLayout(1, layout))


@gluon.jit
def _factors_of(rows, layout: gl.constexpr, WORDS: gl.constexpr):
    """(64, WORDS) int32: the factors of the blocks that words are in."""
    word = gl.arange(0, WORDS, gl.SliceLayout(0, layout))[None, :]
    return (rows[:, None] >> (word // (WORDS // 4) * 8)) & 0xFF


@gluon.jit
def _wait(bars, at, C: gl.constexpr):
    """The stage of the next slot, when its weights are there."""
    x_full, x_empty, p_full, p_empty, turns = bars
    stage = at % C.P_STAGES
    mbarrier.wait(p_full.index(stage), at // C.P_STAGES & 1)
    return stage


@gluon.jit
def _give_back(bars, stage):
    """Let the copy engine write to a stage again, behind all loads from it.

    A barrier of threads does not order reads of shared memory before the copy engine's writes; the fence does. Without
    it products were rarely wrong, where partial sums crowd the memory pipes.
    """
    x_full, x_empty, p_full, p_empty, turns = bars
    fence_async_shared()
    mbarrier.arrive(p_empty.index(stage), count=1)


@gluon.jit
def load_fp4(p_ring, f_ring, bars, at, C: gl.constexpr, ME: gl.constexpr):
    """A slot, two steps: (64, 16) packed words of each and (64,) factors of each."""
    stage = _wait(bars, at, C)
    packed = p_ring.index(stage).slice(64 * ME, 64, 0).load(WORDS32)
    one, two = gl.split(gl.permute(gl.reshape(packed, [64, 2, 16]), [0, 2, 1]))
    rows1 = _rows_of(f_ring, stage, 0, WORDS16, C, ME)
    rows2 = _rows_of(f_ring, stage, 1, WORDS16, C, ME)
    _give_back(bars, stage)
    one = gl.convert_layout(one, WORDS16, assert_trivial=True)
    two = gl.convert_layout(two, WORDS16, assert_trivial=True)
    return one, two, rows1, rows2


@gluon.jit
def fold_fp4(packed, rows):
    """(64, 16) words of eight codes, and factors -> (64, 32) words of E4M3."""
    factor = _factors_of(rows, WORDS16, 16)
    low = factor * 0x01010100 + 0x14100800
    high = factor * 0x01010101 + 0x24201C18
    a, b = gl.inline_asm_elementwise(
        E2M1_PTX, "=&r,=&r,r,r,r", [packed, low, high], dtype=(gl.int32, gl.int32), is_pure=True, pack=1
    )
    both = gl.permute(gl.join(gl.reshape(a, [64, 4, 4]), gl.reshape(b, [64, 4, 4])), [0, 1, 3, 2])
    return gl.reshape(both, [64, 32])


@gluon.jit
def fold_fp6(p_ring, f_ring, bars, at, C: gl.constexpr, ME: gl.constexpr):
    """A slot, one step: (64, 32) words of E4M3."""
    stage = _wait(bars, at, C)
    planes = p_ring.index(stage)._reinterpret(gl.int32, [4, C.BLOCK_N, 8], PLANE)
    plane0 = planes.index(0).slice(64 * ME, 64, 0).load(WORDS8)
    plane1 = planes.index(1).slice(64 * ME, 64, 0).load(WORDS8)
    plane2 = planes.index(2).slice(64 * ME, 64, 0).load(WORDS8)
    factor = _factors_of(_rows_of(f_ring, stage, 0, WORDS8, C, ME), WORDS8, 8)
    _give_back(bars, stage)
    a, b, c, d = gl.inline_asm_elementwise(
        E3M2_PTX if C.FP6 == "e3m2" else E2M3_PTX, "=&r,=&r,=&r,=&r,r,r,r,r", [plane0, plane1, plane2, factor],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip
    ab = gl.join(gl.reshape(a, [64, 2, 4]), gl.reshape(b, [64, 2, 4]))
    cd = gl.join(gl.reshape(c, [64, 2, 4]), gl.reshape(d, [64, 2, 4]))
    words = gl.reshape(gl.permute(gl.join(ab, cd), [0, 1, 4, 3, 2]), [64, 32])
    return gl.convert_layout(words, WORDS32, assert_trivial=True)


@gluon.jit
def fold_fp8(p_ring, f_ring, bars, at, C: gl.constexpr, ME: gl.constexpr):
    """A slot, one step: (64, 32) words of E4M3."""
    stage = _wait(bars, at, C)
    packed = p_ring.index(stage).slice(64 * ME, 64, 0).load(WORDS32)
    factor = _factors_of(_rows_of(f_ring, stage, 0, WORDS32, C, ME), WORDS32, 32)
    _give_back(bars, stage)
    return gl.inline_asm_elementwise(E4M3_PTX, "=&r,r,r", [packed, factor], dtype=gl.int32, is_pure=True, pack=1)

"""Which tiles of the outputs a persistent program computes, and which steps along K of those that it shares (stream-K).

Tiles that fill rounds of all programs are whole: program p computes tile p of each round. What remains is less than a
tile a program. Its steps, tile after tile, are cut into as many equal runs as there are programs, so a run may end in
one tile and begin in the one before. A program goes through its run from the last tile to the first. It so begins with
the one piece that lacks its tile's end: this sum it leaves to others. All further pieces hold their tile's end: it adds
what programs with lower numbers left, and stores. A program so waits only for programs that started before it, and for
what they do before they wait themselves.

Steps are of 128 channels. Slots are what is loaded of weights at a time: two steps of MXFP4, one of the others.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def share_of(tiles, whole, steps):
    """(whole tiles, first step, last step) of this program, in the steps of all tiles behind the `whole` first."""
    total = (tiles - whole) * steps
    begin = gl.program_id(0) * total // gl.num_programs(0)
    end = (gl.program_id(0) + 1) * total // gl.num_programs(0)
    return gl.maximum(gl.cdiv(whole - gl.program_id(0), gl.num_programs(0)), 0), begin, end


@gluon.jit
def pieces_of(share, steps):
    """How many pieces a program's share is: whole tiles, and parts of tiles."""
    tiles, begin, end = share
    return tiles + gl.where(end > begin, (end - 1) // steps - begin // steps + 1, 0)


@gluon.jit
def piece_of(share, index, whole, steps):
    """(tile, first step, last step) of a piece."""
    tiles, begin, end = share
    shared = gl.maximum((end - 1) // steps - (index - tiles), 0)
    is_whole = index < tiles
    tile = gl.where(is_whole, gl.program_id(0) + index * gl.num_programs(0), whole + shared)
    first = gl.where(is_whole, 0, gl.maximum(begin - shared * steps, 0))
    last = gl.where(is_whole, steps, gl.minimum(end - shared * steps, steps))
    return tile, first, last


@gluon.jit
def first_program_of(tile, tiles, whole, steps):
    """The program with the beginning of a shared tile."""
    total = (tiles - whole) * steps
    return (((tile - whole) * steps + 1) * gl.num_programs(0) - 1) // total


@gluon.jit
def slot_of(step, slots4):
    """The first slot that begins at a step or behind it."""
    return gl.where(step < 2 * slots4, (step + 1) // 2, step - slots4)


@gluon.jit
def step_of(slot, slots4):
    """The step that a slot begins with."""
    return slot + gl.minimum(slot, slots4)


@gluon.jit
def place_of(tile, row_tiles, column_tiles, GROUP_M: gl.constexpr):
    """(row, column) of a tile: GROUP_M rows of tiles run together, column after column, and L2 has what they read."""
    group = GROUP_M * column_tiles
    first = tile // group * GROUP_M
    rows = gl.minimum(row_tiles - first, GROUP_M)
    return first + tile % group % rows, tile % group // rows


@gluon.jit
def of_group(column_tile, tiles0, tiles1, first, second, third, GROUPS: gl.constexpr):
    """Which of three numbers or pointers is the weight's that a column of tiles is of."""
    mine = first
    if GROUPS > 1:
        mine = gl.where(column_tile >= tiles0, second, mine)
    if GROUPS > 2:
        mine = gl.where(column_tile >= tiles1, third, mine)
    return mine


@gluon.jit
def desc_of_group(column_tile, tiles0, tiles1, first, second, third, GROUPS: gl.constexpr):
    """The same of descriptors, which `gl.where` does not take."""
    mine = first
    if GROUPS > 1:
        if column_tile >= tiles0:
            mine = second
    if GROUPS > 2:
        if column_tile >= tiles1:
            mine = third
    return mine

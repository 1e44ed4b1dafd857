"""Where a program of a product with many experts' weights finds its tile: on the device, from where experts' rows end.

Rows of the output lie expert after expert; how many each has is known on the device only. So as many programs are
launched as any distribution of the rows could need, and those that find no tile have nothing to do.
"""

import triton
import triton.language as tl


@triton.jit
def expert_tile(offs, tile, column_tiles, R, E, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of its rows, column of tiles) of a tile; expert is E for rows that no expert has.

    offs: (E,) int32, where each expert's rows end. R: rows of the output. column_tiles: in each row of tiles. BLOCK_E:
    a power of two, at least E.

    Tiles of an expert that multiply the same weights follow each other, so that L2 has these. Rows behind the last
    expert's come last. Of a tile that isn't there no row is less than the end, or no column is one of the output's.
    """
    e = tl.arange(0, BLOCK_E)
    ends = tl.minimum(tl.load(offs + e, mask=e < E, other=0), R)
    starts = tl.load(offs + e - 1, mask=(e > 0) & (e < E), other=0)
    row_tiles = tl.cumsum(tl.cdiv(tl.maximum(ends - starts, 0), BLOCK_M), 0)
    is_before = row_tiles * column_tiles <= tile
    expert = tl.minimum(tl.sum(is_before.to(tl.int32), 0), E)
    place = tile - tl.max(tl.where(is_before, row_tiles, 0), 0) * column_tiles
    start = tl.load(offs + expert - 1, mask=expert > 0, other=0)
    end = tl.minimum(tl.load(offs + expert, mask=expert < E, other=R), R)
    height = tl.maximum(tl.cdiv(end - start, BLOCK_M), 1)
    return expert, start + place % height * BLOCK_M, end, place // height


@triton.jit
def rows_of_tile(rows, m, inside, BLOCK_M: tl.constexpr):
    """Which row of x each row m of the output reads, less its place in the tile: functions of tiles add that again."""
    return tl.load(rows + m, mask=inside, other=0) - tl.arange(0, BLOCK_M)

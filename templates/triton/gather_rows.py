"""Rows of a folded activation in the order in which experts take them: what TMA then copies whole tiles of."""

import triton
import triton.language as tl

from micromix_compile.templates.triton.ahead import wait_for_inputs


@triton.jit(do_not_specialize=["E", "quads"])
def gather_rows_kernel(
    x,  # (T, 4 * quads) int32: folded rows, whole 16 bytes
    x_row_scale,  # (T,) float32
    rows,  # (R,) int32
    offs,  # (E,) int32
    out,  # (R, 4 * quads)
    out_row_scale,  # (R,)
    E, quads, BLOCK: tl.constexpr, LAUNCH_PDL: tl.constexpr,
):  # fmt: skip
    """out[i] = x[rows[i]] and the same of scales, for rows that an expert has; scales of others are zeros.

    Grid: a program a row.
    """
    i = tl.program_id(0)
    if LAUNCH_PDL:
        wait_for_inputs()
    if i < tl.load(offs + E - 1):
        row = tl.load(rows + i)
        tl.store(out_row_scale + i, tl.load(x_row_scale + row))
        words = quads * 4
        for start in range(0, words, BLOCK):
            word = start + tl.arange(0, BLOCK)
            held = tl.load(x + row.to(tl.int64) * words + word, mask=word < words)
            tl.store(out + i.to(tl.int64) * words + word, held, mask=word < words)
    else:
        tl.store(out_row_scale + i, 0.0)

"""The sum of what experts made of each token, by the router's weights, without a copy of the rows in tokens' order."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["R"])
def weighted_sum_kernel(
    rows,  # (R, N) float, row_stride elements from one to the next
    weights,  # (R,) float
    place,  # (T, TOP_K) int32 or int64
    out,  # (T, N) float
    R, N, row_stride, TOP_K: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[t] = sum_j weights[p] * rows[p] with p = place[t, j], in float32, in order of j.

    Grid: a program for each token and BLOCK columns. A row's place is the same for all of a program, so that its loads
    are whole vectors, and those of all rows run ahead of each other.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(TOP_K):
        row = tl.load(place + token * TOP_K + j).to(tl.int64)
        row = tl.where(row < 0, row + R, row)
        value = tl.load(rows + row * row_stride + columns, mask=columns < N)
        total += tl.load(weights + row).to(tl.float32) * value.to(tl.float32)
    tl.store(out + token * N + columns, total, mask=columns < N)

"""Rotation of blocks on a GPU, see `numerics.rotation`: the same sums of the same pairs, hence the same bytes."""

from __future__ import annotations

import triton
import triton.language as tl

_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.jit
def rotate_blocks(y, is_rotated):
    """y 2**-5 H32 in those of the blocks that are rotated, y as it is in the others.

    y: (BLOCKS, 32) float32. is_rotated: (BLOCKS,) bool.
    """
    blocks: tl.constexpr = y.shape[0]
    turned = _normalize(y)
    for _ in tl.static_range(5):  # all pairs 16 apart; their places in the result bring those 8 apart there next
        upper, lower = tl.split(tl.permute(tl.reshape(turned, (blocks, 2, 16)), (0, 2, 1)))
        turned = tl.reshape(tl.join(upper + lower, upper - lower), (blocks, 32))
    return tl.where(is_rotated[:, None], turned, y)


@triton.jit
def _normalize(y):
    """y 2**-5, rounded if subnormal: by an instruction that ptxas does not make one with the sum behind it."""
    if _INTERPRETED:
        return y * 0.03125
    else:
        return tl.inline_asm_elementwise(
            "mul.rn.f32 $0, $1, 0f3D000000;", "=f,f", [y], tl.float32, is_pure=True, pack=1
        )

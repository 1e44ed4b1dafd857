"""The launch that writes keys and values to a cache of bytes, and who does it with Triton. Nothing waits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from micromix_compile.numerics.kv_cache import check_write_kv
from micromix_compile.targets.launch import FORMATS_DIGEST, KernelCall, unit_column_stride

if TYPE_CHECKING:
    from torch import Tensor

FEW_ROWS: Final = 4096
"""Up to so many a program takes one of them, so that a decoding step is spread over the GPU; beyond, `ROWS`."""

ROWS: Final = 8


class TritonCache:
    """The operation of `ops.kv_cache` in Triton."""

    def write(
        self, key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
        scale_rounding: str,
    ) -> None:  # fmt: skip
        """See `CacheKernels`, in one launch. A position outside is a device-side assertion, and is not written."""
        check_write_kv(key, value, position, k_q, k_scale, v_q, v_scale, scale_rounding)
        if key.numel() or value.numel():
            write_kv_call(
                unit_column_stride(key), unit_column_stride(value), position.contiguous(), k_q, k_scale, v_q, v_scale,
                scale_rounding,
            ).launch_on(key)  # fmt: skip


TRITON_CACHE: Final = TritonCache()


def write_kv_call(
    key: Tensor, value: Tensor, position: Tensor, k_q: Tensor, k_scale: Tensor, v_q: Tensor, v_scale: Tensor,
    scale_rounding: str,
) -> KernelCall:  # fmt: skip
    """The launch that writes key and value, whose channels lie side by side, to the cache."""
    from micromix_compile.templates.triton.write_kv import write_kv_kernel

    batch, heads, tokens, _ = key.shape
    rows = batch * heads * tokens
    per_program = 1 if rows <= FEW_ROWS else ROWS
    (k_blocks, k_size), (v_blocks, v_size) = (
        (scale.shape[3], x.shape[3] // scale.shape[3]) for x, scale in ((key, k_scale), (value, v_scale))
    )
    strides = {
        f"{name}_stride_{dim}": x.stride(i)
        for name, x in (("key", key), ("value", value))
        for i, dim in enumerate(("b", "h", "t"))
    }
    return KernelCall(
        kernel=write_kv_kernel,
        grid=(-(-rows // per_program), 2),
        args={
            "key_ptr": key, "value_ptr": value, "position_ptr": position, "k_q_ptr": k_q, "k_scale_ptr": k_scale,
            "v_q_ptr": v_q, "v_scale_ptr": v_scale, "H": heads, "T": tokens, "L": k_q.shape[2], "rows": rows, **strides,
        },
        constexprs={
            "K_BLOCKS": k_blocks, "K_BLOCK_SIZE": k_size, "V_BLOCKS": v_blocks, "V_BLOCK_SIZE": v_size,
            "SCALE_ROUNDING": str(scale_rounding), "FORMATS": FORMATS_DIGEST, "ROWS": per_program,
        },
        num_warps=1 if per_program == 1 else 4,
        asserts=True,
    )  # fmt: skip
